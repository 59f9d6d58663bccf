"""What of an objective's step is one, and may not be computed in parts or put together with others.

Read from the run file alone: the plan asks, before anything that computes is imported.
"""

from typing import Any

from expertune.config import RunConfig
from expertune.config.trl_keys import loss_types

# Of TRL's losses over pairs, those that are not the mean of what each pair gives by itself.
_OVER_A_BATCH = {"aot", "aot_unpaired", "sft"}


def why_whole(config: RunConfig) -> str | None:
    """Why micro-batches in parts, or put together, would be another step; None where only examples are indivisible."""
    training = config.training
    if config.objective == "grpo":
        return "GRPO compares the answers of a group, and takes its loss over a micro-batch of them"
    if config.objective == "orpo":
        return "ORPO takes its cross entropy over a micro-batch's tokens"
    if takes_kl(config):
        return "KTO takes its KL term over a micro-batch"
    if found := _OVER_A_BATCH & set(loss_types(training)):
        return f"the loss {min(found)} is over a micro-batch, not over its pairs one by one"
    if training.get("router_aux_loss_coef"):
        return "the router's auxiliary loss (router_aux_loss_coef) is not the sum of its parts"
    return None


def takes_kl(config: RunConfig) -> bool:
    """Whether the loss has a term over all examples of a micro-batch."""
    return config.objective == "kto" and config.training.get("loss_type", "kto") == "kto"


def keeps_start(config: RunConfig) -> bool:
    """Whether the loss has a reference that is not the base model: the adapter that training starts from, kept."""
    compares = config.objective in ("dpo", "kto") or (config.objective == "grpo" and bool(config.training.get("beta")))
    return compares and not config.lora.begins_as_base


def aux_coefficient(config: RunConfig, text_config: Any) -> float | None:
    """Coefficient of the load-balancing loss where this project takes it; None where it is left to the model.

    Args:
        config: the run.
        text_config: of the model, or what it says of these losses (`expertune.train.merging.Traits`).
    """
    if config.objective != "sft":
        return None
    if config.router.aux_loss != "auto":
        return config.router.aux_loss
    if not getattr(text_config, "output_router_logits", False):
        return 0.0
    return getattr(text_config, "router_aux_loss_coef", None)
