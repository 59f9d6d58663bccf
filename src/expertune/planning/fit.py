"""What makes a run fit that does not: changes that suffice alone, or else the fewest that do together.

Each is tried by planning the changed run. They stand in the order of what they cost: first what costs the result least,
and of changes that cost it nothing what costs the least time. A smaller working set and smaller batches cost only time;
checkpointing computes all but the experts once more; what is offloaded has to be transferred; shorter sequences cut
data; a smaller rank changes what can be learned.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from expertune.config import RunConfig
from expertune.kernels.amounts import default_working_set_bytes
from expertune.planning.settings import answered_at_once
from expertune.train.arguments import (
    ACCUMULATION,
    BATCH_SIZE,
    EVALUATION_BATCH_SIZE,
    training_argument,
    uses_checkpointing,
)

# Below these, a run is no longer the one that was asked for.
MIN_LENGTH = 128
MIN_RANK = 4

Settings = dict[str, Any]
"""Dotted key of a run file -> new value."""


@dataclass(frozen=True)
class Change:
    """One change to a run file.

    Attributes:
        settings: dotted key -> new value.
        costs: what is given up, in a few words.
        saves_bytes: how much lower the peak is than without this change, all changes before it made.
        peak_bytes: the peak with this change and all before it.
        first: a command that has to be run once before it; None where none has.
    """

    settings: Settings
    costs: str
    saves_bytes: int
    peak_bytes: int
    first: str | None = None

    @property
    def lines(self) -> list[str]:
        """The change as `section.key=value`, which the command line takes as they are."""
        return as_lines(self.settings)

    @property
    def yaml(self) -> str:
        """The change as lines of a run file."""
        return as_yaml(self.settings)


@dataclass(frozen=True)
class Advice:
    """What makes a run fit.

    Attributes:
        changes: the cheapest change that suffices alone; or changes that suffice together, each of them needed, where
            they cost less or nothing suffices alone; or where nothing does at all, all that lower the peak.
        alternatives: other changes that suffice alone, the cheapest first.
    """

    changes: tuple[Change, ...] = ()
    alternatives: tuple[Change, ...] = ()


def as_lines(settings: Mapping[str, Any]) -> list[str]:
    """Dotted keys as the command line takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Dotted keys as lines of a run file, each section once; keys of a section that is there already go into it."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return yaml.safe_dump(nested, sort_keys=False)


@dataclass(frozen=True)
class Room:
    """What a changed run may use.

    Attributes:
        budget_bytes: memory that there is.
        device: `cpu` or `cuda`, where it is to run.
        lower: where experts can be offloaded to: `host`, `disk`, or None.
        gains_by_quantizing: they could be offloaded to the disk if `expertune quantize` had written the model.
    """

    budget_bytes: int
    device: str
    lower: str | None
    gains_by_quantizing: bool


@dataclass(frozen=True)
class _Candidate:
    """A change that is still open: settings that save ever more, and what they cost."""

    ever_smaller: list[Settings]
    costs: str
    first: str | None = None


def find_advice(config: RunConfig, peak_of: Callable[[RunConfig], int], room: Room) -> Advice:
    """What makes a run fit; nothing where it fits as it is.

    Args:
        config: the run.
        peak_of: the peak memory of a run; called once or more for each change.
        room: what it may use.
    """
    peak = peak_of(config)
    if peak <= room.budget_bytes:
        return Advice()
    alone = []
    for candidate in _candidates(config, room):
        for settings in candidate.ever_smaller:
            if (changed := peak_of(_with(config, settings))) <= room.budget_bytes:
                alone.append(Change(settings, candidate.costs, peak - changed, changed, candidate.first))
                break
    changes = list(_one_after_another(config, peak_of, room))
    if changes and changes[-1].peak_bytes <= room.budget_bytes:
        changes = _needed(config, changes, peak_of, room.budget_bytes)
    if not alone:
        return Advice(tuple(changes))
    order = [candidate.costs for candidate in _candidates(config, room)]
    if max(order.index(change.costs) for change in changes) < order.index(alone[0].costs):
        return Advice(tuple(changes), tuple(alone))
    return Advice((alone[0],), tuple(alone[1:]))


def _one_after_another(config: RunConfig, peak_of: Callable[[RunConfig], int], room: Room) -> Iterator[Change]:
    """Changes, cheapest first, up to the one with which the run fits."""
    peak = peak_of(config)
    while peak > room.budget_bytes:
        # From the first one each time: what did not help before may be what holds the peak now.
        for candidate in _candidates(config, room):
            settings, changed, changed_peak = candidate.ever_smaller[0], config, peak
            for tried in candidate.ever_smaller:
                other = _with(config, tried)
                # Where none of them fits, the first that saves as much as the last: the rest would cost for nothing.
                if (other_peak := peak_of(other)) < changed_peak:
                    settings, changed, changed_peak = tried, other, other_peak
                if changed_peak <= room.budget_bytes:
                    break
            if changed_peak < peak:
                yield Change(settings, candidate.costs, peak - changed_peak, changed_peak, candidate.first)
                config, peak = changed, changed_peak
                break
        else:
            return


