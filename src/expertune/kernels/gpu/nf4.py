"""NF4 on a GPU: bytes to values inside any kernel, and the kernel that dequantizes whole matrices at memory speed.

`dequantize_pairs` turns a tile of bytes into float32 codebook values. On NVIDIA it is one warp shuffle for each weight,
from a table that lies across the lanes; its twin in plain Triton is a tree of selections, which runs anywhere. Both are
exact, so that a weight is rounded once, to the same bits as bitsandbytes' dequantization gives.

Shape suffixes: M matrices, N rows, K columns, S blocks of 64 weights in a tile.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.gpu import mxfp4
from expertune.kernels.gpu.launch import launch
from expertune.kernels.nf4.bytes import Nf4Bytes
from expertune.kernels.nf4.reference import BLOCK_SIZE, NF4_CODEBOOK, dynamic_codebook, nf4_codebook

_CODEBOOK = tl.constexpr(NF4_CODEBOOK)

# Four bytes in, eight values out: lane l holds value l % 16 of the codebook, and a shuffle within its half of the warp
# reads only the low four bits of a lane's number, so that nibbles need no mask.
_SHUFFLE_ASM = tl.constexpr("""
{
.reg .b32 lane, entry, code;
.reg .b64 address;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mad.wide.u32 address, lane, 4, $9;
ld.global.nc.b32 entry, [address];
shr.u32 code, $8, 4;
shfl.sync.idx.b32 $0, entry, code, 0x101f, 0xffffffff;
shr.u32 code, $8, 12;
shfl.sync.idx.b32 $1, entry, code, 0x101f, 0xffffffff;
shr.u32 code, $8, 20;
shfl.sync.idx.b32 $2, entry, code, 0x101f, 0xffffffff;
shr.u32 code, $8, 28;
shfl.sync.idx.b32 $3, entry, code, 0x101f, 0xffffffff;
shfl.sync.idx.b32 $4, entry, $8, 0x101f, 0xffffffff;
shr.u32 code, $8, 8;
shfl.sync.idx.b32 $5, entry, code, 0x101f, 0xffffffff;
shr.u32 code, $8, 16;
shfl.sync.idx.b32 $6, entry, code, 0x101f, 0xffffffff;
shr.u32 code, $8, 24;
shfl.sync.idx.b32 $7, entry, code, 0x101f, 0xffffffff;
}
""")


@triton.jit
def select_value(code):
    """Codebook values float32 of codes 0..15, by a tree of selections: the twin of the shuffle."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    low = tl.where(
        b2,
        tl.where(b1, tl.where(b0, _CODEBOOK[7], _CODEBOOK[6]), tl.where(b0, _CODEBOOK[5], _CODEBOOK[4])),
        tl.where(b1, tl.where(b0, _CODEBOOK[3], _CODEBOOK[2]), tl.where(b0, _CODEBOOK[1], _CODEBOOK[0])),
    )
    high = tl.where(
        b2,
        tl.where(b1, tl.where(b0, _CODEBOOK[15], _CODEBOOK[14]), tl.where(b0, _CODEBOOK[13], _CODEBOOK[12])),
        tl.where(b1, tl.where(b0, _CODEBOOK[11], _CODEBOOK[10]), tl.where(b0, _CODEBOOK[9], _CODEBOOK[8])),
    )
    return tl.where(b3, high, low)


@triton.jit
def dequantize_pairs(packed, codebook_ptr, SHUFFLE: tl.constexpr):
    """Bytes uint8 -> (weights of even columns, weights of odd columns) float32, before their block's scale."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            asm=_SHUFFLE_ASM,
            constraints="=r,=r,=r,=r,=r,=r,=r,=r,r,l,l,l,l",
            args=[packed, codebook_ptr.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        return select_value(packed >> 4), select_value(packed & 15)


@triton.jit
def load_scales(absmax_ptr, nested_ptr, dynamic_ptr, offset, block, mask, DOUBLE: tl.constexpr):
    """Float32 scales of blocks `block` (numbered within their matrix, to whose first entries the pointers point)."""
    if DOUBLE:
        code = tl.load(absmax_ptr + block, mask=mask, other=0)
        nested = tl.load(nested_ptr + block // 256, mask=mask, other=0.0)
        return tl.load(dynamic_ptr + code.to(tl.int32)) * nested + offset
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def dequantize_tile(packed, scale, codebook_ptr, SHUFFLE: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes [A, 32 * S] and scales [A, S] -> weights [A, 64 * S] of DTYPE, each rounded once from float32."""
    A: tl.constexpr = packed.shape[0]
    S: tl.constexpr = scale.shape[1]
    even, odd = dequantize_pairs(packed, codebook_ptr, SHUFFLE)
    even = tl.reshape(tl.reshape(even, (A, S, 32)) * scale[:, :, None], (A, 32 * S)).to(DTYPE)
    odd = tl.reshape(tl.reshape(odd, (A, S, 32)) * scale[:, :, None], (A, 32 * S)).to(DTYPE)
    return tl.reshape(tl.join(even, odd), (A, 64 * S))


