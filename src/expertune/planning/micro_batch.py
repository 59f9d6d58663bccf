"""How many of a step's micro-batches run as one.

Sequences of a concatenated batch do not interact, and the loss is summed over a step's label tokens before it is
divided. So a step's micro-batches can run as one larger batch, and each expert's weights are dequantized once for all
of them. `_why_separate` says where that would not be the same step.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from expertune.config import RunConfig
from expertune.planning.settings import ACCUMULATION, BATCH_SIZE, training_argument

# How much of the budget merged micro-batches may fill. The peak is an estimate: a run that would have gone through must
# not run out of memory for the sake of speed.
MERGED_SHARE = 0.9

# Tokens after which merging stops, by the bound that the plan counts with. On a CPU a step is no faster in batches of
# 2560 tokens than of 640, and a fifth slower in batches of 10,240. Not measured on CUDA, where only memory limits it.
MERGED_TOKENS = {"cpu": 8192}

# Rotary embeddings whose frequencies depend on the longest sequence of the batch.
_BATCH_WIDE_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class MicroBatch:
    """How the examples of an optimizer step run.

    Attributes:
        rows: examples (packs, with `packing: packed`) of a micro-batch as it runs.
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
        line = f"{self.rows * self.accumulation} examples a step, run as {self.accumulation} x {self.rows}"
        if self.merged > 1:
            line += f" in place of {self.accumulation * self.merged} x {self.rows // self.merged}"
        return f"{line}: {self.reason}" if self.reason else line

    def apply(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """The run file's `training:` section with batch size and accumulation as they run."""
        return {**training, BATCH_SIZE: self.rows, ACCUMULATION: self.accumulation}


def choose_micro_batch(
    config: RunConfig,
    model: PreTrainedModel,
    device: str,
    budget_bytes: int,
    peak_of: Callable[[RunConfig], int],
    previously_merged: int | None = None,
) -> MicroBatch:
    """Merge as many of a step's micro-batches as the memory allows and the device gains by.

    Every step sees the examples that it would see otherwise, in their order, and has the same loss and gradients up to
    the rounding of sums; so only divisors of the accumulation are looked at.

    Args:
        config: the run.
        model: the model; may be on the meta device.
        device: `cpu` or `cuda`, where it is to run.
        budget_bytes: memory that there is.
        peak_of: the peak memory of a run.
        previously_merged: how many were merged before the run was interrupted. As many are merged again, which gives
            the same bytes, or fewer where they would no longer fit; None for a new run.
    """
    batch = int(training_argument(config.training, BATCH_SIZE))
    accumulation = int(training_argument(config.training, ACCUMULATION))
    if accumulation <= 1:
        return MicroBatch(batch, accumulation)
    if reason := _why_separate(config, model):
        return MicroBatch(batch, accumulation, 1, reason)
    most = accumulation if previously_merged is None else previously_merged
    reason = None if most == accumulation else "as the run started"
    for merged in (count for count in range(most, 1, -1) if accumulation % count == 0):
        tried = MicroBatch(batch * merged, accumulation // merged, merged, reason)
        gains = tried.rows * config.data.max_length <= MERGED_TOKENS.get(device, float("inf"))
        if not gains and merged != previously_merged:
            reason = f"beyond {MERGED_TOKENS[device]} tokens a batch gains nothing on this device"
            continue
        peak = peak_of(config.model_copy(update={"training": tried.apply(config.training)}))
        allowed = budget_bytes if merged == previously_merged else int(MERGED_SHARE * budget_bytes)
        if peak <= allowed:
            return tried
        reason = f"{tried.rows} examples at once would take {peak / 1e9:.2f} GB, more than {allowed / 1e9:.2f} GB"
        if previously_merged is not None:
            started_with = batch * previously_merged
            reason += f"; the run started with {started_with}, and continues to rounding, not to the byte"
    return MicroBatch(batch, accumulation, 1, reason)


def _why_separate(config: RunConfig, model: PreTrainedModel) -> str | None:
    """Why micro-batches stay separate: merged, their steps would be others. None where they may be merged."""
    training, text_config = config.training, model.config.get_text_config()
    reasons = {
        "data.merge_accumulation is false": not config.data.merge_accumulation,
        "data.packing=padded runs as it is written": config.data.packing == "padded",
        "training.dataloader_drop_last would drop more examples": training.get("dataloader_drop_last"),
        "training.auto_find_batch_size looks for a size by itself": training.get("auto_find_batch_size"),
        "training.neftune_noise_alpha scales noise by a batch's tokens": training.get("neftune_noise_alpha"),
        "training.train_sampling_strategy=batch_rebalance deals examples to micro-batches by length": (
            training.get("train_sampling_strategy") == "batch_rebalance"
        ),
        "training.optim steps at every micro-batch": "lomo" in str(training.get("optim", "")).lower(),
        "the router's auxiliary loss (output_router_logits) is not the same over more examples": getattr(
            text_config, "output_router_logits", False
        ),
        "the model takes its loss over a micro-batch's label tokens, not over the step's": not _normalizes(model),
        "the model does not attend to each sequence by itself": not _attends_by_sequence(model),
        "the model's rotary embedding depends on a batch's longest sequence": bool(
            _rope_types(getattr(text_config, "rope_parameters", None)) & _BATCH_WIDE_ROPE
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _normalizes(model: PreTrainedModel) -> bool:
    """Whether the loss is divided by the label tokens of the whole step: what transformers' Trainer asks a model."""
    accepts: bool | None = getattr(model, "accepts_loss_kwargs", None)
    if accepts is not None:
        return accepts
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _attends_by_sequence(model: PreTrainedModel) -> bool:
    """Whether every layer is plain attention, whose cost is by sequence.

    A window takes a mask over the whole batch, and the state of linear attention or a convolution runs on from one
    sequence into the next.
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
