"""The thin GEMMs of low-rank adapters over rows sorted by expert: x @ A, and the gradients of A and B.

Each is small beside the layer's GEMMs, and reads a wide matrix of rows once. Sums run in a fixed order, one program
each: no atomics. Factors are float32 as a rule and are multiplied so.

Shape suffixes: T tokens, R routed rows sorted by expert, E experts, r rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.gpu.dropout import kept, threshold
from expertune.kernels.gpu.grouped_gemm import accurate_dot, padded, padded_rank, rows_of_low
from expertune.kernels.gpu.launch import launch
from expertune.kernels.gpu.tiles import expert_tiles, locate


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
    seed: Tensor | None = None


class Outer(NamedTuple):
    """total[e] = scaling * low[rows of e].T @ drop(v)[rows of e, column : column + width] of `outer`, or added.

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
    seed: Tensor | None = None


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
    seed: Tensor | None = None


_Item = Shrink | Outer | Expand


@triton.jit
def _shrink_tile(
    x_ptr,
    factor_ptr,
    out_ptr,
    seed_ptr,
    expert,
    source,
    number_ptr,
    m,
    m_mask,
    width,
    column,
    x_stride,
    rank,
    scaling,
    TRANSPOSED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r = tl.arange(0, RANK)
    r_mask = r < rank
    acc = tl.zeros((BM, RANK), dtype=tl.float32)
    if THRESHOLD > 0:
        number = tl.load(number_ptr + m, mask=m_mask, other=0)
        seed = tl.load(seed_ptr)
    factor_of_expert = factor_ptr + expert.to(tl.int64) * rank * width
    for first in range(0, width, BK):
        k = first + tl.arange(0, BK)
        k_mask = k < width
        x_ptrs = x_ptr + source[:, None] * x_stride + (column + k)[None, :]
        x = tl.load(x_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            x = tl.where(kept(number, k, width, seed, THRESHOLD), x * KEEP, 0.0)
        if TRANSPOSED:
            factor_ptrs = factor_of_expert + k[:, None] * rank + r[None, :]
            factor = tl.load(factor_ptrs, mask=k_mask[:, None] & r_mask[None, :], other=0.0)
        else:
            factor_ptrs = factor_of_expert + r[:, None] * width + k[None, :]
            factor = tl.trans(tl.load(factor_ptrs, mask=r_mask[:, None] & k_mask[None, :], other=0.0))
        acc = tl.dot(x, factor.to(tl.float32), acc, input_precision=PRECISION)
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * rank + r[None, :]
    tl.store(out_ptrs, (acc * scaling).to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & r_mask[None, :])


@triton.jit
def shrink_kernel(
    x_ptr,
    token_ptr,
    number_ptr,
    offsets_ptr,
    factor0_ptr,
    out0_ptr,
    seed0_ptr,
    factor1_ptr,
    out1_ptr,
    seed1_ptr,
    first_expert,
    end_expert,
    width,
    x_stride,
    column0,
    column1,
    rank0,
    rank1,
    scaling0,
    scaling1,
    PAIR: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    THRESHOLD0: tl.constexpr,
    THRESHOLD1: tl.constexpr,
    KEEP0: tl.constexpr,
    KEEP1: tl.constexpr,
    RANK: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows for each program_id(0), an update for each program_id(1)."""
    tile = tl.program_id(0)
    experts, start, stop, tiles, so_far = expert_tiles(offsets_ptr, first_expert, end_expert, BM, E_PAD)
    if tile < tl.max(so_far, 0):
        expert, row, row_end, _ = locate(tile, experts, start, stop, tiles, so_far, 1, BM)
        m = row + tl.arange(0, BM)
        m_mask = m < row_end
        source = m.to(tl.int64)
        if GATHER:
            source = tl.load(token_ptr + m, mask=m_mask, other=0)
        if not PAIR or tl.program_id(1) == 0:
            _shrink_tile(
                x_ptr, factor0_ptr, out0_ptr, seed0_ptr, expert, source, number_ptr, m, m_mask, width, column0,
                x_stride, rank0, scaling0, TRANSPOSED, THRESHOLD0, KEEP0, RANK, BM, BK, PRECISION,
            )  # fmt: skip
        elif PAIR:
            _shrink_tile(
                x_ptr, factor1_ptr, out1_ptr, seed1_ptr, expert, source, number_ptr, m, m_mask, width, column1,
                x_stride, rank1, scaling1, TRANSPOSED, THRESHOLD1, KEEP1, RANK, BM, BK, PRECISION,
            )  # fmt: skip


@triton.jit
def _outer_tile(
    low_ptr,
    v_ptr,
    total_ptr,
    seed_ptr,
    token_ptr,
    number_ptr,
    router_ptr,
    expert,
    row,
    row_end,
    k,
    width,
    column,
    v_stride,
    rank,
    scaling,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r = tl.arange(0, RANK)
    r_mask, k_mask = r < rank, k < width
    acc = tl.zeros((RANK, BK), dtype=tl.float32)
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    for first in range(row, row_end, BM):
        m = first + tl.arange(0, BM)
        m_mask = m < row_end
        source = m.to(tl.int64)
        if GATHER:
            source = tl.load(token_ptr + m, mask=m_mask, other=0)
        low_ptrs = low_ptr + m.to(tl.int64)[:, None] * rank + r[None, :]
        low = tl.load(low_ptrs, mask=m_mask[:, None] & r_mask[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            low = low * tl.load(router_ptr + m, mask=m_mask, other=0.0)[:, None]
        v_ptrs = v_ptr + source[:, None] * v_stride + (column + k)[None, :]
        v = tl.load(v_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            number = tl.load(number_ptr + m, mask=m_mask, other=0)
            v = tl.where(kept(number, k, width, seed, THRESHOLD), v * KEEP, 0.0)
        acc = tl.dot(tl.trans(low), v, acc, input_precision=PRECISION)
    if TRANSPOSED:
        total_ptrs = total_ptr + expert.to(tl.int64) * rank * width + k[None, :] * rank + r[:, None]
    else:
        total_ptrs = total_ptr + expert.to(tl.int64) * rank * width + r[:, None] * width + k[None, :]
    mask = r_mask[:, None] & k_mask[None, :]
    acc = acc * scaling
    if ADD:
        acc += tl.load(total_ptrs, mask=mask, other=0.0)
    tl.store(total_ptrs, acc, mask=mask)


@triton.jit
def outer_kernel(
    v_ptr,
    token_ptr,
    number_ptr,
    router_ptr,
    offsets_ptr,
    low0_ptr,
    total0_ptr,
    seed0_ptr,
    low1_ptr,
    total1_ptr,
    seed1_ptr,
    width,
    v_stride,
    column0,
    column1,
    rank0,
    rank1,
    scaling0,
    scaling1,
    PAIR: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    THRESHOLD0: tl.constexpr,
    THRESHOLD1: tl.constexpr,
    KEEP0: tl.constexpr,
    KEEP1: tl.constexpr,
    RANK: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of columns for each program_id(0), an expert for each program_id(1), an update for each program_id(2)."""
    expert = tl.program_id(1)
    row_end = tl.load(offsets_ptr + expert).to(tl.int32)
    row = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    if not PAIR or tl.program_id(2) == 0:
        _outer_tile(
            low0_ptr, v_ptr, total0_ptr, seed0_ptr, token_ptr, number_ptr, router_ptr, expert, row, row_end, k,
            width, column0, v_stride, rank0, scaling0,
            GATHER, WEIGHTED, TRANSPOSED, THRESHOLD0, KEEP0, RANK, ADD, BM, BK, PRECISION,
        )  # fmt: skip
    elif PAIR:
        _outer_tile(
            low1_ptr, v_ptr, total1_ptr, seed1_ptr, token_ptr, number_ptr, router_ptr, expert, row, row_end, k,
            width, column1, v_stride, rank1, scaling1,
            GATHER, WEIGHTED, TRANSPOSED, THRESHOLD1, KEEP1, RANK, ADD, BM, BK, PRECISION,
        )  # fmt: skip


@triton.jit
def _expand_tile(
    low_ptr,
    factor_ptr,
    seed_ptr,
    expert,
    number_ptr,
    m,
    m_mask,
    k,
    k_mask,
    width,
    rank,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    r = tl.arange(0, RANK)
    factor_ptrs = factor_ptr + (expert.to(tl.int64) * rank + r)[:, None] * width + k[None, :]
    factor = tl.load(factor_ptrs, mask=(r < rank)[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
    low = rows_of_low(low_ptr, m, m_mask, 0, rank, RANK)
    out = accurate_dot(tl.zeros((BM, BK), dtype=tl.float32), low * KEEP, factor, DTYPE, PRECISION)
    if THRESHOLD > 0:
        number = tl.load(number_ptr + m, mask=m_mask, other=0)
        out = tl.where(kept(number, k, width, tl.load(seed_ptr), THRESHOLD), out, 0.0)
    return out


@triton.jit
def expand_kernel(
    out_ptr,
    number_ptr,
    offsets_ptr,
    low0_ptr,
    factor0_ptr,
    seed0_ptr,
    low1_ptr,
    factor1_ptr,
    seed1_ptr,
    first_expert,
    end_expert,
    width,
    out_stride,
    rank0,
    rank1,
    PAIR: tl.constexpr,
    THRESHOLD0: tl.constexpr,
    THRESHOLD1: tl.constexpr,
    KEEP0: tl.constexpr,
    KEEP1: tl.constexpr,
    RANK: tl.constexpr,
    E_PAD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows for each program_id(0), of columns for each program_id(1)."""
    tile = tl.program_id(0)
    experts, start, stop, tiles, so_far = expert_tiles(offsets_ptr, first_expert, end_expert, BM, E_PAD)
    if tile < tl.max(so_far, 0):
        expert, row, row_end, _ = locate(tile, experts, start, stop, tiles, so_far, 1, BM)
        m = row + tl.arange(0, BM)
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        m_mask, k_mask = m < row_end, k < width
        out = _expand_tile(
            low0_ptr, factor0_ptr, seed0_ptr, expert, number_ptr, m, m_mask, k, k_mask, width, rank0,
            THRESHOLD0, KEEP0, RANK, DTYPE, PRECISION, BM, BK,
        )  # fmt: skip
        if PAIR:
            out += _expand_tile(
                low1_ptr, factor1_ptr, seed1_ptr, expert, number_ptr, m, m_mask, k, k_mask, width, rank1,
                THRESHOLD1, KEEP1, RANK, DTYPE, PRECISION, BM, BK,
            )  # fmt: skip
        out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + k[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & k_mask[None, :])


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
        offsets_E: int64 [E], the end of each expert's rows.
        items: none, one or two.
        dtype: of the GEMMs around it.
        number_R: int64 [R], by which dropout knows a row.
        experts: whose rows are computed; None means all.

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
        offsets_E: int64 [E], the end of each expert's rows.
        items: one or two, whose factors have one width.
        token_R: int64 [R], the row of x that each routed row is.
        number_R: int64 [R], by which dropout knows a row.
        experts: whose rows are computed; None means all.
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
    """total[e] = scaling * low[rows of e].T @ drop(v)[rows of e], for one or two adapters in one launch.

    Args:
        v: [R, *], or [T, *] with `token_R`.
        offsets_E: int64 [E], the end of each expert's rows.
        items: one or two, whose totals have one width.
        token_R: int64 [R], the row of v that each routed row is.
        number_R: int64 [R], by which dropout knows a row.
        router_R: float32 [R], what each row is multiplied by.
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


def _pointers(item: _Item | None) -> tuple[Tensor | None, ...]:
    """An item's two tensors, in its own order, and its seed where the kernel reads it."""
    return (item[0], item[1], item.seed if item.dropout else None) if item else (None, None, None)
