"""MXFP4 on a GPU: dequantize whole matrices or parts of them; GEMMs then multiply what was dequantized.

A weight is a sign, two bits of exponent and one of mantissa, and 32 of them share a power of two: both multiplied are
exact in float32 and bfloat16, and need no table.

Shape suffixes: M matrices, N rows, K columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.amounts import MXFP4_BLOCK_SIZE
from expertune.kernels.gpu.launch import launch
from expertune.kernels.nf4.bytes import Nf4Bytes


@triton.jit
def value_of(code):
    """Float32 values of codes 0..15: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same with the sign."""
    size = code & 7
    half = size.to(tl.float32) * 0.5
    twice = (size - 2).to(tl.float32)
    value = tl.where(size < 4, half, tl.where(size < 6, twice, 2.0 * twice - 4.0))
    return tl.where(code > 7, -value, value)


@triton.jit
def dequantize_mxfp4_kernel(
    packed_ptr,
    exponent_ptr,
    out_ptr,
    first_matrix,
    first_row,
    first_block,
    total,
    num_rows,
    row_blocks,
    rows,
    packed_stride,
    out_stride,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Matrix first_matrix + program_id(1), [BLOCKS, 32] weights a program: `row_blocks` blocks of each of `num_rows`
    rows, `total` in all. `rows` and the strides are of a whole matrix, in bytes of a row."""
    matrix = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = number < total
    row, column = number // row_blocks, number % row_blocks
    source = (matrix + first_matrix) * rows + first_row + row
    block = source * (packed_stride // 16) + first_block + column
    packed = tl.load(packed_ptr + block[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0)
    exponent = tl.load(exponent_ptr + block, mask=inside, other=127).to(tl.int32)
    # A power of two is its exponent's bits, but for the least one, which has no implicit bit.
    scale = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    first = (value_of(packed >> 4) * scale[:, None]).to(DTYPE)
    second = (value_of(packed & 15) * scale[:, None]).to(DTYPE)
    weights = tl.reshape(tl.join(first, second), (BLOCKS, 32))
    target = out_ptr + (matrix * num_rows + row)[:, None] * out_stride + column[:, None] * 32
    tl.store(target + tl.arange(0, 32)[None, :], weights, mask=inside[:, None])


def dequantize(
    weight: Nf4Bytes, matrices: slice, out: Tensor, rows: slice | None = None, columns: slice | None = None
) -> Tensor:
    """The same as `expertune.kernels.gpu.nf4.dequantize`, of MXFP4 matrices; columns are whole blocks of 32."""
    rows = slice(0, weight.out_features) if rows is None else rows
    columns = slice(0, weight.in_features) if columns is None else columns
    num_rows, row_blocks = rows.stop - rows.start, (columns.stop - columns.start) // MXFP4_BLOCK_SIZE
    count = matrices.stop - matrices.start
    if not count * num_rows * row_blocks:
        return out
    blocks = 128
    launch(
        dequantize_mxfp4_kernel,
        (triton.cdiv(num_rows * row_blocks, blocks), count),
        weight.packed,
        weight.absmax,
        out,
        matrices.start,
        rows.start,
        columns.start // MXFP4_BLOCK_SIZE,
        num_rows * row_blocks,
        num_rows,
        row_blocks,
        weight.out_features,
        weight.in_features // 2,
        out.stride(0),
        BLOCKS=blocks,
        dtype=out.dtype,
        num_warps=4,
    )
    return out
