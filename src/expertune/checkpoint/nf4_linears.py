"""A linear layer as bitsandbytes' `Linear4bit`: from a matrix, from packed bytes, or without any yet."""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Fit, quantize_matrix
from expertune.kernels.nf4.reference import dynamic_codebook, nf4_codebook
from expertune.layers.nf4_linear import Nf4Linear


def quantized_linear(
    linear: nn.Linear,
    matrix: Tensor,
    double_quantization: bool,
    dtype: torch.dtype,
    device: torch.device,
    fit: Fit | None = None,
) -> Nf4Linear:
    """A `Linear4bit` of bitsandbytes with the NF4 bytes of `matrix`, in the place of `linear`, whose bias it keeps.

    The bytes are those that bitsandbytes' parameter gives itself, which on a CPU takes it twenty times as long.

    Raises:
        ValueError: a weight is NaN or infinite, or rows cannot be cut into blocks.
    """
    quantized = empty_linear(linear, dtype)
    packed, absmax, nested_absmax, offset = quantize_matrix(matrix.to(device), double_quantization, fit)
    nested = QuantState(
        nested_absmax, code=dynamic_codebook(packed.device), blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
    )
    state = QuantState(
        absmax,
        shape=matrix.shape,
        code=nf4_codebook(packed.device),
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        # bitsandbytes dequantizes to it in training, and to the input's in evaluation; here both are one.
        dtype=dtype,
        offset=offset[0] if double_quantization else None,
        state2=nested if double_quantization else None,
    )
    quantized.weight = bnb.nn.Params4bit(
        packed.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quantization,
        quant_type="nf4",
        module=quantized,
        bnb_quantized=True,
    )
    quantized.quant_state = state
    return quantized


def linear_of_bytes(
    linear: nn.Linear, packed: Tensor, state: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> Nf4Linear:
    """A `Linear4bit` of bitsandbytes around packed bytes, in the place of `linear`, whose bias it keeps.

    Args:
        linear: the model's own layer; its weight is not read.
        packed: uint8 [N*K/2, 1].
        state: bitsandbytes' state by part, e.g. `absmax`, `quant_state.bitsandbytes__nf4`.
        dtype: dtype of the products.
        device: where the bytes live.
    """
    quantized = empty_linear(linear, dtype)
    quantized.weight = bnb.nn.Params4bit.from_prequantized(packed, state, device=device, module=quantized)
    quantized.compress_statistics = quantized.weight.compress_statistics
    # Whatever the file's weights were before, products run in this dtype.
    quantized.weight.quant_state.dtype = dtype
    return quantized


def empty_linear(linear: nn.Linear, dtype: torch.dtype) -> Nf4Linear:
    """A 4-bit linear without bytes, on the meta device, in the place of `linear`, whose bias it keeps."""
    quantized = Nf4Linear(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    packed = torch.empty(linear.in_features * linear.out_features // 2, 1, dtype=torch.uint8, device="meta")
    quantized.weight = bnb.nn.Params4bit(packed, requires_grad=False, bnb_quantized=True, module=quantized)
    quantized.bias = linear.bias
    # In evaluation on a CPU with AVX512-BF16, bitsandbytes would repack the weight and round its scales to bfloat16
    # for good: the first evaluation would change the frozen weights under a training run.
    quantized.support_avx512bf16_for_cpu = False
    return quantized
