"""Whether micro-batches of a step may run as one: only where that is the same step."""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expertune.config import RunConfig
from expertune.objectives.units import aux_coefficient, why_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rotary embeddings whose frequencies depend on the longest sequence of the batch.
_BATCH_WIDE_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Traits:
    """What of a model decides whether micro-batches may run as one.

    Attributes:
        output_router_logits: of its text config, which then has the model take its own auxiliary loss.
        router_aux_loss_coef: of its text config.
        normalizes: its loss is divided by the label tokens of the whole step.
        attends_by_sequence: every layer is plain attention, whose cost is by sequence.
        rotates_by_batch: its rotary embedding depends on the longest sequence of a batch.
    """

    output_router_logits: bool
    router_aux_loss_coef: float | None
    normalizes: bool
    attends_by_sequence: bool
    rotates_by_batch: bool

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Traits":
        """Those of a model, which may be on the meta device."""
        text_config = model.config.get_text_config()
        return cls(
            output_router_logits=bool(getattr(text_config, "output_router_logits", False)),
            router_aux_loss_coef=getattr(text_config, "router_aux_loss_coef", None),
            normalizes=_normalizes(model),
            attends_by_sequence=_attends_by_sequence(model),
            rotates_by_batch=bool(_rope_types(getattr(text_config, "rope_parameters", None)) & _BATCH_WIDE_ROPE),
        )


def why_separate(config: RunConfig, traits: Traits) -> str | None:
    """Why micro-batches stay separate: merged, their steps would be others. None where they may be merged."""
    training = config.training
    reasons = {
        "data.merge_accumulation is false": not config.data.merge_accumulation,
        "data.packing=padded runs as it is written": config.data.packing == "padded",
        "training.dataloader_drop_last would drop more examples": training.get("dataloader_drop_last"),
        "training.auto_find_batch_size looks for a size by itself": training.get("auto_find_batch_size"),
        "training.train_sampling_strategy=batch_rebalance deals examples to micro-batches by length": (
            training.get("train_sampling_strategy") == "batch_rebalance"
        ),
        "training.optim steps at every micro-batch": "lomo" in str(training.get("optim", "")).lower(),
        "the router's auxiliary loss (output_router_logits) is not the same over more examples": (
            traits.output_router_logits and aux_coefficient(config, traits) is None
        ),
        "the model takes its loss over a micro-batch's label tokens, not over the step's": not traits.normalizes,
        "the model does not attend to each sequence by itself": not traits.attends_by_sequence,
        "the model's rotary embedding depends on a batch's longest sequence": traits.rotates_by_batch,
    }
    return why_whole(config) or next((reason for reason, holds in reasons.items() if holds), None)


def _normalizes(model: "PreTrainedModel") -> bool:
    """Whether the loss is divided by the label tokens of the whole step: what transformers' Trainer asks a model."""
    accepts: bool | None = getattr(model, "accepts_loss_kwargs", None)
    if accepts is not None:
        return accepts
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _attends_by_sequence(model: "PreTrainedModel") -> bool:
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
