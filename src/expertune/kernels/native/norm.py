"""Root mean square normalization of few rows, `norm.c`, on tensors."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from expertune.kernels.native import function
from expertune.kernels.native.structures import SOURCE_KINDS


def rms_norm(x: Tensor, weight: Tensor, eps: float, beyond: float = 0.0) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * (weight + beyond), computed in float32, rounded once to x's dtype.

    Args:
        x: [..., D], contiguous; float32, bfloat16 or float16.
        weight: [D], contiguous, of x's dtype.
        eps: added to the mean of the squares.
        beyond: added to the weight.
    """
    y, columns = torch.empty_like(x), weight.numel()
    pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    _function()(*pointers, SOURCE_KINDS[x.dtype], x.numel() // columns, columns, eps, beyond)
    return y


@cache
def _function() -> Callable[..., int]:
    found = function("expertune_rms_norm")
    pointers, numbers = [ctypes.c_void_p] * 3, [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    found.argtypes = [*pointers, *numbers, ctypes.c_float, ctypes.c_float]  # type: ignore[attr-defined]
    return found
