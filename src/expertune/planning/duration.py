"""How long a whole run takes: its steps, its evaluations and the answers to evaluation examples.

Loading the model and writing checkpoints are left out: they depend on the disk.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, RunConfig
from expertune.data import TokenizedExamples, make_dataset, prepare_examples
from expertune.data.lint import check_context
from expertune.data.prepare import sampled
from expertune.data.sources import find_source, local_bytes, rows_of_slices
from expertune.errors import ExpertuneError
from expertune.planning.passes import passes_of
from expertune.planning.speed import StepCost
from expertune.run.progress import in_words
from expertune.train.arguments import BATCH_SIZE, EVALUATION_BATCH_SIZE, training_argument
from expertune.train.schedule import count_evaluations, count_steps, scores_in_training

# A plan tokenizes sources of up to so much text, and counts the examples of those up to so much: a few seconds' work.
_MOST_TOKENIZED, _MOST_READ = 8_000_000, 200_000_000

# Of a source of at least twice as many examples so many are tokenized: their lengths are those of all to a percent or
# two, and tokenizing all of the demo's takes as long as importing torch.
_SAMPLED = 1024

_LEAST_SAID = 0.5


@dataclass(frozen=True)
class Lengths:
    """How many examples a run has, and how long they are.

    Attributes:
        num_rows: sequences that it trains on (packs, with `packing: packed`); None where nobody has counted.
        tokens: mean tokens of one; of a pair both sides.
        num_eval_rows: evaluation examples; 0 for a run without any, None where nobody has counted.
        eval_tokens: mean tokens of one.
        is_bound: the examples were not tokenized, and each counts as `data.max_length` tokens.
        is_sampled: a sample of the training examples was tokenized, and `num_rows` is estimated from it.
    """

    num_rows: int | None
    tokens: float
    num_eval_rows: int | None = 0
    eval_tokens: float = 0
    is_bound: bool = False
    is_sampled: bool = False

    @classmethod
    def of(
        cls, data: DataConfig, num_rows: int, train: Mapping[str, Any], evaluation: Mapping[str, Any] | None
    ) -> "Lengths":
        """Those of examples that have been tokenized.

        Args:
            data: the run's data section.
            num_rows: sequences that it trains on.
            train: report on the training examples.
            evaluation: report on the evaluation examples, where the run has any.
        """

        def mean(report: Mapping[str, Any], count: int) -> float:
            return data.max_length if data.packing == "padded" else float(report["num_tokens"] / count)

        num_eval_rows = evaluation["num_rows"] if evaluation else 0
        return cls(
            num_rows,
            mean(train, num_rows),
            num_eval_rows,
            mean(evaluation, num_eval_rows) if evaluation else 0,
        )


def read_lengths(config: RunConfig, trust_remote_code: bool = False) -> Lengths:
    """What is known of a run's examples without going online: by its tokenizer, or by their number alone.

    Args:
        config: the run.
        trust_remote_code: run Python that ships with the model's tokenizer.
    """
    data, folder = config.data, Path(config.model).expanduser()
    with suppress(ExpertuneError):  # a run says what is wrong with its data; a plan goes without
        sizes = [local_bytes(spec) for spec in (data.train, data.eval) if spec is not None]
        if folder.is_dir() and all(num_bytes is not None and num_bytes <= _MOST_TOKENIZED for num_bytes in sizes):
            tokenizer = load_tokenizer(folder, trust_remote_code)
            context = context_length(read_config(folder, trust_remote_code))
            train = _Sample.of(config, data, "train", tokenizer)
            check_context(train.examples, context, "data.train")
            found = Lengths.of(data, len(make_dataset(train.examples, data)), train.examples.report, None)
            found = replace(found, num_rows=train.of_all(found.num_rows), is_sampled=train.share < 1)
            if data.eval is None:
                return found
            template = {"template": train.examples.report["template"]}
            evaluation = _Sample.of(config, data.model_copy(update=template), "eval", tokenizer)
            check_context(evaluation.examples, context, "data.eval")
            of_eval = Lengths.of(data, 1, train.examples.report, evaluation.examples.report)
            num_eval_rows = evaluation.of_all(of_eval.num_eval_rows)
            return replace(found, num_eval_rows=num_eval_rows, eval_tokens=of_eval.eval_tokens)
    counted = _count(data.eval) if data.eval else 0
    longest = passes_of(config).sequences * data.max_length
    return Lengths(_count(data.train), longest, counted, longest, data.packing != "padded")


@dataclass(frozen=True)
class _Sample:
    """Examples of a source that stand for all: some, drawn evenly over it, or all of a small one.

    Attributes:
        examples: tokenized.
        share: of the source's examples, how many of them were looked at.
    """

    examples: TokenizedExamples
    share: float

    @classmethod
    def of(cls, config: RunConfig, data: DataConfig, which: Literal["train", "eval"], tokenizer: Any) -> "_Sample":
        """Those of a part of the data; what cannot be trained on is skipped, and a run says what is wrong with it."""
        kept = data.model_copy(update={"on_error": "skip"})
        examples = prepare_examples(kept, which, tokenizer, objective=config.objective, sample_size=_SAMPLED)
        total = sum(examples.report["files"].values())
        return cls(examples, len(sampled(total, _SAMPLED)) / total)

    def of_all(self, count: int | None) -> int:
        """A number of the sample's examples, or of packs of them, for the whole source."""
        return round((count or 0) / self.share)


