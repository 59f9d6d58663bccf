"""y = x @ W.T of one frozen 4-bit matrix, on a CPU: dense linears beside the experts.

The operator `expertune::nf4_linear` is registered with torch, so that activation checkpointing and `torch.compile` see
one node; its backward gives dX and never a dW, because the weight is frozen. It takes the routes that experts take:
dequantize inside the GEMM (the native library), or a tile at a time before it (`dequant_gemm.py`).

Shape suffixes: R tokens, K in_features, N out_features.
"""

from typing import Any

import torch
from torch import Tensor

from expertune.kernels import native, workspace
from expertune.kernels.cpu import gemm_dtype
from expertune.kernels.dequant_gemm import Scratch, multiply, multiply_input_gradient
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.operators import find, no_autocast
from expertune.kernels.routes import DEFAULT_SETTINGS, FUSED, KernelSettings

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def nf4_linear(x_RK: Tensor, weight: Nf4Bytes, settings: KernelSettings = DEFAULT_SETTINGS) -> Tensor:
    """Multiply tokens by a matrix.

    Args:
        x_RK: [R, K] on a CPU; its dtype decides what the GEMM multiplies (`native.arithmetic`).
        weight: one matrix [N, K].
        settings: say which route runs.

    Returns:
        [R, N] of x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the value received.
    """
    if x_RK.ndim != 2 or x_RK.shape[1] != weight.in_features:
        raise ValueError(f"x must be [tokens, {weight.in_features}], got {tuple(x_RK.shape)}")
    if x_RK.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x_RK.dtype}")
    if weight.packed.shape[0] != 1:
        raise ValueError(f"weight must be one matrix, got {weight.packed.shape[0]}")
    for tensor, what in ((x_RK, "x"), (weight.packed, "weight")):
        if tensor.device.type != "cpu":
            raise ValueError(f"{what} must be on a CPU, got {tensor.device}")
    out: Tensor = torch.ops.expertune.nf4_linear(x_RK, *weight, settings.name)
    return out


_WEIGHT = "Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset, str settings"


@torch.library.custom_op("expertune::nf4_linear", mutates_args=(), schema=f"(Tensor x, {_WEIGHT}) -> Tensor")
def _forward(x: Tensor, *weight_and_settings: Any) -> Tensor:
    *weight, settings = weight_and_settings
    with no_autocast(x):
        fused = find(settings).choose(x.device, x.shape[0], x.dtype) == FUSED
        return (fused_forward if fused else dequant_gemm_forward)(x, Nf4Bytes(*weight))


@_forward.register_fake
def _(x: Tensor, packed: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[1])


@torch.library.custom_op("expertune::nf4_linear_backward", mutates_args=(), schema=f"(Tensor dy, {_WEIGHT}) -> Tensor")
def _backward(dy: Tensor, *weight_and_settings: Any) -> Tensor:
    *weight, settings = weight_and_settings
    with no_autocast(dy):
        fused = find(settings).choose(dy.device, dy.shape[0], dy.dtype) == FUSED
        return (fused_backward if fused else dequant_gemm_backward)(dy, Nf4Bytes(*weight))


@_backward.register_fake
def _(dy: Tensor, packed: Tensor, *_others: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], packed.shape[2] * 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *weight, ctx.settings = inputs
    ctx.save_for_backward(*weight)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx = torch.ops.expertune.nf4_linear_backward(dy, *ctx.saved_tensors, ctx.settings)
    return dx, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def dequant_gemm_forward(x_RK: Tensor, weight: Nf4Bytes) -> Tensor:
    """The GEMM, a dequantized tile at a time."""
    dtype = gemm_dtype(x_RK.dtype, x_RK.device)
    y_RN = x_RK.new_empty(x_RK.shape[0], weight.out_features)
    if x_RK.shape[0]:
        multiply(x_RK.to(dtype), weight, 0, y_RN, Scratch(x_RK.device, dtype))
    return y_RN


def dequant_gemm_backward(dy_RN: Tensor, weight: Nf4Bytes) -> Tensor:
    """dX, a dequantized tile at a time."""
    dtype = gemm_dtype(dy_RN.dtype, dy_RN.device)
    dx_RK = dy_RN.new_empty(dy_RN.shape[0], weight.in_features)
    if dy_RN.shape[0]:
        multiply_input_gradient(dy_RN.contiguous().to(dtype), weight, 0, 1, dx_RK, Scratch(dy_RN.device, dtype))
    return dx_RK


def fused_forward(x_RK: Tensor, weight: Nf4Bytes) -> Tensor:
    """The GEMM in the native library, which dequantizes inside; sums in float32."""
    return _fused_product(x_RK, weight, weight.out_features, transposed=True)


def fused_backward(dy_RN: Tensor, weight: Nf4Bytes) -> Tensor:
    """dX in the native library."""
    return _fused_product(dy_RN, weight, weight.in_features, transposed=False)


def _fused_product(x: Tensor, weight: Nf4Bytes, columns: int, transposed: bool) -> Tensor:
    """x @ W.T or x @ W by the native library, of x's dtype; what float32 it takes besides has turns in one memory."""
    shape = x.shape[0], columns
    out = torch.empty(shape) if x.dtype == torch.float32 else workspace.take("linear_output", *shape)
    offsets = torch.tensor([x.shape[0]])
    native.grouped_gemm(
        workspace.as_float(x, "linear_input"), weight, offsets, out, transposed=transposed, dtype=x.dtype
    )
    return out.to(x.dtype)
