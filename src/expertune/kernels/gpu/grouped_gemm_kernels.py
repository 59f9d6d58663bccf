"""The kernels of `grouped_gemm.py`.

Persistent programs walk over tiles that they find on the device. With NF4 bytes a tile of weights is dequantized in
registers, inside the loop of the GEMM, and each weight is rounded once, to the bits that bitsandbytes'
dequantization gives; scales are loaded one step ahead. With dequantized weights the same loop is an ordinary grouped
GEMM. Low-rank updates, the gate, and the router's weight are applied to the sums before they are rounded.

Each output tile is summed by one program in a fixed order: two runs give identical bytes.

Shape suffixes: R routed tokens sorted by expert, N rows and K columns of a matrix, E experts, P parts (matrices of an
expert that lie side by side), r rank.
"""

import triton
import triton.language as tl

from expertune.kernels.gpu.nf4 import dequantize_tile, load_scales
from expertune.kernels.gpu.tiles import expert_tiles, locate


@triton.jit
def grouped_gemm_kernel(
    x_ptr,
    token_ptr,
    weight_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    dynamic_ptr,
    codebook_ptr,
    offsets_ptr,
    low0_ptr,
    factor0_ptr,
    low1_ptr,
    factor1_ptr,
    router_ptr,
    base_ptr,
    out_ptr,
    first,
    end,
    num_rows,
    num_columns,
    x_stride,
    weight_stride,
    absmax_stride,
    nested_stride,
    base_stride,
    out_stride,
    rank0,
    rank1,
    scaling0,
    scaling1,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    NF4: tl.constexpr,
    DOUBLE: tl.constexpr,
    BASE: tl.constexpr,
    SWIGLU: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
    RANK0: tl.constexpr,
    RANK1: tl.constexpr,
    E_PAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """out [R, P * N], or [R, N] of silu(part 0) * part 1. `num_rows` is N, `num_columns` K; EVEN: BN divides N.

    With BASE sums begin with `base` [R, P * N] in place of zero.
    """
    SCALES: tl.constexpr = BK // 64
    BYTES: tl.constexpr = BK // 2 if NF4 else BK
    BLOCKS_OUT: tl.constexpr = 1 if SWIGLU else PARTS
    experts, start, stop, tiles, so_far = expert_tiles(offsets_ptr, first, end, BM, E_PAD)
    tiles_of_part = tl.cdiv(num_rows, BN)
    total = tl.max(so_far, 0) * tiles_of_part * BLOCKS_OUT
    for tile in range(tl.program_id(0), total, PROGRAMS):
        expert, row, row_end, column = locate(tile, experts, start, stop, tiles, so_far, tiles_of_part * BLOCKS_OUT, BM)
        part = column // tiles_of_part
        n = (column % tiles_of_part) * BN + tl.arange(0, BN)
        n_mask = n < num_rows
        m = row + tl.arange(0, BM)
        m_mask = m < row_end
        source = m.to(tl.int64)
        if GATHER:
            source = tl.load(token_ptr + m, mask=m_mask, other=0)
        x_ptrs = x_ptr + source[:, None] * x_stride + tl.arange(0, BK)[None, :]
        held = expert if NF4 else expert - first
        matrix = held.to(tl.int64) * PARTS + part
        w0_ptrs = weight_ptr + (matrix * num_rows + n)[:, None] * weight_stride + tl.arange(0, BYTES)[None, :]
        acc0 = tl.zeros((BM, BN), dtype=tl.float32)
        if BASE:
            base_ptrs = base_ptr + row.to(tl.int64) * base_stride + part * num_rows
            base_ptrs += tl.arange(0, BM)[:, None] * base_stride + n[None, :]
            acc0 += tl.load(base_ptrs, mask=m_mask[:, None] & n_mask[None, :], other=0.0).to(tl.float32)
        if SWIGLU:
            w1_ptrs = w0_ptrs + tl.cast(num_rows, tl.int64) * weight_stride
            acc1 = tl.zeros((BM, BN), dtype=tl.float32)
            if BASE:
                base_ptrs += num_rows
                acc1 += tl.load(base_ptrs, mask=m_mask[:, None] & n_mask[None, :], other=0.0).to(tl.float32)
        # Low-rank terms first, while the registers of the loop are still free, and 16 ranks at a time.
        if RANK0 > 0:
            scaling = scaling0 if SWIGLU or PARTS == 1 else tl.where(part == 0, scaling0, 0.0)
            for rank in tl.range(0, RANK0, 16, num_stages=1):
                low = rows_of_low(low0_ptr, m, m_mask, rank, rank0, 16) * scaling
                acc0 = _add_low_rank(acc0, low, factor0_ptr, expert, n, n_mask, num_rows, rank, rank0, DTYPE, PRECISION)
        if RANK1 > 0:
            scaling = scaling1 if SWIGLU else tl.where(part == 1, scaling1, 0.0)
            for rank in tl.range(0, RANK1, 16, num_stages=1):
                low = rows_of_low(low1_ptr, m, m_mask, rank, rank1, 16) * scaling
                if SWIGLU:
                    acc1 = _add_low_rank(
                        acc1, low, factor1_ptr, expert, n, n_mask, num_rows, rank, rank1, DTYPE, PRECISION
                    )
                else:
                    acc0 = _add_low_rank(
                        acc0, low, factor1_ptr, expert, n, n_mask, num_rows, rank, rank1, DTYPE, PRECISION
                    )
        if NF4:
            block = tl.arange(0, SCALES)
            first_blocks = n[:, None] * (num_columns // 64)
            absmax0, nested0 = absmax_ptr + matrix * absmax_stride, nested_ptr
            offset0, offset1 = 0.0, 0.0
            if DOUBLE:
                nested0 = nested_ptr + matrix * nested_stride
                offset0 = tl.load(offset_ptr + matrix)
                if SWIGLU:
                    offset1 = tl.load(offset_ptr + matrix + 1)
            blocks = first_blocks + block[None, :]
            scale0 = load_scales(absmax0, nested0, dynamic_ptr, offset0, blocks, n_mask[:, None], DOUBLE)
            if SWIGLU:
                absmax1, nested1 = absmax0 + absmax_stride, nested0
                if DOUBLE:
                    nested1 = nested0 + nested_stride
                scale1 = load_scales(absmax1, nested1, dynamic_ptr, offset1, blocks, n_mask[:, None], DOUBLE)
        for _ in range(0, num_columns, BK):
            x = tl.load(x_ptrs, mask=m_mask[:, None], other=0.0).to(DTYPE)
            if EVEN:
                w0 = tl.load(w0_ptrs)
            else:
                w0 = tl.load(w0_ptrs, mask=n_mask[:, None], other=0)
            if NF4:
                # The next step's scales, asked for before this step's GEMM: their two lookups are not waited for.
                block += SCALES
                blocks = first_blocks + block[None, :]
                ahead = n_mask[:, None] & (block < num_columns // 64)[None, :]
                next0 = load_scales(absmax0, nested0, dynamic_ptr, offset0, blocks, ahead, DOUBLE)
                w0 = dequantize_tile(w0, scale0, codebook_ptr, SHUFFLE, DTYPE)
                scale0 = next0
            acc0 = tl.dot(x, tl.trans(w0), acc0, input_precision=PRECISION)
            if SWIGLU:
                if EVEN:
                    w1 = tl.load(w1_ptrs)
                else:
                    w1 = tl.load(w1_ptrs, mask=n_mask[:, None], other=0)
                if NF4:
                    next1 = load_scales(absmax1, nested1, dynamic_ptr, offset1, blocks, ahead, DOUBLE)
                    w1 = dequantize_tile(w1, scale1, codebook_ptr, SHUFFLE, DTYPE)
                    scale1 = next1
                acc1 = tl.dot(x, tl.trans(w1), acc1, input_precision=PRECISION)
                w1_ptrs += BYTES
            x_ptrs += BK
            w0_ptrs += BYTES
        if SWIGLU:
            acc0 = acc0 / (1.0 + tl.exp(-acc0)) * acc1
        if WEIGHTED:
            acc0 = acc0 * tl.load(router_ptr + m, mask=m_mask, other=0.0)[:, None]
        # Within a tile 32 bits are enough, and halve the registers that addresses take.
        out_ptrs = out_ptr + row.to(tl.int64) * out_stride + part * num_rows
        out_ptrs += tl.arange(0, BM)[:, None] * out_stride + n[None, :]
        tl.store(out_ptrs, acc0.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def rows_of_low(low_ptr, m, m_mask, first, rank, RANK: tl.constexpr):
    """Rows m of a low-rank term, its ranks first .. first + RANK - 1 of `rank`: float32 [BM, RANK]."""
    r = first + tl.arange(0, RANK)
    low_ptrs = low_ptr + m.to(tl.int64)[:, None] * rank + r[None, :]
    return tl.load(low_ptrs, mask=m_mask[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _add_low_rank(
    acc,
    low,
    factor_ptr,
    expert,
    n,
    n_mask,
    num_rows,
    first,
    rank,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + low [BM, 16] @ factor[expert] [BN, first .. first + 15].T."""
    r = first + tl.arange(0, 16)
    factor_ptrs = factor_ptr + (expert.to(tl.int64) * num_rows + n)[:, None] * rank + r[None, :]
    factor = tl.load(factor_ptrs, mask=n_mask[:, None] & (r < rank)[None, :], other=0.0)
    return accurate_dot(acc, low, tl.trans(factor.to(tl.float32)), DTYPE, PRECISION)


@triton.jit
def accurate_dot(acc, a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b of float32 operands on 16-bit matrix units: each operand is a sum of two, and three products of the
    four are taken, so that about 16 bits are kept; no second accumulator is needed. In float32 it is one product."""
    if DTYPE == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        a_high, b_high = a.to(DTYPE), b.to(DTYPE)
        a_low, b_low = (a - a_high.to(tl.float32)).to(DTYPE), (b - b_high.to(tl.float32)).to(DTYPE)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        return tl.dot(a_high, b_high, acc)


@triton.jit
def input_gradient_kernel(
    dy_ptr,
    token_ptr,
    weight_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    dynamic_ptr,
    codebook_ptr,
    offsets_ptr,
    out_ptr,
    first,
    end,
    num_rows,
    num_columns,
    dy_stride,
    weight_stride,
    absmax_stride,
    nested_stride,
    out_stride,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    NF4: tl.constexpr,
    DOUBLE: tl.constexpr,
    EVEN: tl.constexpr,
    ADD: tl.constexpr,
    E_PAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """out [R, K] = dy [R, P * N] @ the P matrices of the row's expert, one below the other. EVEN: BN divides N.

    With ADD what `out` holds is added.
    """
    SCALES: tl.constexpr = BK // 64
    BYTES: tl.constexpr = BK // 2 if NF4 else BK
    experts, start, stop, tiles, so_far = expert_tiles(offsets_ptr, first, end, BM, E_PAD)
    column_tiles = tl.cdiv(num_columns, BK)
    for tile in range(tl.program_id(0), tl.max(so_far, 0) * column_tiles, PROGRAMS):
        expert, row, row_end, column = locate(tile, experts, start, stop, tiles, so_far, column_tiles, BM)
        m = row + tl.arange(0, BM)
        m_mask = m < row_end
        source = m.to(tl.int64)
        if GATHER:
            source = tl.load(token_ptr + m, mask=m_mask, other=0)
        k = column * BK + tl.arange(0, BK)
        k_mask = k < num_columns
        held = expert if NF4 else expert - first
        acc = tl.zeros((BM, BK), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            matrix = held.to(tl.int64) * PARTS + part
            n = tl.arange(0, BN)
            dy_ptrs = dy_ptr + source[:, None] * dy_stride + (part * num_rows + n)[None, :]
            byte = column * BYTES + tl.arange(0, BYTES)
            byte_mask = byte < weight_stride
            w_ptrs = weight_ptr + (matrix * num_rows + n)[:, None] * weight_stride + byte[None, :]
            if NF4:
                block = column * SCALES + tl.arange(0, SCALES)
                block_mask = block < num_columns // 64
                blocks = n[:, None] * (num_columns // 64) + block[None, :]
                absmax, nested = absmax_ptr + matrix * absmax_stride, nested_ptr
                offset = 0.0
                if DOUBLE:
                    nested = nested_ptr + matrix * nested_stride
                    offset = tl.load(offset_ptr + matrix)
                mask = (n < num_rows)[:, None] & block_mask[None, :]
                scale = load_scales(absmax, nested, dynamic_ptr, offset, blocks, mask, DOUBLE)
            for step in range(0, num_rows, BN):
                if EVEN:
                    dy = tl.load(dy_ptrs, mask=m_mask[:, None], other=0.0).to(DTYPE)
                    w = tl.load(w_ptrs, mask=byte_mask[None, :], other=0)
                else:
                    n_mask = step + n < num_rows
                    dy = tl.load(dy_ptrs, mask=m_mask[:, None] & n_mask[None, :], other=0.0).to(DTYPE)
                    w = tl.load(w_ptrs, mask=n_mask[:, None] & byte_mask[None, :], other=0)
                if NF4:
                    blocks += BN * (num_columns // 64)
                    mask = (step + BN + n < num_rows)[:, None] & block_mask[None, :]
                    ahead = load_scales(absmax, nested, dynamic_ptr, offset, blocks, mask, DOUBLE)
                    w = dequantize_tile(w, scale, codebook_ptr, SHUFFLE, DTYPE)
                    scale = ahead
                acc = tl.dot(dy, w, acc, input_precision=PRECISION)
                dy_ptrs += BN
                w_ptrs += BN * tl.cast(weight_stride, tl.int64)
        out_mask = m_mask[:, None] & k_mask[None, :]
        out_ptrs = out_ptr + row.to(tl.int64) * out_stride
        out_ptrs += tl.arange(0, BM)[:, None] * out_stride + k[None, :]
        if ADD:
            acc += tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
