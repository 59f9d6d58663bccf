"""The thin GEMMs of low-rank adapters over tokens sorted by expert: x @ A, and the gradients of A and B.

Each is small beside the layer's GEMMs, and reads a wide matrix of tokens once. Sums run in a fixed order, one program
each: no atomics. Factors are float32 as a rule and are multiplied so.

Shape suffixes: T tokens, R routed tokens sorted by expert, E experts, r rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from expertune.kernels.gpu.dropout import threshold
from expertune.kernels.gpu.grouped_gemm import padded, padded_rank
from expertune.kernels.gpu.launch import launch
from expertune.kernels.gpu.low_rank_kernels import expand_kernel, outer_kernel, shrink_kernel


class Shrink(NamedTuple):
    """out = scaling * drop(x)[:, column : column + width] @ factor[e] of `shrink`.

    Attributes:
        factor: [E, r, width], or [E, width, r] if `transposed`.
        out_Rr: [R, r], contiguous.
        transposed: how `factor` lies.
        scaling: of the result.
        column: first column of x.
        dropout: probability that an element of x is dropped.
        seed: int64 [], on the device, where there is dropout.
    """

    factor: Tensor
    out_Rr: Tensor
    transposed: bool = False
    scaling: float = 1.0
    column: int = 0
    dropout: float = 0.0
    seed: Tensor | int = 0


class Outer(NamedTuple):
    """total[e] = scaling * low[tokens of e].T @ drop(v)[tokens of e, column : column + width] of `outer`, or added.

    Attributes:
        low_Rr: [R, r], contiguous.
        total: float32 [E, r, width], or [E, width, r] if `transposed`; contiguous.
        transposed: how `total` lies.
        scaling: of the result.
        column: first column of v.
        dropout: probability that an element of v is dropped.
        seed: see `Shrink`.
    """

    low_Rr: Tensor
    total: Tensor
    transposed: bool = False
    scaling: float = 1.0
    column: int = 0
    dropout: float = 0.0
    seed: Tensor | int = 0


class Expand(NamedTuple):
    """out = drop(low @ factor[e]) of `expand`, where the sum of two is taken.

    Attributes:
        low_Rr: [R, r], contiguous.
        factor: [E, r, K].
        dropout: probability that an element of the update's input was dropped.
        seed: see `Shrink`.
    """

    low_Rr: Tensor
    factor: Tensor
    dropout: float = 0.0
    seed: Tensor | int = 0


_Item = Shrink | Outer | Expand


def expand(
    out: Tensor,
    offsets_E: Tensor,
    items: Sequence[Expand],
    dtype: torch.dtype,
    number_R: Tensor | None = None,
    experts: slice | None = None,
) -> bool:
    """out = the sum of drop(low @ factor[e]) of one or two adapters, in one launch: gradients of their input.

    Args:
        out: [R, K], of any floating dtype.
        offsets_E: int64 [E], the end of each expert's tokens.
        items: none, one or two.
        dtype: of the GEMMs around it.
        number_R: int64 [R], by which dropout knows a token.
        experts: whose tokens are computed; None means all.

    Returns:
        Whether `out` was written: not without items.
    """
    if not items:
        return False
    first, second = items[0], (items[1] if len(items) > 1 else None)
    width, BM, BK = first.factor.shape[2], 32, 64
    launch(
        expand_kernel,
        (triton.cdiv(out.shape[0], BM) + offsets_E.shape[0], triton.cdiv(width, BK)),
        out,
        number_R,
        offsets_E,
        *_pointers(first),
        *_pointers(second),
        experts.start if experts else 0,
        experts.stop if experts else offsets_E.shape[0],
        width,
        out.stride(0),
        *(item.low_Rr.shape[1] if item else 0 for item in (first, second)),
        **_dropouts(first, second),
        RANK=max(padded_rank(item.low_Rr) for item in items),
        E_PAD=padded(offsets_E.shape[0]),
        BM=BM,
        BK=BK,
        dtype=dtype,
        num_warps=4,
        num_stages=1,
    )
    return True


def shrink(
    x: Tensor,
    offsets_E: Tensor,
    items: Sequence[Shrink],
    token_R: Tensor | None = None,
    number_R: Tensor | None = None,
    experts: slice | None = None,
) -> None:
    """out = scaling * drop(x) @ factor[e], for one or two adapters in one launch.

    Args:
        x: [R, *], or [T, *] with `token_R`.
        offsets_E: int64 [E], the end of each expert's tokens.
        items: one or two, whose factors have one width.
        token_R: int64 [R], the token of x that each routed token is.
        number_R: int64 [R], by which dropout knows a token.
        experts: whose tokens are computed; None means all.
    """
    if not items:
        return
    first, second = items[0], (items[1] if len(items) > 1 else None)
    width = first.factor.shape[1 if first.transposed else 2]
    rows, BM, RANK = first.out_Rr.shape[0], 16, max(padded_rank(item.out_Rr) for item in items)
    # Few programs share a wide input at few tokens: long steps, as far as shared memory holds the factor's.
    steps = max(min(4096 // RANK, 256), 32)
    launch(
        shrink_kernel,
        (triton.cdiv(rows, BM) + offsets_E.shape[0], len(items)),
        x,
        token_R,
        number_R,
        offsets_E,
        *_pointers(first),
        *_pointers(second),
        experts.start if experts else 0,
        experts.stop if experts else offsets_E.shape[0],
        width,
        x.stride(0),
        *(item.column if item else 0 for item in (first, second)),
        *(item.out_Rr.shape[1] if item else 0 for item in (first, second)),
        *(item.scaling if item else 0.0 for item in (first, second)),
        GATHER=token_R is not None,
        TRANSPOSED=first.transposed,
        **_dropouts(first, second),
        RANK=RANK,
        E_PAD=padded(offsets_E.shape[0]),
        BM=BM,
        BK=steps // 2 if first.transposed else steps,
        dtype=x.dtype,
        num_warps=4,
        num_stages=2,
    )


def outer(
    v: Tensor,
    offsets_E: Tensor,
    items: Sequence[Outer],
    token_R: Tensor | None = None,
    number_R: Tensor | None = None,
    router_R: Tensor | None = None,
    add: bool = True,
) -> None:
    """total[e] = scaling * low[tokens of e].T @ drop(v)[tokens of e], for one or two adapters in one launch.

    Args:
        v: [R, *], or [T, *] with `token_R`.
        offsets_E: int64 [E], the end of each expert's tokens.
        items: one or two, whose totals have one width.
        token_R: int64 [R], the token of v that each routed token is.
        number_R: int64 [R], by which dropout knows a token.
        router_R: float32 [R], what each token is multiplied by.
        add: to what `total` holds.
    """
    if not items:
        return
    first, second = items[0], (items[1] if len(items) > 1 else None)
    width = first.total.shape[1 if first.transposed else 2]
    BK = 64
    launch(
        outer_kernel,
        (triton.cdiv(width, BK), offsets_E.shape[0], len(items)),
        v,
        token_R,
        number_R,
        router_R,
        offsets_E,
        *_pointers(first),
        *_pointers(second),
        width,
        v.stride(0),
        *(item.column if item else 0 for item in (first, second)),
        *(item.low_Rr.shape[1] if item else 0 for item in (first, second)),
        *(item.scaling if item else 0.0 for item in (first, second)),
        GATHER=token_R is not None,
        WEIGHTED=router_R is not None,
        TRANSPOSED=first.transposed,
        **_dropouts(first, second),
        RANK=max(padded_rank(item.low_Rr) for item in items),
        ADD=add,
        BM=32,
        BK=BK,
        dtype=v.dtype,
        num_warps=4,
        num_stages=2,
    )


def _dropouts(first: _Item, second: _Item | None) -> dict[str, bool | int | float]:
    """The kernels' constants about one adapter or two: whether there are two, and the dropout of each."""
    dropped = second.dropout if second else 0.0
    return {
        "PAIR": second is not None,
        "THRESHOLD0": threshold(first.dropout),
        "THRESHOLD1": threshold(dropped),
        "KEEP0": 1 / (1 - first.dropout),
        "KEEP1": 1 / (1 - dropped),
    }


def _pointers(item: _Item | None) -> tuple[Tensor | int | None, ...]:
    """An item's two tensors, in its own order, and its seed where the kernel reads it."""
    return (item[0], item[1], item.seed if item.dropout else None) if item else (None, None, None)