def _needed(
    config: RunConfig, changes: list[Change], peak_of: Callable[[RunConfig], int], budget_bytes: int
) -> list[Change]:
    """Those of some changes without which the run would not fit; of what is not needed the costliest goes first."""

    def run_with(some: list[Change]) -> RunConfig:
        return _with(config, {key: value for change in some for key, value in change.settings.items()})

    for change in reversed(changes):
        others = [other for other in changes if other is not change]
        if peak_of(run_with(others)) <= budget_bytes:
            changes = others
    peaks = [peak_of(run_with(changes[:count])) for count in range(len(changes) + 1)]
    return [
        replace(change, saves_bytes=before - after, peak_bytes=after)
        for change, before, after in zip(changes, peaks, peaks[1:], strict=False)
    ]


def _candidates(config: RunConfig, room: Room) -> list[_Candidate]:
    """Every change that is still open, the cheapest first."""
    device, lower = room.device, room.lower
    working_set = config.kernels.working_set_bytes or default_working_set_bytes(device)
    evaluated, batch, accumulation = (
        int(training_argument(config.training, key)) for key in (EVALUATION_BATCH_SIZE, BATCH_SIZE, ACCUMULATION)
    )
    if not config.data.eval:
        evaluated = 0
    splits = [
        {f"training.{BATCH_SIZE}": smaller, f"training.{ACCUMULATION}": accumulation * (batch // smaller)}
        for smaller in range(batch - 1, 0, -1)
        if batch % smaller == 0
    ]
    checkpoints = [] if uses_checkpointing(config.training) else [{"training.gradient_checkpointing": True}]
    offloads = device != "cpu" and not config.offload_activations
    places = config.placement in ("device", "host") and lower not in (None, config.placement)
    origin = "copied from the host" if lower == "host" else "read from the disk"
    nf4 = nf4_name(config.model)
    quantizes = room.gains_by_quantizing and config.model != nf4
    candidates = [
        # One that costs little, and below, one that is the last before something has to be offloaded.
        _Candidate(_working_set("512MiB", 2**29, working_set), "fewer tokens at a time, slower; the same step"),
        _Candidate(
            _halves(f"training.{EVALUATION_BATCH_SIZE}", evaluated if config.data.eval else 0, 1), "slower evaluation"
        ),
        _Candidate(_halves("task.batch_size", answered_at_once(config), 1), "slower answers"),
        _Candidate(splits, "smaller products, slower; the same tokens a step"),
        _Candidate(checkpoints, "all but the experts is computed again in backward"),
        _Candidate(_working_set("128MiB", 2**27, working_set), "fewer tokens at a time, much slower; the same step"),
        _Candidate([{"offload_activations": True}] if offloads else [], "activations are copied to the host and back"),
        _Candidate([{"placement": lower}] if places else [], f"experts are {origin} for each layer"),
        _Candidate(
            [{"model": nf4, "placement": "disk"}] if quantizes else [],
            "experts are read from the disk for each layer; with placement: auto, those that do not fit",
            shlex.join(["expertune", "quantize", config.model, nf4]),
        ),
        _Candidate(_halves("data.max_length", config.data.max_length, MIN_LENGTH), "longer sequences are cut"),
        # One that the run starts from has its rank.
        _Candidate([] if config.lora.init_from else _halves("lora.r", config.lora.r, MIN_RANK), "a smaller adapter"),
    ]
    return [candidate for candidate in candidates if candidate.ever_smaller]


def nf4_name(model: str) -> str:
    """The folder that messages have `expertune quantize` write of a model."""
    name = model.rstrip("/").rpartition("/")[2]
    return name if name.endswith("-nf4") else f"{name}-nf4"


def _working_set(size: str, num_bytes: int, now: int) -> list[Settings]:
    return [{"kernels.working_set": size}] if now > num_bytes else []


def _halves(key: str, value: int, least: int) -> list[Settings]:
    """The key at half of its value, half of that, and so on, while that is at least `least`."""
    halves: list[Settings] = []
    while (value := value // 2) >= least:
        halves.append({key: value})
    return halves


def _with(config: RunConfig, settings: Settings) -> RunConfig:
    """The run with dotted keys set."""
    values = config.model_dump()
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (values[section] if section else values)[leaf] = value
    return RunConfig.model_validate(values)
