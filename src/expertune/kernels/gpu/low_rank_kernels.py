"""The kernels of `low_rank.py`: each sum is one program's, in a fixed order."""

import triton
import triton.language as tl

from expertune.kernels.gpu.dropout import kept
from expertune.kernels.gpu.grouped_gemm_kernels import accurate_dot, rows_of_low
from expertune.kernels.gpu.tiles import expert_tiles, locate


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
    """A tile of tokens for each program_id(0), an update for each program_id(1)."""
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
    """A tile of tokens for each program_id(0), of columns for each program_id(1)."""
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
