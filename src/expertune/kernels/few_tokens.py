"""Few tokens of an answer, on a CPU: a step of generation, which is as fast as weights are read.

What the fused route does for many tokens is one call of the native library for each layer here, without an operator
around it: a second of generation has thousands of calls. Tokens in 16 bits alone; those in float32 keep float32
arithmetic. The expert layer's part is `expert_mlp/few_tokens.py`.

Generation asks for it (`answering`), because its arithmetic is not that of training: a forward whose log-probabilities
are compared with those of training, such as a reference's or an evaluation's, takes the route that training takes.

Shape suffixes: R tokens, K in_features, N out_features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.native.gemv import MOST_ROUTED, Product, gemv
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.routes import FUSED, KernelSettings

# Tokens of a matrix up to which reading its bytes takes longer than multiplying them.
FEW = 4

_DTYPES = (torch.bfloat16, torch.float16)

# While an answer is written: float32 copies of frozen tensors, by name.
_copies: ContextVar[dict[str, tuple[Tensor, ...]] | None] = ContextVar("expertune_answering", default=None)


@contextmanager
def answering() -> Iterator[None]:
    """While open, few tokens of this thread run here; frozen weights must not change meanwhile."""
    token = _copies.set({})
    try:
        yield
    finally:
        _copies.reset(token)


def as_float_once(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that lie where they are while an answer is written, in float32; copied once for each name."""
    copies = _copies.get()
    if copies is None:
        return tuple(tensor.float() for tensor in tensors)
    if name not in copies:
        copies[name] = tuple(tensor.float() for tensor in tensors)
    return copies[name]


def serves(x: Tensor, routed: int, matrices: int, settings: KernelSettings) -> bool:
    """Whether products of these tokens run here: an answer is being written (see `answering`), and they are few.

    Args:
        x: the tokens.
        routed: how many, counted once for each matrix that they are multiplied by.
        matrices: how many there are.
        settings: leave the choice, or ask for the fused route.
    """
    return (
        0 < routed <= min(FEW * matrices, MOST_ROUTED)
        and x.dtype in _DTYPES
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and _copies.get() is not None
        and not torch.is_grad_enabled()
        and settings.route in ("auto", FUSED)
        and native.available()
    )


def linear(x_RK: Tensor, weight: Nf4Bytes, settings: KernelSettings) -> Tensor:
    """x @ W.T of one matrix, [R, N] of x's dtype."""
    settings.ran[FUSED] += 1
    y_RN = x_RK.new_empty(x_RK.shape[0], weight.out_features)
    gemv([Product(weight, x_RK if x_RK.stride(1) == 1 else x_RK.contiguous(), y_RN)], x_RK.shape[0])
    return y_RN
