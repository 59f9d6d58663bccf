"""How many of a step's micro-batches run as one.

Sequences of a concatenated batch do not interact, and the loss is summed over a step's label tokens before it is
divided. So a step's micro-batches can run as one larger batch, and each expert's weights are dequantized once for all
of them. `train/merging.py` says where that would not be the same step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expertune.config import RunConfig
from expertune.train.arguments import ACCUMULATION, BATCH_SIZE, training_argument
from expertune.train.merging import Traits, why_separate

# How much of the budget merged micro-batches may fill. The peak is an estimate: a run that would have gone through must
# not run out of memory for the sake of speed.
MERGED_SHARE = 0.9

# Tokens after which merging stops, by the bound that the plan counts with. On a CPU a step is no faster in batches of
# 2560 tokens than of 640, and a fifth slower in batches of 10,240. Not measured on CUDA, where only memory limits it.
MERGED_TOKENS = {"cpu": 8192}


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

    def line(self, processes: int) -> str | None:
        """What became of the run file's accumulation, in a sentence; None where it accumulates nothing.

        Args:
            processes: how many share the examples of a step.
        """
        if self.accumulation * self.merged == 1:
            return None
        share = "examples a step" if processes == 1 else "examples of a step on each process"
        line = f"{self.rows * self.accumulation} {share}, run as {self.accumulation} x {self.rows}"
        if self.merged > 1:
            line += f" in place of {self.accumulation * self.merged} x {self.rows // self.merged}"
        return f"{line}: {self.reason}" if self.reason else line

    def apply(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """The run file's `training:` section with batch size and accumulation as they run."""
        return {**training, BATCH_SIZE: self.rows, ACCUMULATION: self.accumulation}


def choose_micro_batch(
    config: RunConfig,
    traits: Traits,
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
        traits: of the model.
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
    if reason := why_separate(config, traits):
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
