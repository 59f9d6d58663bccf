"""The NF4 codec on a CPU: the native library where it could be built, otherwise bitsandbytes' own operators.

Both give bitsandbytes' bytes, ties included. Quantizing on other devices goes through bitsandbytes as well.
"""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.nf4 import reference
from expertune.kernels.nf4.bytes import Nf4Bytes
from expertune.kernels.nf4.reference import BLOCK_SIZE, NESTED_BLOCK_SIZE, dynamic_codebook

# Weights of one tile: 4 MiB in float32, which stays in cache.
TILE_WEIGHTS = 2**20


def quantize_matrix(matrix_NK: Tensor, double_quantization: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, K] -> packed [N, K/2], absmax, nested_absmax, offset (see `expertune.kernels.nf4`).

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    rows, columns = matrix_NK.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=matrix_NK.device)
    absmax = torch.empty(rows * columns // BLOCK_SIZE, dtype=torch.float32, device=matrix_NK.device)
    if matrix_NK.device.type == "cpu" and native.available():
        finite = native.quantize(matrix_NK.contiguous(), packed, absmax)
    else:
        finite = bool(torch.isfinite(matrix_NK).all())
        _quantize_by_bitsandbytes(matrix_NK, packed, absmax.view(rows, -1))
    if not finite:
        count = int((~torch.isfinite(matrix_NK)).sum())
        raise ValueError(f"{count} of {matrix_NK.numel()} weights are NaN or infinite; 4 bits cannot hold them")
    if not double_quantization:
        empty = torch.empty(0, dtype=torch.float32, device=matrix_NK.device)
        return packed, absmax, empty, empty
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    return packed, codes, state.absmax, offset.reshape(1)


def dequantize_absmax(weight: Nf4Bytes, index: int) -> Tensor:
    """Scales of one matrix, float32 [N, K/64]; of MXFP4 [N, K/32]."""
    if weight.scheme == "mxfp4":
        return reference.dequantize_absmax(weight, index)
    if not weight.double_quantization:
        return weight.absmax[index].view(weight.out_features, -1)
    if native.available():
        out = torch.empty(weight.absmax.shape[1], dtype=torch.float32)
        native.dequantize_absmax(weight, index, out)
    else:
        out = torch.ops.bitsandbytes.dequantize_blockwise(
            weight.absmax[index],
            weight.nested_absmax[index],
            dynamic_codebook(weight.packed.device),
            NESTED_BLOCK_SIZE,
            torch.float32,
        ).add_(weight.offset[index])
    return out.view(weight.out_features, -1)


def dequantize(weight: Nf4Bytes, index: int, out: Tensor, rows: slice, columns: slice) -> Tensor:
    """Part of one matrix into `out`; see `expertune.kernels.nf4.dequantize`.

    A tile of a few MiB that is written again and again stays in cache, from where the GEMM after it reads it.
    """
    if native.available() and out.dtype != torch.float16:
        native.dequantize(weight, index, (rows.start, rows.stop), (columns.start, columns.stop), out)
        return out
    if weight.scheme == "mxfp4":
        return reference.dequantize(weight, index, out, rows, columns)
    packed = weight.packed[index][rows, columns.start // 2 : columns.stop // 2].contiguous()
    absmax = dequantize_absmax(weight, index)[
        rows, columns.start // BLOCK_SIZE : columns.stop // BLOCK_SIZE
    ].contiguous()
    return out.copy_(
        torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK_SIZE, "nf4", list(out.shape), out.dtype)
    )


def _quantize_by_bitsandbytes(matrix_NK: Tensor, packed_NK: Tensor, absmax_NB: Tensor) -> None:
    """A tile of rows at a time: on a CPU the library works through half a dozen float32 copies of what it is given."""
    rows, columns = matrix_NK.shape
    step = max(TILE_WEIGHTS // columns, 1) if matrix_NK.device.type == "cpu" else rows
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        codes, state = bnb.quantize_4bit(matrix_NK[tile].contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
        packed_NK[tile] = codes.view(-1, columns // 2)
        absmax_NB[tile] = state.absmax.view(-1, columns // BLOCK_SIZE)
