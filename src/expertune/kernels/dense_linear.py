"""y = x @ W.T of one frozen matrix of 16 bits, on a CPU that multiplies no 16-bit floats.

torch converts number by number there: of 16 tokens and a matrix of 4096 x 4096 a product takes it 26 ms, and an input
gradient 2.2 s, where these are made in 6 and 7 ms. The native library multiplies bfloat16 in integers of 16 bits;
what it does not take is converted to float32 some rows of W at a time.

Shape suffixes: R tokens, K in_features, N out_features, n of these in a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertune.kernels import native, workspace
from expertune.kernels.amounts import LINEAR_PART_BYTES
from expertune.kernels.operators import no_autocast

HALVES = (torch.bfloat16, torch.float16)

# Numbers of W that are converted at a time: they stay in the cache until they are multiplied.
_TILE = 2**21

# Parts of W have a multiple of so many rows.
_EVEN = 64


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
        in_integers = in_integers and native.available() and native.arithmetic(torch.bfloat16) == native.INTEGERS
        most = LINEAR_PART_BYTES // (4 * max(len(x), 1))
        parts = _parts(weight, most if in_integers else min(most, _TILE // max(weight.shape[1], 1)))
        return (_forward if transposed else _input_gradient)(x, weight, parts, in_integers)


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


def _parts(weight_NK: Tensor, most: int) -> Iterator[slice]:
    """W's rows, about as many at a time."""
    step = max(most // _EVEN * _EVEN, _EVEN)
    return (slice(start, min(start + step, len(weight_NK))) for start in range(0, len(weight_NK), step))


def _forward(x_RK: Tensor, weight_NK: Tensor, parts: Iterator[slice], in_integers: bool) -> Tensor:
    """x @ W.T; what is float32 takes turns in the same memory."""
    y_RN = x_RK.new_empty(len(x_RK), len(weight_NK))
    x32 = workspace.as_float(x_RK, "linear_input")
    for part in parts:
        out = workspace.take("linear_output", len(x_RK), part.stop - part.start)
        if in_integers:
            _multiply_integers(x32, weight_NK[part], out, transposed=True)
        else:
            torch.mm(x32, weight_NK[part].float().t(), out=out)
        y_RN[:, part] = out
    return y_RN


def _input_gradient(dy_RN: Tensor, weight_NK: Tensor, parts: Iterator[slice], in_integers: bool) -> Tensor:
    """dy @ W; the sum over parts is float32."""
    shape = len(dy_RN), weight_NK.shape[1]
    total = workspace.take("linear_output", *shape).zero_()
    for part in parts:
        dy32 = workspace.as_float(dy_RN[:, part], "linear_input")
        if not in_integers:
            total.addmm_(dy32, weight_NK[part].float())
            continue
        is_whole = part.stop - part.start == len(weight_NK)
        out = total if is_whole else workspace.take("linear_part", *shape)
        _multiply_integers(dy32, weight_NK[part], out, transposed=False)
        if not is_whole:
            total += out
    return total.to(dy_RN.dtype)


def _multiply_integers(x32: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> None:
    native.grouped_gemm(x32, weight[None], torch.tensor([len(x32)]), out, transposed=transposed, dtype=torch.bfloat16)
