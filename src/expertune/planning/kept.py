"""How many expert layers keep gate and up from forward for backward, in memory that is free.

Backward needs what the first GEMM of an expert layer gave, and computes it again unless the layer keeps it: two of the
eight products with an expert's weights. It is decided last, of memory that nothing else asks for: no micro-batch is
smaller for it, no layer is offloaded, and mapped files find room in the page cache first.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from expertune.kernels.amounts import FLOAT16
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
        layers: how many do, the last ones.
        of_layers: expert layers that have a backward: all of the model's, or those from the first adapted layer on.
        num_bytes: what they keep of a micro-batch.
        peak_bytes_without: the run's peak if none did.
        reason: why no more do; None where all do.
        note: what a user would not expect: a size in the run file that keeps nothing, or fewer layers than a run
            started with; None otherwise.
    """

    layers: int
    of_layers: int
    num_bytes: int
    peak_bytes_without: int
    reason: str | None = None
    note: str | None = None

    @property
    def words(self) -> str:
        """What is kept, and of how many layers."""
        which = f"all {self.layers}" if self.layers == self.of_layers else f"{self.layers} of {self.of_layers}"
        layers = "the expert layer" if self.of_layers == 1 else f"{which} expert layers"
        return f"gate and up of {layers} for backward ({format_size(self.num_bytes)})"

    @property
    def line(self) -> str | None:
        """The same with what it saves; None where nothing is kept."""
        if not self.layers:
            return None
        return f"{self.words}, which saves a quarter of their products; kernels.keep: 0 keeps none"


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

    def taken(layers: int) -> int:
        return max(kept[layers - 1], peak_of(replace(w, kept_layers=layers)) - peak)

    layers, reason = 0, _why_nothing(w, most_bytes)
    if not reason:
        free, most, reason = _allowed(placement, kept, most_bytes, budget_bytes - peak, previously)
        layers = bisect_right(range(1, most + 1), free, key=taken)  # the peak rises with each layer
        if layers < most:
            what = "half of what is free" if previously is None and most_bytes is None else "what is free"
            reason = f"{layers + 1} would take more than {what}, {format_size(max(free, 0))}"
    num_bytes = kept[layers - 1] if layers else 0
    note = _fewer(layers, len(kept), previously, reason) if previously else _of_no_use(kept, layers, most_bytes, reason)
    return KeptLayers(layers, len(kept), num_bytes, peak, None if layers == len(kept) else reason, note)


def _allowed(
    placement: PlannedPlacement, kept: list[int], most_bytes: int | None, free: int, previously: int | None
) -> tuple[int, int, str | None]:
    """The memory that layers may take, the most that may keep something, and why no more may.

    Args:
        placement: as for `choose_kept`.
        kept: what the last layers keep together: one, two, and so on.
        most_bytes: as for `choose_kept`.
        free: what the run leaves of its budget.
        previously: as for `choose_kept`.
    """
    if previously is not None:
        return free, min(previously, len(kept)), "as the run started"
    free -= placement.offloaded_bytes  # they are read through the page cache, which has only what is free
    if most_bytes is None:
        return int(AUTO_SHARE * free), len(kept), None
    return free, bisect_right(kept, most_bytes), f"kernels.keep is {format_size(most_bytes)}"


def _fewer(layers: int, of_layers: int, previously: int, reason: str | None) -> str | None:
    """That a resumed run keeps fewer layers' gate and up than it started with; None where it does not."""
    if layers >= previously:
        return None
    return (
        f"{layers} of {of_layers} expert layers keep gate and up, and the run started with {previously}: {reason}. "
        "The run continues to rounding, and need not end with the bytes of an uninterrupted one"
    )


def _of_no_use(kept: list[int], layers: int, most_bytes: int | None, reason: str | None) -> str | None:
    """That a size in the run file keeps nothing; None where there is none, or it does."""
    if layers or not most_bytes or not kept:
        return None
    why = "" if most_bytes < kept[0] else f": {reason}"
    return (
        f"kernels.keep: {format_size(most_bytes)} keeps nothing{why}; gate and up of one expert layer take "
        f"{format_size(kept[0])}"
    )


def _why_nothing(w: Workload, most_bytes: int | None) -> str | None:
    """Why no layer keeps anything; None where it does if it fits."""
    if w.device != "cpu":
        return "on a GPU they are computed again"
    if w.compute_dtype == FLOAT16:
        return "in float16, which has no room for all of their numbers, they are computed again"
    if w.targets.use_dora:
        return "with DoRA they are computed again"
    if most_bytes is None and (ranks := w.inventory.distribution.expert_ranks) > 1:
        return (
            f"experts are shared out, and a rank can receive {ranks} times its own tokens; kernels.keep with a size "
            "keeps as many layers as fit even then"
        )
    return None
