"""The NF4 codec through bitsandbytes' own operators: on a CPU for decoding, on any device for quantizing.

Quantizing by the library itself is what makes the bytes the same as the library's, ties included.
"""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from expertune.kernels.nf4.reference import BLOCK_SIZE, NESTED_BLOCK_SIZE, dynamic_codebook

# Weights of one tile: 4 MiB in float32, which stays in cache.
TILE_WEIGHTS = 2**20


def quantize_matrix(matrix_NK: Tensor, double_quantization: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, K] -> packed [N, K/2], absmax, nested_absmax, offset (see `expertune.kernels.nf4`).

    A tile of rows at a time: on a CPU the library works through half a dozen float32 copies of what it is given.
    """
    rows, columns = matrix_NK.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=matrix_NK.device)
    absmax = torch.empty(rows, columns // BLOCK_SIZE, dtype=torch.float32, device=matrix_NK.device)
    step = max(TILE_WEIGHTS // columns, 1) if matrix_NK.device.type == "cpu" else rows
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        codes, state = bnb.quantize_4bit(matrix_NK[tile].contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
        packed[tile] = codes.view(-1, columns // 2)
        absmax[tile] = state.absmax.view(-1, columns // BLOCK_SIZE)
    absmax = absmax.flatten()
    if not double_quantization:
        empty = torch.empty(0, dtype=torch.float32, device=matrix_NK.device)
        return packed, absmax, empty, empty
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    return packed, codes, state.absmax, offset.reshape(1)


def decode_absmax(absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """8-bit codes [n] and their scales -> float32 absmax [n]."""
    values = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, nested_absmax, dynamic_codebook(absmax.device), NESTED_BLOCK_SIZE, torch.float32
    )
    return values.add_(offset)


def decode_rows(packed_NK: Tensor, absmax_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed uint8 [N, K/2] and float32 absmax [N, K/64] -> [N, K] of `dtype`.

    Tiles of a few MiB come out of the allocator warm, so that a decoded tile is still in cache when the product reads
    it: 15-25 GB/s of output, against 3 GB/s into a fresh large buffer whose pages fault in.
    """
    rows, half = packed_NK.shape
    return torch.ops.bitsandbytes.dequantize_4bit(
        packed_NK.contiguous(), absmax_NB.contiguous(), BLOCK_SIZE, "nf4", [rows, 2 * half], dtype
    )