@triton.jit
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    dynamic_ptr,
    codebook_ptr,
    out_ptr,
    first_matrix,
    first_row,
    first_block,
    total,
    num_rows,
    row_blocks,
    rows,
    packed_stride,
    absmax_stride,
    nested_stride,
    out_stride,
    BLOCKS: tl.constexpr,
    DOUBLE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Matrix first_matrix + program_id(1), [BLOCKS, 64] weights a program: `row_blocks` blocks of each of `num_rows`
    rows, `total` in all. `rows` and the strides are of a whole matrix: bytes of a row, scales and nested scales."""
    matrix = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = number < total
    row, column = number // row_blocks, number % row_blocks
    source = matrix + first_matrix
    bytes_of_row = packed_ptr + (source * rows + first_row + row) * packed_stride
    packed = tl.load(
        bytes_of_row[:, None] + (first_block + column)[:, None] * 32 + tl.arange(0, 32)[None, :],
        mask=inside[:, None],
        other=0,
    )
    offset = 0.0
    if DOUBLE:
        offset = tl.load(offset_ptr + source)
    block = (first_row + row) * (packed_stride // 32) + first_block + column
    scale = load_scales(
        absmax_ptr + source * absmax_stride,
        nested_ptr + source * nested_stride,
        dynamic_ptr,
        offset,
        block,
        inside,
        DOUBLE,
    )
    weights = dequantize_tile(packed, scale[:, None], codebook_ptr, SHUFFLE, DTYPE)
    target = out_ptr + (matrix * num_rows + row)[:, None] * out_stride + column[:, None] * 64
    tl.store(target + tl.arange(0, 64)[None, :], weights, mask=inside[:, None])


@functools.cache
@torch.inference_mode(False)  # kept beyond the caller's inference mode
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The dynamic map of scales, float32 [256], and the NF4 codebook, float32 [16], on a device."""
    return dynamic_codebook(device).contiguous(), nf4_codebook(device).contiguous()


def dequantize(
    weight: Nf4Bytes,
    matrices: slice,
    out: Tensor,
    rows: slice | None = None,
    columns: slice | None = None,
) -> Tensor:
    """Dequantize a range of matrices, or the same part of each, in one launch.

    Args:
        weight: M matrices [N, K].
        matrices: which of them.
        out: float32, float16 or bfloat16 [matrices * rows, columns]; its rows may lie apart.
        rows: of each; None means all.
        columns: whole blocks of 64 of each; None means all.

    Returns:
        `out`, each value rounded once from float32.
    """
    if weight.scheme == "mxfp4":
        return mxfp4.dequantize(weight, matrices, out, rows, columns)
    rows = slice(0, weight.out_features) if rows is None else rows
    columns = slice(0, weight.in_features) if columns is None else columns
    num_rows, row_blocks = rows.stop - rows.start, (columns.stop - columns.start) // BLOCK_SIZE
    count = matrices.stop - matrices.start
    if not count * num_rows * row_blocks:
        return out
    dynamic, codebook = tables(weight.packed.device)
    blocks = 64
    launch(
        dequantize_kernel,
        (triton.cdiv(num_rows * row_blocks, blocks), count),
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        dynamic,
        codebook,
        out,
        matrices.start,
        rows.start,
        columns.start // BLOCK_SIZE,
        num_rows * row_blocks,
        num_rows,
        row_blocks,
        weight.out_features,
        weight.in_features // 2,
        weight.absmax.shape[1],
        weight.nested_absmax.shape[1],
        out.stride(0),
        BLOCKS=blocks,
        DOUBLE=weight.double_quantization,
        dtype=out.dtype,
        num_warps=4,
    )
    return out
