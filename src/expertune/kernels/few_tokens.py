"""Few tokens of an answer, on a CPU: a step of generation, which is as fast as weights are read.

What the fused route does for many tokens is one call of the native library for each layer here, without an operator
around it: a second of generation has thousands of calls. Products of tokens in float32 are off by 2e-6 at most. The
expert layer's part is `expert_mlp/few_tokens.py`.

Generation asks for it (`answering`), because its arithmetic is not that of training: a forward whose log-probabilities
are compared with those of training, such as a reference's or an evaluation's, takes the route that training takes.

Shape suffixes: R tokens, K in_features, N out_features.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.cpu import cpu_instruction_sets, gemm_dtype
from expertune.kernels.native.gemv import MOST_DENSE, MOST_ROUTED, Gemvs, Product, dense_gemv
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.routes import FUSED, KernelSettings

# Tokens of a matrix up to which this is faster than the grouped GEMM: in general; and on a CPU with AVX2 alone, or in
# 16 bits without instructions for them. Two cores with AVX2, an expert layer of 8 experts: with 8 tokens each 45 ms and
# 60 ms by the grouped GEMM in bfloat16, 85 and 106 ms in float32; with 12 tokens 80 and 73 ms, 135 and 106 ms.
FEW, FEW_BY_AVX2 = 4, 10

# Tokens of which torch multiplies a 16-bit or float32 matrix slowly on a CPU with AVX2 alone: 32 by a head of 32,000 x
# 2048 took it 0.21 s in bfloat16 and 0.10 s in float32, and the native library 0.06 s each.
_DENSE = range(1, 65)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# While an answer is written: what is made of frozen weights, by what it is made for.
_made: ContextVar[dict[Hashable, Any] | None] = ContextVar("expertune_answering", default=None)

_Made = TypeVar("_Made")


@contextmanager
def answering() -> Iterator[None]:
    """While open, few tokens of this thread run here; frozen weights must not change meanwhile."""
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def _of_this_answer() -> dict[Hashable, Any] | None:
    # torch's compiler cannot follow `get`, and what it compiles is no answer's.
    return None if torch.compiler.is_compiling() else _made.get()


def once(owner: Hashable, make: Callable[[], _Made]) -> _Made:
    """What `make` gives; while an answer is written it is made once for each owner: of weights that stay in place."""
    return make() if _of_this_answer() is None else cast(_Made, in_answer(owner, make))


def in_answer(owner: Hashable, make: Callable[[], _Made]) -> _Made | None:
    """What `make` gives, made once for each owner while an answer is written; None where none is."""
    made = _of_this_answer()
    if made is None:
        return None
    if owner not in made:
        made[owner] = make()
    found: _Made = made[owner]
    return found


def few(dtype: torch.dtype) -> int:
    """Tokens of a matrix up to which products in a dtype run here."""
    by_avx2 = "avx512_f" not in cpu_instruction_sets() or gemm_dtype(dtype, torch.device("cpu")) != dtype
    return FEW_BY_AVX2 if by_avx2 else FEW


def serves(x: Tensor, routed: int, matrices: int, settings: KernelSettings) -> bool:
    """Whether products of these tokens run here: an answer is being written (see `answering`), and they are few.

    Args:
        x: the tokens.
        routed: how many, counted once for each matrix that they are multiplied by.
        matrices: how many there are.
        settings: leave the choice, or ask for the fused route.
    """
    return (
        _of_this_answer() is not None
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and 0 < routed <= min(few(x.dtype) * matrices, MOST_ROUTED)
        and asked_for(settings)
        and native.available()
    )


def asked_for(settings: KernelSettings) -> bool:
    """Whether settings and torch's modes leave few tokens to this."""
    return settings.route in ("auto", FUSED) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Linear:
    """x @ W.T of one 4-bit matrix while an answer is written, [..., K] -> [..., N] of x's dtype.

    Args:
        weight: one matrix; its buffers stay in place.
        dtype: of tokens.
        settings: leave the choice of a route, or ask for the fused one, where it `takes` any.
    """

    def __init__(self, weight: Nf4Bytes, dtype: torch.dtype, settings: KernelSettings) -> None:
        self._columns, self._rows = weight.in_features, weight.out_features
        self._dtype, self._settings = dtype, settings
        some = torch.empty(1, self._columns, dtype=dtype), torch.empty(1, self._rows, dtype=dtype)
        self._gemv = Gemvs([Product(weight, *some)], few(dtype), fine=dtype == torch.float32)
        self._most = few(dtype) * self._columns

    def takes(self, x: Tensor) -> bool:
        """Whether these are tokens for it."""
        return (
            x.dtype == self._dtype
            and 0 < x.numel() <= self._most
            and x.ndim > 1
            and x.is_cpu
            and asked_for(self._settings)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        self._settings.ran[FUSED] += 1
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._rows)
        self._gemv.place(0, x, y)
        self._gemv(x.numel() // self._columns)
        return y


def serves_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether `dense` multiplies tokens [..., K] by such a matrix faster than torch: on a CPU with AVX2 alone."""
    return (
        _of_this_answer() is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() // x.shape[-1] in _DENSE
        and weight.stride(1) == 1
        and "avx512_f" not in cpu_instruction_sets()
        and not torch.is_grad_enabled()
        and native.available()
    )


def serves_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes queries [B, H, T, D], keys and values [B, K, T, D]: of one token, of an answer."""
    return (
        _of_this_answer() is not None
        and query.shape[2] == 1
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and query.shape[1] % key.shape[1] == 0
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
