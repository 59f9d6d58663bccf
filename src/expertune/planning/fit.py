"""What fits: how many of a step's micro-batches run as one, and what to give up when a run does not fit at all.

Rows of a concatenated batch know nothing of each other, and the loss is summed over a step's label tokens before it is
divided. So a step's micro-batches can run as one larger batch, and each expert's weights are decoded once for all of
them; where that would not be the same step, `_why_apart` says so.

Changes that make a run fit come the cheapest first, which means what costs the result least, and of those that cost it
nothing what costs the least time. A smaller working set and smaller batches change nothing but time; recomputing layers
costs about a third more compute; what waits in the host's memory or on the disk has to be brought; shorter rows cut
data; a smaller rank changes what can be learnt.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from transformers import PreTrainedModel

from expertune.config import RunConfig
from expertune.kernels.routes import default_working_set_bytes
from expertune.planning.memory import Memory
from expertune.planning.settings import training_argument, uses_checkpointing

# Below these, a run is no longer the one that was asked for.
MIN_LENGTH = 128
MIN_RANK = 4

# Working sets of an expert layer that are offered: one that costs little, and one that is the last before something
# has to be brought from elsewhere. Below it saves little and costs much.
_WORKING_SET, _LEAST_WORKING_SET = ("512MiB", 2**29), ("128MiB", 2**27)

# How much of the budget merged micro-batches may fill. The peak is an estimate: a run that would have gone through must
# not run out of memory for the sake of speed.
MERGED_SHARE = 0.9

# Tokens after which merging stops, by the bound that the plan counts with. On a CPU a step is no faster in batches of
# 2560 tokens than of 640, and a fifth slower in batches of 10,240. Not measured on CUDA, where only memory limits it.
MERGED_TOKENS = {"cpu": 8192}

ROWS = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"

# Rotary embeddings whose frequencies depend on the longest row of the batch.
_BATCH_WIDE_ROPE = {"dynamic", "longrope"}

Estimate = Callable[[RunConfig], Memory]


@dataclass(frozen=True)
class MicroBatch:
    """How the rows of an optimizer step run.

    Attributes:
        rows: rows (packs, with `packing: packed`) of a micro-batch as it runs.
        accumulation: micro-batches of a step as it runs.
        merged: how many of the run file's micro-batches are one of these; 1 where none are merged.
        reason: why no more are merged; None where a step is one micro-batch.
    """

    rows: int
    accumulation: int
    merged: int = 1
    reason: str | None = None

    @property
    def line(self) -> str | None:
        """What became of the run file's accumulation, in a sentence; None where it accumulates nothing."""
        if self.accumulation * self.merged == 1:
            return None
        line = f"{self.rows * self.accumulation} rows a step, run as {self.accumulation} x {self.rows}"
        if self.merged > 1:
            line += f" in place of {self.accumulation * self.merged} x {self.rows // self.merged}"
        return f"{line}: {self.reason}" if self.reason else line

    def apply(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """The run file's `training:` section with batch size and accumulation as they run."""
        return {**training, ROWS: self.rows, ACCUMULATION: self.accumulation}


def choose_micro_batch(
    config: RunConfig,
    model: PreTrainedModel,
    device: str,
    budget_bytes: int,
    estimate: Estimate,
    began_with: int | None = None,
) -> MicroBatch:
    """Merge as many of a step's micro-batches as the memory allows and the device gains by.

    Every step sees the rows that it would see otherwise, in their order, and has the same loss and gradients up to the
    rounding of sums; so only divisors of the accumulation are looked at.

    Args:
        config: the run.
        model: the model; may be on the meta device.
        device: `cpu` or `cuda`, where it is to run.
        budget_bytes: memory that there is.
        estimate: the memory of a run.
        began_with: how many were merged before the run was interrupted. As many are again, to the byte the same step,
            or fewer where they would no longer fit; None for a run that begins.
    """
    rows = int(training_argument(config.training, ROWS))
    accumulation = int(training_argument(config.training, ACCUMULATION))
    if accumulation <= 1:
        return MicroBatch(rows, accumulation)
    if reason := _why_apart(config, model):
        return MicroBatch(rows, accumulation, 1, reason)
    most = accumulation if began_with is None else began_with
    reason = None if most == accumulation else "as the run began"
    for merged in (count for count in range(most, 1, -1) if accumulation % count == 0):
        tried = MicroBatch(rows * merged, accumulation // merged, merged, reason)
        gains = tried.rows * config.data.max_length <= MERGED_TOKENS.get(device, float("inf"))
        if not gains and merged != began_with:
            reason = f"beyond {MERGED_TOKENS[device]} tokens a batch gains nothing on this device"
            continue
        peak = estimate(config.model_copy(update={"training": tried.apply(config.training)})).peak_bytes
        allowed = budget_bytes if merged == began_with else int(MERGED_SHARE * budget_bytes)
        if peak <= allowed:
            return tried
        reason = f"{tried.rows} rows at once would take {peak / 1e9:.2f} GB, more than {allowed / 1e9:.2f} GB"
        if began_with is not None:
            reason += f"; the run began with {rows * began_with}, and continues to rounding, not to the byte"
    return MicroBatch(rows, accumulation, 1, reason)


def _why_apart(config: RunConfig, model: PreTrainedModel) -> str | None:
    """Why this run's micro-batches stay apart: merged, its steps would be others. None where they may be merged."""
    training, text_config = config.training, model.config.get_text_config()
    reasons = {
        "data.merge_accumulation is false": not config.data.merge_accumulation,
        "data.packing=padded runs as it is written": config.data.packing == "padded",
        "training.dataloader_drop_last would drop more rows": training.get("dataloader_drop_last"),
        "training.auto_find_batch_size looks for a size by itself": training.get("auto_find_batch_size"),
        "training.neftune_noise_alpha scales noise by a batch's tokens": training.get("neftune_noise_alpha"),
        "training.train_sampling_strategy=batch_rebalance deals rows to micro-batches by length": (
            training.get("train_sampling_strategy") == "batch_rebalance"
        ),
        "training.optim steps at every micro-batch": "lomo" in str(training.get("optim", "")).lower(),
        "the router's auxiliary loss (output_router_logits) is not the same over more rows": getattr(
            text_config, "output_router_logits", False
        ),
        "the model takes its loss over a micro-batch's label tokens, not over the step's": not _normalises(model),
        "the model does not attend to each row by itself": not _attends_by_row(model),
        "the model's rotary embedding depends on a batch's longest row": bool(
            _rope_types(getattr(text_config, "rope_parameters", None)) & _BATCH_WIDE_ROPE
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _normalises(model: PreTrainedModel) -> bool:
    """Whether the loss is divided by the label tokens of the whole step: what transformers' Trainer asks a model."""
    accepts: bool | None = getattr(model, "accepts_loss_kwargs", None)
    if accepts is not None:
        return accepts
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _attends_by_row(model: PreTrainedModel) -> bool:
    """Whether every layer is plain attention that costs per row.

    A window takes a mask over the whole batch, and the state of linear attention or a convolution runs on from one row
    into the next.
    """
    text_config = model.config.get_text_config()
    if not getattr(model, "_supports_sdpa", False) or getattr(model, "_is_stateful", False):
        return False
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        return set(layer_types) == {"full_attention"}
    return not getattr(text_config, "sliding_window", None)


def _rope_types(parameters: Any) -> set[str]:
    """Kinds of rotary embedding; some configs hold one for each type of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values() if isinstance(value, dict)]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


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


def merged(changes: Sequence[Change]) -> dict[str, Any]:
    """The settings of all changes together; of a key that is changed twice, the last."""
    return {key: value for change in changes for key, value in change.settings.items()}


def what_to_change(
    config: RunConfig, budget_bytes: int, estimate: Estimate, device: str = "cuda", elsewhere: str | None = None
) -> list[Change]:
    """Changes, cheapest first, up to the one with which the run fits; empty where it fits as it is.

    Args:
        config: the run.
        budget_bytes: memory that there is.
        estimate: the memory of a run; called once or more for each change.
        device: `cpu` or `cuda`, where it is to run.
        elsewhere: where experts can wait that do not fit: `host`, `disk`, or None.
    """
    changes: list[Change] = []
    peak = estimate(config).peak_bytes
    while peak > budget_bytes:
        # From the top each time: what did not help before may be what holds the peak now.
        for settings, costs in _candidates(config, budget_bytes, estimate, device, elsewhere):
            changed = apply(config, settings)
            lower = estimate(changed).peak_bytes
            if lower < peak:
                changes.append(Change(settings, costs, peak - lower, lower))
                config, peak = changed, lower
                break
        else:
            break
    return changes


def apply(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The run with dotted keys set."""
    values = config.model_dump()
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (values[section] if section else values)[leaf] = value
    return RunConfig.model_validate(values)


def _candidates(
    config: RunConfig, budget_bytes: int, estimate: Estimate, device: str = "cuda", elsewhere: str | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Every change that is still open, the cheapest first."""
    training = config.training

    def first_that_fits(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of changes that save ever more, the first that makes the run fit, or the last."""
        fitting = (each for each in changes if estimate(apply(config, each)).peak_bytes <= budget_bytes)
        return next(fitting, changes[-1])

    held = config.kernels.working_set_bytes or default_working_set_bytes(device)
    if held > _WORKING_SET[1]:
        yield {"kernels.working_set": _WORKING_SET[0]}, "fewer tokens at a time, slower; the same step"
    rows = int(training_argument(training, "per_device_eval_batch_size"))
    if config.data.eval and rows > 1:
        key = "training.per_device_eval_batch_size"
        yield first_that_fits([{key: smaller} for smaller in _halves(rows, 1)]), "slower evaluation"
    batch, accumulation = int(training_argument(training, ROWS)), int(training_argument(training, ACCUMULATION))
    splits = [
        {f"training.{ROWS}": rows, f"training.{ACCUMULATION}": accumulation * (batch // rows)}
        for rows in range(batch - 1, 0, -1)
        if batch % rows == 0
    ]
    if splits:
        yield first_that_fits(splits), "smaller products, slower; the same tokens a step"
    if not uses_checkpointing(training):
        yield {"training.gradient_checkpointing": True}, "about a third more compute"
    if held > _LEAST_WORKING_SET[1]:
        yield {"kernels.working_set": _LEAST_WORKING_SET[0]}, "fewer tokens at a time, much slower; the same step"
    if device != "cpu" and not config.offload_activations:
        yield {"offload_activations": True}, "activations are copied to the host and back"
    if config.placement in ("device", "host") and elsewhere not in (None, config.placement):
        costs = "experts are brought from the host for each layer" if elsewhere == "host" else "experts are read anew"
        yield {"placement": elsewhere}, costs
    for key, value, least, costs in (
        ("data.max_length", config.data.max_length, MIN_LENGTH, "longer rows are cut"),
        ("lora.r", config.lora.r, MIN_RANK, "a smaller adapter"),
    ):
        if halves := [{key: smaller} for smaller in _halves(value, least)]:
            yield first_that_fits(halves), costs


def _halves(value: int, least: int) -> list[int]:
    """Half of it, half of that, and so on, while that is at least `least`."""
    halves = []
    while (value := value // 2) >= least:
        halves.append(value)
    return halves
