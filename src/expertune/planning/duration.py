"""How long a whole run takes: its steps, its evaluations and the answers to evaluation examples.

Loading the model and writing checkpoints are left out: they depend on the disk. So is the check before the first step.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from expertune.config import DataConfig, RunConfig
from expertune.planning.speed import StepCost
from expertune.run.progress import in_words
from expertune.text import counted
from expertune.train.arguments import BATCH_SIZE, EVALUATION_BATCH_SIZE, training_argument
from expertune.train.schedule import count_evaluations, count_steps, scores_in_training

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
        unread: what a run would stop at, where the examples could not be read.
    """

    num_rows: int | None
    tokens: float
    num_eval_rows: int | None = 0
    eval_tokens: float = 0
    is_bound: bool = False
    is_sampled: bool = False
    unread: str | None = None

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
        was_busy: see `expertune.gpus.Rates`.
    """

    steps: int
    step_seconds: float
    evaluations: int
    evaluation_seconds: float
    answer_seconds: float
    is_bound: bool
    is_least: bool
    is_sampled: bool = False
    was_busy: bool = False

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
            parts.append(f"{_said(self.evaluation_seconds)} of {counted(self.evaluations, 'evaluation')}")
        if self.answer_seconds:
            parts.append(f"{_said(self.answer_seconds)} of answers")
        made_of = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        no_evaluation = self.evaluations and not self.evaluation_seconds
        besides = f"loading{', evaluations' if no_evaluation else ''} and the preflight check"
        bound = "; less where examples are shorter than data.max_length" if self.is_bound else ""
        least = "; a model this small can take several times as long" if self.is_least else ""
        busy = "; less if it has the machine to itself: others kept it busy when it was timed" if self.was_busy else ""
        expected = about(self.seconds, self.is_least and not (bound or busy))
        steps = f"{'about ' if self.is_sampled else ''}{counted(self.steps, 'step')}"
        return f"{steps}, {expected}{made_of}, besides {besides}{bound}{least}{busy}"

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
            was_busy=self.cost.rates.was_busy,
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
