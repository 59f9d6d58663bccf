"""What to give up when a run does not fit: changes to the run file, the cheapest first.

Cheapest means what costs the result least. Splitting a batch changes nothing but time; recomputing layers costs about
a third more compute; shorter rows cut data; a smaller rank changes what can be learnt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from expertune.config import RunConfig
from expertune.plan.memory import Memory, training_argument, uses_checkpointing

# Below these, a run is no longer the one that was asked for.
MIN_LENGTH = 128
MIN_RANK = 4

Estimate = Callable[[RunConfig], Memory]


@dataclass(frozen=True)
class Change:
    """One change to a run file.

    Attributes:
        settings: dotted key -> new value.
        costs: what is given up, in a few words.
        saves_bytes: how much lower the peak is than without this change, all changes before it made.
        peak_bytes: the peak with this change and all before it.
    """

    settings: dict[str, Any]
    costs: str
    saves_bytes: int
    peak_bytes: int

    @property
    def lines(self) -> list[str]:
        """The change as `section.key=value`, which the command line takes as they are."""
        return [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.settings.items()
        ]


def what_to_change(config: RunConfig, budget_bytes: int, estimate: Estimate) -> list[Change]:
    """Changes, cheapest first, up to the one with which the run fits; empty where it fits as it is.

    Args:
        config: the run.
        budget_bytes: memory that there is.
        estimate: the memory of a run; called once or more for each change.
    """
    changes: list[Change] = []
    peak = estimate(config).peak_bytes
    while peak > budget_bytes:
        # From the top each time: what did not help before may be what holds the peak now.
        for settings, costs in _candidates(config, budget_bytes, estimate):
            changed = apply(config, settings)
            lower = estimate(changed).peak_bytes
            if lower < peak:
                changes.append(Change(settings, costs, peak - lower, lower))
                config, peak = changed, lower
                break
        else:
            break
    return changes


def apply(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The run with dotted keys set."""
    values = config.model_dump()
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (values[section] if section else values)[leaf] = value
    return RunConfig.model_validate(values)


def _candidates(config: RunConfig, budget_bytes: int, estimate: Estimate) -> Iterator[tuple[dict[str, Any], str]]:
    """Every change that is still open, the cheapest first."""
    training = config.training
    if config.data.eval and int(training_argument(training, "per_device_eval_batch_size")) > 1:
        yield {"training.per_device_eval_batch_size": 1}, "slower evaluation"
    batch = int(training_argument(training, "per_device_train_batch_size"))
    if batch > 1:
        accumulation = batch * int(training_argument(training, "gradient_accumulation_steps"))
        split = {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": accumulation}
        yield split, "smaller products, slower; the same tokens a step"
    if not uses_checkpointing(training):
        yield {"training.gradient_checkpointing": True}, "about a third more compute"
    for key, value, least, costs in (
        ("data.max_length", config.data.max_length, MIN_LENGTH, "longer rows are cut"),
        ("lora.r", config.lora.r, MIN_RANK, "a smaller adapter"),
    ):
        halved = value
        while halved // 2 >= least:
            halved //= 2
            if estimate(apply(config, {key: halved})).peak_bytes <= budget_bytes:
                break
        if halved < value:
            yield {key: halved}, costs
