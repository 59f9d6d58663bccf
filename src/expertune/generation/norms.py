"""A family's RMS norms as one call each while few tokens of an answer pass through them on a CPU.

A family writes its norm as six small operators of torch. Between products that stream all weights through the caches
each of these takes 10 to 20 us: 80 us a norm, of which a layer has two to four. Which modules are such norms is tried,
on numbers; the answer is the norm's up to one rounding of 16 bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from expertune.kernels import native
from expertune.kernels.native.norm import rms_norm

# Rows up to which one thread is faster than torch's operators.
_MOST_ROWS = 64

# By dtype: what a family's own order of roundings, of which there are two in 16 bits, may differ by.
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Form(NamedTuple):
    """x / sqrt(mean(x ** 2) + eps) * (weight + beyond)."""

    eps: float
    beyond: float


_FORMS: WeakKeyDictionary[nn.Module, Form | None] = WeakKeyDictionary()


@contextmanager
def norms_in_one_call(model: nn.Module) -> Iterator[None]:
    """While open, norms of few tokens run so; others, and whatever has a gradient, as the family has them."""
    replaced: list[nn.Module] = []
    try:
        for module in model.modules() if native.available() else ():
            if "forward" not in module.__dict__ and (form := form_of(module)) is not None:
                (weight,) = module.parameters()
                module.forward = partial(_forward, module.forward, weight, form)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def form_of(module: nn.Module) -> Form | None:
    """What an RMS norm computes; None where a module, on a CPU, is none. Tried once for each module."""
    if module not in _FORMS:
        _FORMS[module] = _try(module)
    return _FORMS[module]


def _forward(own: Any, weight: Tensor, form: Form, x: Tensor, *others: Any, **more: Any) -> Tensor:
    served = (
        not others
        and not more
        and x.dtype == weight.dtype
        and x.shape[-1] == weight.numel()
        and 0 < x.numel() <= _MOST_ROWS * weight.numel()
        and x.is_cpu
        and x.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    return rms_norm(x, weight, *form) if served else own(x, *others, **more)


@torch.no_grad()
def _try(module: nn.Module) -> Form | None:
    weights = list(module.parameters())
    if len(weights) != 1 or weights[0].ndim != 1 or weights[0] is not getattr(module, "weight", None):
        return None
    weight, close = weights[0], _CLOSE.get(weights[0].dtype)
    if close is None or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    generator = torch.Generator().manual_seed(0)
    # Small enough for eps to count, usual and large; no mean of 0, which another norm would take off.
    numbers = torch.randn(3, weight.numel(), generator=generator) + 0.5
    x = (numbers * torch.tensor([[1e-3], [1.0], [30.0]])).to(weight.dtype)
    try:
        found = module.forward(x)  # without hooks
    except Exception:  # whatever else has one such weight
        return None
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (x.shape, x.dtype):
        return None
    if not found.any():  # of weights of 0, nothing can be told
        return None
    wide = x.float()
    squares = wide.square().mean(dim=1, keepdim=True)
    for eps in {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1}:
        for beyond in (0.0, 1.0):
            expected = wide * torch.rsqrt(squares + eps) * (weight.float() + beyond)
            if torch.allclose(found.float(), expected, rtol=close, atol=0):
                return Form(eps, beyond)
    return None
