"""y = x @ W.T of one frozen matrix of 16 bits, on a CPU that multiplies no 16-bit floats.

torch converts number by number there: of 16 tokens and a matrix of 4096 x 4096 a product takes it 26 ms, and an input
gradient 2.2 s, where these are made in 6 and 7 ms. The native library multiplies bfloat16 in integers of 16 bits;
what it does not take is converted to float32 some rows of W at a time.

Shape suffixes: R tokens, K in_features, N out_features, n of these in a tile.
"""

from typing import Any

import torch
from torch import Tensor

from expertune.kernels import native, workspace
from expertune.kernels.linear import fused_product
from expertune.kernels.operators import no_autocast

HALVES = (torch.bfloat16, torch.float16)

# Numbers of W that are converted at a time: they stay in the cache until they are multiplied.
_TILE = 2**21


def dense_linear(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """Multiply tokens by a frozen matrix of the same 16-bit dtype, [R, N] of it; sums are float32.

    Args:
        x_RK: [R, K] on a CPU.
        weight_NK: [N, K] beside it; gets no gradient.

    Raises:
        ValueError: a shape or dtype does not fit; names what was received.
    """
    if weight_NK.ndim != 2 or x_RK.ndim != 2 or x_RK.shape[1] != weight_NK.shape[1]:
        raise ValueError(f"x {tuple(x_RK.shape)} and weight {tuple(weight_NK.shape)} must be [R, K] and [N, K]")
    if x_RK.dtype not in HALVES or weight_NK.dtype != x_RK.dtype:
        raise ValueError(f"x and weight must be both bfloat16 or both float16, got {x_RK.dtype}, {weight_NK.dtype}")
    out: Tensor = torch.ops.expertune.dense_linear(x_RK, weight_NK, True)
    return out


@torch.library.custom_op("expertune::dense_linear", mutates_args=())
def _product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """x @ W.T, or x @ W, which is the former's input gradient."""
    with no_autocast(x):
        in_integers = weight.dtype == torch.bfloat16 and weight.stride(1) == 1 and weight.numel() > 0
        if in_integers and native.available() and native.arithmetic(torch.bfloat16) == native.INTEGERS:
            return fused_product(x, weight[None], _columns(weight, transposed), transposed)
        return _in_tiles(x, weight, transposed)


@_product.register_fake
def _(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], _columns(weight, transposed))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, weight, ctx.transposed = inputs
    ctx.save_for_backward(weight)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.expertune.dense_linear(dy, *ctx.saved_tensors, not ctx.transposed), None, None


_product.register_autograd(_autograd, setup_context=_setup_context)


def _columns(weight_NK: Tensor, transposed: bool) -> int:
    return weight_NK.shape[0 if transposed else 1]


def _in_tiles(x: Tensor, weight_NK: Tensor, transposed: bool) -> Tensor:
    """By torch in float32; what is float32 takes turns in the same memory."""
    out = workspace.take("linear_output", x.shape[0], _columns(weight_NK, transposed))
    x32 = workspace.as_float(x, "linear_input")
    if not transposed:
        out.zero_()
    step = max(_TILE // max(weight_NK.shape[1], 1), 1)
    for start in range(0, len(weight_NK), step):
        weight_nK = weight_NK[start : start + step].float()
        part = slice(start, start + len(weight_nK))
        if transposed:
            torch.mm(x32, weight_nK.t(), out=out[:, part])
        else:
            out.addmm_(x32[:, part], weight_nK)
    return out.to(x.dtype)
