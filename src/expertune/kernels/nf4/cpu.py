"""The NF4 codec through bitsandbytes' own operators: on a CPU for decoding, on any device for quantizing.

Quantizing by the library itself is what makes the bytes the same as the library's, ties included.
"""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from expertune.kernels.nf4.reference import BLOCK_SIZE, NESTED_BLOCK_SIZE, dynamic_codebook


def quantize_matrix(matrix_NK: Tensor, double_quantization: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, K] -> packed [N, K/2], absmax, nested_absmax, offset (see `expertune.kernels.nf4`)."""
    packed, state = bnb.quantize_4bit(
        matrix_NK.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quantization, quant_type="nf4"
    )
    packed = packed.view(matrix_NK.shape[0], -1)
    if not double_quantization:
        empty = torch.empty(0, dtype=torch.float32, device=matrix_NK.device)
        return packed, state.absmax, empty, empty
    return packed, state.absmax, state.state2.absmax, state.offset.reshape(1)


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
