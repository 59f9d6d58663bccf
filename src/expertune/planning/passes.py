"""What an objective asks of the model beside a forward and a backward over each example's tokens."""

from dataclasses import dataclass
from typing import Any

from expertune.config import RunConfig
from expertune.objectives.units import keeps_start, takes_kl
from expertune.train.arguments import ACCUMULATION, BATCH_SIZE, training_argument

# TRL's defaults of what decides memory and time.
GRPO_DEFAULTS: dict[str, Any] = {
    "beta": 0.0,
    "max_completion_length": 512,
    "num_generations": 8,
    "num_iterations": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
}


@dataclass(frozen=True)
class Passes:
    """What a step of an objective computes.

    Attributes:
        sequences: of an example, trained at once; of a pair both sides.
        silent: forwards without gradients for each trained one, over as many tokens: of the reference, of KTO's KL
            term, and of the model as it was when it wrote the answers.
        keeps_start: the adapter that training starts from is kept beside the trained one, as the reference.
        written: tokens of the longest answer that the model writes in training; 0 where the data has the answers.
        written_at_once: answers that it writes at once.
        written_for: micro-batches that these are for.
        answers: that are trained on for each example: those of a prompt, as often as they are used.
    """

    sequences: int = 1
    silent: int = 0
    keeps_start: bool = False
    written: int = 0
    written_at_once: int = 0
    written_for: int = 1
    answers: int = 1

    @property
    def line(self) -> str:
        """The same in words; empty for supervised fine-tuning."""
        parts = []
        if self.sequences > 1:
            parts.append(f"{self.sequences} sequences an example")
        if self.written:
            parts.append(f"{self.written_at_once} answers of up to {self.written} tokens written at once")
        if self.silent:
            times = "a forward" if self.silent == 1 else f"{self.silent} forwards"
            parts.append(f"{times} without gradients beside each trained one")
        if self.keeps_start:
            parts.append("a copy of the adapter that it starts from")
        return ", ".join(parts)


def passes_of(config: RunConfig) -> Passes:
    """What a step of the run's objective computes."""
    if config.objective == "grpo":
        return _of_grpo(config)
    return Passes(
        sequences=2 if config.objective in ("dpo", "orpo") else 1,
        silent={"dpo": 1, "kto": 3 if takes_kl(config) else 1}.get(config.objective, 0),
        keeps_start=keeps_start(config),
    )


def _of_grpo(config: RunConfig) -> Passes:
    values = GRPO_DEFAULTS | config.training
    rows, accumulation = (int(training_argument(config.training, key)) for key in (BATCH_SIZE, ACCUMULATION))
    steps = values["steps_per_generation"] or accumulation
    if values["generation_batch_size"]:
        steps = max(int(values["generation_batch_size"]) // rows, 1)
    written_for = int(steps) * int(values["num_iterations"])
    # Where an update falls between two uses of the answers, TRL keeps their log-probabilities of before.
    is_old = accumulation % written_for != 0
    return Passes(
        silent=int(bool(values["beta"])) + int(is_old),
        keeps_start=keeps_start(config),
        written=int(values["max_completion_length"]),
        written_at_once=rows * int(steps),
        written_for=written_for,
        answers=int(values["num_generations"]) * int(values["num_iterations"]),
    )