def _count(spec: str | list[str]) -> int | None:
    """How many examples a source has; None where that is not known without going online, or it is large."""
    with suppress(ExpertuneError):
        if (count := rows_of_slices(spec)) is not None:
            return count
        if (num_bytes := local_bytes(spec)) is not None and num_bytes <= _MOST_READ:
            return sum(find_source(spec).read(stream=True).num_rows.values())
    return None


@dataclass(frozen=True)
class RunTime:
    """How long a run is expected to take, in seconds.

    Attributes:
        steps: optimizer steps.
        step_seconds: of one of them.
        evaluations: how often the evaluation loss is taken.
        evaluation_seconds: of all of them together.
        answer_seconds: of all answers to evaluation examples, each as long as `task.max_new_tokens`.
        is_bound: see `Lengths`.
        is_least: see `StepTime`.
        is_sampled: the number of steps follows from a sample of the training examples.
    """

    steps: int
    step_seconds: float
    evaluations: int
    evaluation_seconds: float
    answer_seconds: float
    is_bound: bool
    is_least: bool
    is_sampled: bool = False

    @property
    def training_seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.step_seconds

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.training_seconds + self.evaluation_seconds + self.answer_seconds

    @property
    def line(self) -> str:
        """The same in a sentence: `500 steps, about 52 h`."""
        parts = [f"{_said(self.training_seconds)} of steps"]
        if self.evaluation_seconds:
            times = "1 evaluation" if self.evaluations == 1 else f"{self.evaluations} evaluations"
            parts.append(f"{_said(self.evaluation_seconds)} of {times}")
        if self.answer_seconds:
            parts.append(f"{_said(self.answer_seconds)} of answers")
        made_of = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        besides = "loading and evaluations" if self.evaluations and not self.evaluation_seconds else "loading"
        bound = "; less where examples are shorter than data.max_length" if self.is_bound else ""
        least = "; a model this small can take several times as long" if self.is_least else ""
        expected = about(self.seconds, self.is_least)
        steps = f"{'about ' if self.is_sampled else ''}{self.steps:,} steps"
        return f"{steps}, {expected}{made_of}, besides {besides}{bound}{least}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"seconds": self.seconds, "training_seconds": self.training_seconds, **asdict(self)}


def about(seconds: float, is_least: bool = False) -> str:
    """An expected time in words; of less than half a second no number is said, which would be 0.

    Args:
        seconds: the time.
        is_least: it is a bound from below: what takes that little may take some seconds.
    """
    if seconds < _LEAST_SAID:
        return "seconds" if is_least else _said(seconds)
    return f"{'at least' if is_least else 'about'} {in_words(seconds)}"


def _said(seconds: float) -> str:
    return in_words(seconds) if seconds >= _LEAST_SAID else "under a second"


@dataclass(frozen=True)
class Pace:
    """How fast the batches of a run are.

    Attributes:
        config: the run, with micro-batches as they run.
        cost: of a step, by the bound that the plan counts with.
    """

    config: RunConfig
    cost: StepCost

    def run_time(self, lengths: Lengths) -> RunTime | None:
        """How long the run takes on such examples; None where the number of steps is not known."""
        training, task, ranks = self.config.training, self.config.task, self._num_ranks
        passes = self.cost.workload.passes
        num_rows = None if lengths.num_rows is None else lengths.num_rows * passes.answers
        steps = count_steps(training, num_rows, ranks)
        if steps is None:
            return None
        rows, tokens = int(training_argument(training, BATCH_SIZE)), lengths.tokens + passes.written
        step = self.cost.of_batch(rows * tokens, tokens / passes.sequences).time()
        evaluations = count_evaluations(self.config, steps, num_rows, ranks) if self.config.data.eval else 0
        scorings = 1 + task.before + (evaluations if scores_in_training(self.config) else 0) if task.metric else 0
        return RunTime(
            steps=steps,
            step_seconds=step.seconds,
            evaluations=evaluations,
            evaluation_seconds=evaluations * self._evaluation(lengths) if lengths.num_eval_rows else 0,
            answer_seconds=scorings * self._answering(lengths) if lengths.num_eval_rows else 0,
            is_bound=lengths.is_bound,
            is_least=step.is_least,
            is_sampled=lengths.is_sampled and count_steps(training, None, ranks) is None,
        )

    def _evaluation(self, lengths: Lengths) -> float:
        count = lengths.num_eval_rows or 0
        rows = min(int(training_argument(self.config.training, EVALUATION_BATCH_SIZE)), count)
        batches = math.ceil(count / rows / self._num_ranks)
        passes = self.cost.workload.passes
        if passes.written:  # an answer to each is rewarded
            return self._answers(lengths, count, passes.written)
        batch = self.cost.of_batch(rows * lengths.eval_tokens, lengths.eval_tokens / passes.sequences)
        return (1 + passes.silent) * batches * batch.forward_seconds()

    def _answering(self, lengths: Lengths) -> float:
        """Of one scoring."""
        task, count = self.config.task, lengths.num_eval_rows or 0
        return self._answers(lengths, min(task.rows or count, count), task.max_new_tokens)

    def _answers(self, lengths: Lengths, rows: int, longest: int) -> float:
        """Each batch's prompts are read at once, and each token of its answers is a pass."""
        batch = min(self.config.task.batch_size, rows)
        batches = math.ceil(rows / batch / self._num_ranks)
        tokens = lengths.eval_tokens / self.cost.workload.passes.sequences
        reading = self.cost.of_batch(batch * tokens, tokens).forward_seconds()
        return batches * (reading + longest * self.cost.of_batch(batch, 1).forward_seconds())

    @property
    def _num_ranks(self) -> int:
        return self.cost.workload.inventory.distribution.world_size
