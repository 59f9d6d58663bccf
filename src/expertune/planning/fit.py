"""What to change when a run does not fit, cheapest first.

Cheapest is what costs the result least, and of changes that cost it nothing what costs the least time. A smaller
working set and smaller batches cost only time; recomputing layers costs about a third more compute; what is offloaded
has to be transferred; shorter sequences cut data; a smaller rank changes what can be learned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from expertune.config import RunConfig
from expertune.kernels.routes import default_working_set_bytes
from expertune.planning.micro_batch import ACCUMULATION, BATCH_SIZE, Estimate
from expertune.planning.settings import answered_at_once, training_argument, uses_checkpointing, writes_answers

# Below these, a run is no longer the one that was asked for.
MIN_LENGTH = 128
MIN_RANK = 4

# Working sets of an expert layer that are offered: one that costs little, and one that is the last before something
# has to be offloaded. Below it saves little and costs much.
_WORKING_SET, _LEAST_WORKING_SET = ("512MiB", 2**29), ("128MiB", 2**27)


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

    @property
    def yaml(self) -> str:
        """The change as lines of a run file."""
        return as_yaml(self.settings)


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Dotted keys as lines of a run file, each section once; keys of a section that is there already go into it."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return yaml.safe_dump(nested, sort_keys=False)


@dataclass(frozen=True)
class Fitting:
    """Looks for changes with which runs fit.

    Attributes:
        budget_bytes: memory that there is.
        estimate: the memory of a run; called once or more for each change.
        device: `cpu` or `cuda`, where it is to run.
        lower: where experts can be offloaded to: `host`, `disk`, or None.
    """

    budget_bytes: int
    estimate: Estimate
    device: str
    lower: str | None

    def changes(self, config: RunConfig) -> Iterator[Change]:
        """Changes, cheapest first, up to the one with which the run fits; none where it fits as it is."""
        peak = self.estimate(config).peak_bytes
        while peak > self.budget_bytes:
            # From the first one each time: what did not help before may be what holds the peak now.
            for settings, costs in self._candidates(config):
                changed = apply(config, settings)
                lower = self.estimate(changed).peak_bytes
                if lower < peak:
                    yield Change(settings, costs, peak - lower, lower)
                    config, peak = changed, lower
                    break
            else:
                break

    def _candidates(self, config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
        """Every change that is still open, the cheapest first."""
        training = config.training
        working_set = config.kernels.working_set_bytes or default_working_set_bytes(self.device)
        if working_set > _WORKING_SET[1]:
            yield {"kernels.working_set": _WORKING_SET[0]}, "fewer tokens at a time, slower; the same step"
        eval_batch = int(training_argument(training, "per_device_eval_batch_size"))
        if config.data.eval and eval_batch > 1:
            key = "training.per_device_eval_batch_size"
            yield self._first_that_fits(config, _halves(key, eval_batch, 1)), "slower evaluation"
        if writes_answers(config) and (answered := answered_at_once(config)) > 1:
            yield self._first_that_fits(config, _halves("task.batch_size", answered, 1)), "slower answers"
        batch, accumulation = (int(training_argument(training, key)) for key in (BATCH_SIZE, ACCUMULATION))
        if splits := [
            {f"training.{BATCH_SIZE}": smaller, f"training.{ACCUMULATION}": accumulation * (batch // smaller)}
            for smaller in range(batch - 1, 0, -1)
            if batch % smaller == 0
        ]:
            yield self._first_that_fits(config, splits), "smaller products, slower; the same tokens a step"
        if not uses_checkpointing(training):
            yield {"training.gradient_checkpointing": True}, "about a third more compute"
        if working_set > _LEAST_WORKING_SET[1]:
            costs = "fewer tokens at a time, much slower; the same step"
            yield {"kernels.working_set": _LEAST_WORKING_SET[0]}, costs
        if self.device != "cpu" and not config.offload_activations:
            yield {"offload_activations": True}, "activations are copied to the host and back"
        if config.placement in ("device", "host") and self.lower not in (None, config.placement):
            origin = "copied from the host" if self.lower == "host" else "read from the disk"
            yield {"placement": self.lower}, f"experts are {origin} for each layer"
        for key, value, least, costs in (
            ("data.max_length", config.data.max_length, MIN_LENGTH, "longer sequences are cut"),
            ("lora.r", config.lora.r, MIN_RANK, "a smaller adapter"),
        ):
            if halves := _halves(key, value, least):
                yield self._first_that_fits(config, halves), costs

    def _first_that_fits(self, config: RunConfig, changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of changes that save ever more, the first that makes the run fit, or the last."""
        peaks = ((each, self.estimate(apply(config, each)).peak_bytes) for each in changes)
        return next((each for each, peak in peaks if peak <= self.budget_bytes), changes[-1])


def apply(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The run with dotted keys set."""
    values = config.model_dump()
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (values[section] if section else values)[leaf] = value
    return RunConfig.model_validate(values)


def _halves(key: str, value: int, least: int) -> list[dict[str, Any]]:
    """The key at half of its value, half of that, and so on, while that is at least `least`."""
    halves = []
    while (value := value // 2) >= least:
        halves.append({key: value})
    return halves
