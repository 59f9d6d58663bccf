"""The experts that a run's adapter is on, where not all of them are: selected once, and kept in the run's record."""

from torch import nn

from expertune.adapt.selection import SAMPLE_TOKENS, score_experts
from expertune.config import ExpertsSection, LoraSection
from expertune.report.values import selected_experts
from expertune.run.context import RunContext
from expertune.run.inputs import Inputs, sample_batches
from expertune.train.oom import OutOfMemory


def with_selected_experts(context: RunContext, model: nn.Module, inputs: Inputs, recovery: OutOfMemory) -> LoraSection:
    """The adapter's section with the experts of each layer; all ranks call this.

    Args:
        context: the run. A record that has a selection keeps it.
        model: the base model, before an adapter is attached.
        inputs: the training examples that the experts are scored by.
        recovery: what is done when memory runs out.

    Raises:
        ConfigError: there are too few tokens to score the experts by.
    """
    lora, record = context.config.lora, context.record
    if not lora.selects or (lora.experts and lora.experts.layers):
        return lora
    kept = record.section("adapter").get("selection")
    if kept is None:
        with record.phase("selection"), context.bars.task("selecting experts"):
            scores = recovery.retry(
                "preflight", lambda: score_experts(model, sample_batches(context, inputs, SAMPLE_TOKENS))
            )
            # Of several ranks, whose arithmetic may differ in the last bit, one decides.
            kept = context.ranks.share(lambda: scores.select(lora).to_json())
        record.update("adapter", selection=kept)
        context.notify(f"experts: {' '.join(selected_experts(kept))}")
    section = ExpertsSection(**{key: kept[key] for key in ExpertsSection.model_fields})
    return lora.model_copy(update={"experts": section})
