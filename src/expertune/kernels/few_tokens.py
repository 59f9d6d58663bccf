"""Few tokens of an answer, on a CPU: a step of generation, which is as fast as weights are read.

What the fused route does for many tokens is one call of the native library for each layer here, without an operator
around it: a second of generation has thousands of calls. Products of tokens in float32 are off by 2e-6 at most. The
expert layer's part is `expert_mlp/few_tokens.py`.

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
from expertune.kernels.cpu import cpu_instruction_sets, gemm_dtype
from expertune.kernels.native.gemv import MOST_DENSE, MOST_ROUTED, Product, dense_gemv, gemv
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.routes import FUSED, KernelSettings

# Tokens of a matrix up to which this is faster than the grouped GEMM: in general; and in 16 bits on a CPU that has no
# instructions for them: measured when the grouped GEMM was in float32 there, and not since it is in integers too.
FEW = 4
FEW_WITHOUT_16_BITS = 32

# Tokens of which torch multiplies a 16-bit or float32 matrix slowly on a CPU with AVX2 alone: 32 by a head of 32,000 x
# 2048 took it 0.21 s in bfloat16 and 0.10 s in float32, and the native library 0.06 s each.
_DENSE = range(1, 65)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

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


def few(dtype: torch.dtype) -> int:
    """Tokens of a matrix up to which products in a dtype run here."""
    sixteen_bits = dtype != torch.float32
    return FEW_WITHOUT_16_BITS if sixteen_bits and gemm_dtype(dtype, torch.device("cpu")) != dtype else FEW


def serves(x: Tensor, routed: int, matrices: int, settings: KernelSettings) -> bool:
    """Whether products of these tokens run here: an answer is being written (see `answering`), and they are few.

    Args:
        x: the tokens.
        routed: how many, counted once for each matrix that they are multiplied by.
        matrices: how many there are.
        settings: leave the choice, or ask for the fused route.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and 0 < routed <= min(few(x.dtype) * matrices, MOST_ROUTED)
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
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    gemv([Product(weight, x_RK, y_RN)], x_RK.shape[0], fine=x_RK.dtype == torch.float32)
    return y_RN


def serves_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether `dense` multiplies tokens [..., K] by such a matrix faster than torch: on a CPU with AVX2 alone."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() // x.shape[-1] in _DENSE
        and weight.stride(1) == 1
        and "avx512_f" not in cpu_instruction_sets()
        and _copies.get() is not None
        and not torch.is_grad_enabled()
        and native.available()
    )


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] @ W.T of a matrix [N, K] in the same dtype, summed in float32; [..., N] of that dtype."""
    x_RK = x.reshape(-1, x.shape[-1]).float()
    y_RN = x_RK.new_empty(x_RK.shape[0], weight.shape[0])
    if len(x_RK) <= MOST_DENSE:
        dense_gemv(x_RK.contiguous(), weight, y_RN)
    else:
        native.grouped_gemm(x_RK, weight[None], torch.tensor([len(x_RK)]), y_RN, transposed=True)
    return y_RN.to(x.dtype).view(*x.shape[:-1], -1)
