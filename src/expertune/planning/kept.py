"""How many expert layers keep gate and up from forward for backward, in memory that is free.

Backward needs what the first GEMM of an expert layer gave, and computes it again unless the layer keeps it: two of the
eight products with an expert's weights. It is decided last, of memory that nothing else asks for: no micro-batch is
smaller for it, no layer is offloaded, and mapped files find room in the page cache first.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from expertune.planning.layer_memory import gate_up
from expertune.planning.placement import PlannedPlacement
from expertune.planning.settings import Workload
from expertune.text import format_size

# Of the memory that a run leaves free, what `kernels.keep: auto` may take. The plan's budget is what is free when it is
# made: other programs may need some of it later.
AUTO_SHARE = 0.5


@dataclass(frozen=True)
class KeptLayers:
    """Expert layers that keep gate and up.

    Attributes:
        layers: how many do, the first ones.
        of_layers: expert layers that the model has.
        num_bytes: what they keep of a micro-batch.
        peak_bytes_without: the run's peak if none did.
        reason: why no more do; None where all do.
    """

    layers: int
    of_layers: int
    num_bytes: int
    peak_bytes_without: int
    reason: str | None = None

    @property
    def line(self) -> str | None:
        """The same in a sentence; None where none does."""
        if not self.layers:
            return None
        which = "all" if self.layers == self.of_layers else f"{self.layers} of"
        return (
            f"gate and up of {which} {self.of_layers} expert layers for backward, {format_size(self.num_bytes)} that "
            "would be free otherwise; this saves a quarter of their products. kernels.keep: 0 keeps none"
        )


def choose_kept(
    w: Workload,
    placement: PlannedPlacement,
    most_bytes: int | None,
    budget_bytes: int,
    peak_of: Callable[[Workload], int],
    previously: int | None = None,
) -> KeptLayers:
    """As many layers as fit into the memory that a run leaves free.

    Args:
        w: the run, in the micro-batches that it has.
        placement: where its experts are held.
        most_bytes: most that is kept; None takes `AUTO_SHARE` of what is free.
        budget_bytes: memory that there is.
        peak_of: the peak memory of a run in this placement.
        previously: how many layers kept them before the run was interrupted. As many do again, which gives the same
            bytes, or fewer where that would no longer fit; None for a new run.
    """
    peak, kept = peak_of(w), list(accumulate(gate_up(w)))
    if why_not := _why_nothing(w):
        return KeptLayers(0, len(kept), 0, peak, why_not)
    free, most = budget_bytes - peak, len(kept)
    reason = None
    if previously is not None:
        most, reason = min(previously, most), "as the run started"
    else:
        free -= placement.offloaded_bytes  # they are read through the page cache, which has only what is free
        if most_bytes is None:
            free = int(AUTO_SHARE * free)
        else:
            most, reason = bisect_right(kept, most_bytes), f"kernels.keep is {format_size(most_bytes)}"

    def taken(layers: int) -> int:
        return max(kept[layers - 1], peak_of(replace(w, kept_layers=layers)) - peak)

    layers = bisect_right(range(1, most + 1), free, key=taken)  # the peak rises with each layer
    if layers < most:
        what = "half of what is free" if previously is None and most_bytes is None else "what is free"
        reason = f"{layers + 1} would take more than {what}, {format_size(max(free, 0))}"
        if previously is not None:
            reason += f"; the run started with {previously}, and continues to rounding, not to the byte"
    return KeptLayers(layers, len(kept), sum(gate_up(w)[:layers]), peak, None if layers == len(kept) else reason)


def _why_nothing(w: Workload) -> str | None:
    """Why a layer keeps nothing even if it is told to; None where it does."""
    if w.device != "cpu":
        return "on a GPU they are computed again"
    if w.compute_dtype == torch.float16:
        return "in float16, which has no room for all of their numbers, they are computed again"
    return "with DoRA they are computed again" if w.targets.use_dora else None
