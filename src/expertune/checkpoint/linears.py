"""Linear layers beside the experts: which there are, and how one of them becomes bitsandbytes' `Linear4bit`."""

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from expertune.experts.contract import ExpertsSpec
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Fit, quantize_matrix
from expertune.kernels.nf4.reference import dynamic_codebook, nf4_codebook
from expertune.layers.nf4_linear import Nf4Linear

NF4_STATE = "quant_state.bitsandbytes__nf4"
"""The part of a saved 4-bit weight that is JSON, by bitsandbytes' name."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes x @ W.T + b and nothing else: a subclass may group, clip or scale."""
    if isinstance(module, Linear4bit):
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def decoder_layers(model: nn.Module, specs: Mapping[str, ExpertsSpec]) -> Iterator[tuple[str, nn.Module]]:
    """Every repeated layer with its dotted name, dense ones among sparse ones included.

    A layer is a child of the outermost `ModuleList` that leads to an experts module; the layers of a vision tower or
    an encoder without experts are none.
    """
    seen: set[str] = set()
    for experts in specs:
        path = experts.split(".")
        for depth in range(1, len(path)):
            name = ".".join(path[:depth])
            module = model.get_submodule(name)
            if isinstance(module, nn.ModuleList):
                if name not in seen:
                    seen.add(name)
                    yield from ((f"{name}.{index}", layer) for index, layer in enumerate(module))
                break


def attention_linears(model: nn.Module, specs: Mapping[str, ExpertsSpec]) -> Iterator[str]:
    """Linears of the blocks that mix tokens: attention, and what stands in its place in hybrid models.

    transformers gives such a block its `layer_idx`, the slot it takes in the cache; feed-forward blocks have none.
    """
    for layer_name, layer in decoder_layers(model, specs):
        for child, block in layer.named_children():
            path = f"{layer_name}.{child}"
            if hasattr(block, "layer_idx") and not any(name == path or name.startswith(f"{path}.") for name in specs):
                yield from (name for name, module in block.named_modules(prefix=path) if is_linear(module))


def quantized_linear(
    linear: nn.Linear,
    matrix: Tensor,
    double_quantization: bool,
    dtype: torch.dtype,
    device: torch.device,
    fit: Fit | None = None,
) -> Nf4Linear:
    """A `Linear4bit` of bitsandbytes with the NF4 bytes of `matrix`, in the place of `linear`, whose bias it keeps."""
    quantized = empty_linear(linear, dtype)
    if fit is not None:
        quantized.weight = _fitted(matrix.to(device), double_quantization, fit, quantized)
        quantized.weight.quant_state.dtype = dtype
        return quantized
    quantized.weight = bnb.nn.Params4bit(
        matrix,
        requires_grad=False,
        compress_statistics=double_quantization,
        quant_type="nf4",
        blocksize=BLOCK_SIZE,
        module=quantized,
    ).to(device)
    # bitsandbytes dequantizes to the source's dtype in training and to the input's in evaluation; here both are one.
    quantized.weight.quant_state.dtype = dtype
    return quantized


def _fitted(matrix: Tensor, double_quantization: bool, fit: Fit, linear: Nf4Linear) -> bnb.nn.Params4bit:
    """A matrix as bitsandbytes holds it, with scales that were chosen by error."""
    packed, absmax, nested_absmax, offset = quantize_matrix(matrix, double_quantization, fit)
    nested = QuantState(
        nested_absmax, code=dynamic_codebook(matrix.device), blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
    )
    state = QuantState(
        absmax,
        shape=matrix.shape,
        code=nf4_codebook(matrix.device),
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=matrix.dtype,
        offset=offset[0] if double_quantization else None,
        state2=nested if double_quantization else None,
    )
    return bnb.nn.Params4bit(
        packed.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quantization,
        quant_type="nf4",
        module=linear,
        bnb_quantized=True,
    )


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
