"""A model on its run's evaluation examples: one evaluation while training, before and after it, and on command.

Legend: nats are natural-logarithm units of loss per label token.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.config import RunConfig
from expertune.config.trl_keys import arguments_class
from expertune.data import TokenizedExamples, make_collator, make_dataset
from expertune.evaluation.scoring import evaluation_figures, evaluation_loss, score_task
from expertune.experts.load import RoutingCounts
from expertune.generation.decoding import Batches, Decoded, decode, to_text
from expertune.generation.sampling import Sampling
from expertune.objectives.chunked_loss import LanguageModelLoss
from expertune.objectives.rewards import Answers, Rewards
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from expertune.train.arguments import training_argument
from expertune.train.oom import OutOfMemory
from expertune.train.schedule import metric_names, scores_in_training

if TYPE_CHECKING:  # it imports TRL
    from expertune.objectives.preference import Preference


class HeldOut:
    """The evaluation of a run.

    It calls the model inside of the adapter's wrapper, because transformers' Trainer puts autocast around that one for
    `bf16` and `fp16`: the number would be another than that of the adapter in use.

    Args:
        config: the run file.
        model: the adapted model.
        tokenizer: the base model's tokenizer.
        rows: the evaluation examples.
        recovery: what is done when memory runs out; its ranks share the work.
        bars: where progress is shown.

    Attributes:
        dataset: the same, as the trainer's batches are made of them.
        routing: which experts the tokens of the last evaluation were sent to, as `RoutingCounts.to_json` gives it;
            empty where answers were rewarded.
        preference: the run's objective where it is one over answers; its loss is then the evaluation's.
        rewards: the run's where it has some; the loss is then minus the mean reward of the most likely answers.
    """

    preference: "Preference | None" = None
    rewards: Rewards | None = None

    def __init__(
        self,
        config: RunConfig,
        model: ExpertPeftModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: TokenizedExamples,
        recovery: OutOfMemory,
        bars: Bars,
    ) -> None:
        self.dataset = make_dataset(rows, config.data)
        self._config, self._model, self._tokenizer, self._rows = config, model, tokenizer, rows
        self._recovery, self._bars = recovery, bars
        self._collator = make_collator(config.data, tokenizer)
        self._batch_size = int(training_argument(config.training, "per_device_eval_batch_size"))
        self.routing: dict[str, Any] = {}
        self._in_chunks = LanguageModelLoss(model.get_base_model(), config.loss)

    def figures(self, step: int, base_only: bool = False) -> dict[str, float]:
        """The loss, and what the objective knows beside it.

        Args:
            step: the optimizer step that was taken last; 0 before the first.
            base_only: of the base model without the adapter.

        Returns:
            `loss`: the mean cross entropy over all label tokens, in nats, without a router's auxiliary loss; or the
            objective's over answers, and its figures by TRL's names; or minus the mean `reward`, and that.

        Raises:
            DataError: no example holds a token that takes a loss.
            DoesNotFitError: memory ran out, and nothing that could be changed is left.
        """
        if self.rewards:
            return self._rewarded(self.rewards, step, base_only)
        base, ranks = self._model.get_base_model(), self._recovery.ranks
        routing = RoutingCounts(base)
        in_parts = partial(self._recovery.in_parts, "evaluation", step=step)
        with self._adapted(base_only), self._bars.task("evaluation", "examples") as progress, routing.watching():
            progress(0, len(self.dataset))
            batches = Batches(in_parts, progress, ranks, routing.counting)
            if self.preference:
                collator, taken = self.preference.collator, self.preference.evaluated
                found = evaluation_figures(base, self.dataset, collator, self._batch_size, taken, batches)
            else:
                in_chunks = self._in_chunks.summed
                loss = evaluation_loss(base, self.dataset, self._collator, self._batch_size, in_chunks, batches)
                found = {"loss": loss}
        self.routing = routing.to_json(ranks)
        return found

    def _rewarded(self, rewards: Rewards, step: int, base_only: bool) -> dict[str, float]:
        """The rewards of an answer to each prompt, of the most likely token each time."""
        longest = self._config.training.get("max_completion_length", arguments_class("grpo").max_completion_length)
        sampling, size = Sampling(int(longest)), self._config.task.batch_size
        rows = [self.dataset[index] for index in range(len(self.dataset))]
        ids: list[list[int]] = []

        def answer(prompts: list[list[int]]) -> list[Decoded]:
            return decode(self._model, self._tokenizer, prompts, sampling)

        with self._adapted(base_only), self._bars.task("evaluation", "examples answered") as progress:
            for start in range(0, len(rows), size):
                progress(start, len(rows))
                prompts = [list(row["prompt_ids"]) for row in rows[start : start + size]]
                for part in self._recovery.in_parts("generation", answer, prompts, step=step):
                    ids += [answered for answered, _ in part]
            progress(len(rows), len(rows))
        texts = [to_text(each, self._tokenizer) for each in ids]
        places = [self._rows.examples[index].place for index in range(len(rows))]
        found = rewards.means(Answers.to(rows, texts, ids, places))
        return {"loss": -found["reward"], **found}

    @property
    def num_answered(self) -> int:
        """How many examples are answered for the run's task, by its run file."""
        return len(range(len(self._rows.examples))[: self._config.task.rows])

    def score(self, step: int, rows: int | None = None, base_only: bool = False) -> dict[str, Any]:
        """The score of the run's task; see `expertune.evaluation.scoring.score_task`.

        Args:
            step: as for `figures`.
            rows: how many examples are answered; None means the run file's number.
            base_only: of the base model without the adapter.
        """
        task = self._config.task if rows is None else self._config.task.model_copy(update={"rows": rows})
        what = "scoring the base model" if base_only else "scoring the adapter"
        with self._adapted(base_only), self._bars.task(what, "examples answered") as progress:
            progress(0, len(range(len(self._rows.examples))[: task.rows]))
            batches = Batches(partial(self._recovery.in_parts, "generation", step=step), progress, self._recovery.ranks)
            return score_task(self._model, self._tokenizer, self._rows.examples, task, batches)

    def _adapted(self, base_only: bool) -> AbstractContextManager[None]:
        return self._model.disable_adapter() if base_only else nullcontext()

    def metrics(self, step: int) -> dict[str, float]:
        """What an evaluation while training gives.

        Returns:
            What `figures` gives, and the figures of the task where the best checkpoint is chosen by one of them:
            answering examples takes long.
        """
        found = self.figures(step)
        if scores_in_training(self._config):
            score = self.score(step)
            found |= {name: score[name] for name in metric_names(self._config) if name in score}
        return found


@dataclass(frozen=True)
class Timed:
    """An evaluation whose time is a phase of the run.

    Attributes:
        held_out: the evaluation.
        record: the run's.
    """

    held_out: HeldOut
    record: RunRecord

    @property
    def dataset(self) -> Any:
        """See `HeldOut`."""
        return self.held_out.dataset

    def metrics(self, step: int) -> dict[str, float]:
        """See `HeldOut.metrics`."""
        with self.record.phase("evaluation"):
            return self.held_out.metrics(step)
