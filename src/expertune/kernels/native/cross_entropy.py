"""Logits and their gradients beside the GEMMs of an output head, by the native library.

Shape suffixes: n tokens, v vocabulary of a tile, r rank.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.native import call

_SLICE = 256  # columns that cross_entropy.c works on at once


class Head(NamedTuple):
    """What becomes of products z: softcap * tanh(scale * (z + h @ b.T + bias) / softcap).

    Attributes:
        h_nr: float32 [n, r], contiguous.
        b_vr: float32 [v, r], contiguous.
        bias_v: float32 [v], or None.
        scale: factor.
        softcap: None caps nothing.
    """

    h_nr: Tensor
    b_vr: Tensor
    bias_v: Tensor | None
    scale: float
    softcap: float | None


def logits(z_nv: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Contiguous products, float32 (overwritten) or bfloat16 -> float32 logits [n, v], and their log-sum-exp [n]."""
    rows, columns = z_nv.shape
    out = z_nv if z_nv.dtype == torch.float32 else torch.empty(rows, columns)
    log_sums = torch.empty(-(-columns // _SLICE), rows)
    arguments = _arguments(head, z_nv, out, log_sums=log_sums.data_ptr())
    call("expertune_logits", ctypes.byref(arguments))
    return out, torch.logsumexp(log_sums, dim=0)


def gradients(
    logits_nv: Tensor,
    head: Head,
    log_sum_n: Tensor,
    label_n: Tensor,
    weight_n: Tensor | None,
    db_vr: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradient of the products, [n, v] of `dtype`, and of h, [n, r]; that of b is added to `db_vr`.

    Args:
        logits_nv: what `logits` gave; overwritten where `dtype` is float32.
        head: the same again.
        log_sum_n: float32 [n], log-sum-exp over the whole vocabulary.
        label_n: int64 [n], the label's column in the tile, outside of it where it has none.
        weight_n: float32 [n], of each row's loss; None means ones.
        db_vr: float32 [v, r], contiguous.
        dtype: float32 or bfloat16.
    """
    rows, columns = logits_nv.shape
    rounded = None if dtype == torch.float32 else torch.empty(rows, columns, dtype=dtype)
    dh = torch.empty(-(-columns // _SLICE), *head.h_nr.shape)
    arguments = _arguments(
        head,
        logits_nv,
        logits_nv,
        log_sum=log_sum_n.data_ptr(),
        label=label_n.data_ptr(),
        weight=None if weight_n is None else weight_n.data_ptr(),
        rounded=None if rounded is None else rounded.data_ptr(),
        dh=dh.data_ptr(),
        db=db_vr.data_ptr(),
    )
    call("expertune_logit_gradients", ctypes.byref(arguments))
    return (logits_nv if rounded is None else rounded), dh.sum(dim=0)


class _Logits(ctypes.Structure):
    """`Logits` of cross_entropy.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("z", "logits", "h", "b", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("bfloat", "threads")),
        *((name, ctypes.c_void_p) for name in ("log_sums", "log_sum", "label", "weight", "rounded", "dh", "db")),
    )


def _arguments(head: Head, z_nv: Tensor, logits_nv: Tensor, **pointers: int | None) -> _Logits:
    return _Logits(
        z=z_nv.data_ptr(),
        logits=logits_nv.data_ptr(),
        h=head.h_nr.data_ptr(),
        b=head.b_vr.data_ptr(),
        bias=None if head.bias_v is None else head.bias_v.data_ptr(),
        rows=z_nv.shape[0],
        columns=z_nv.shape[1],
        rank=head.h_nr.shape[1],
        scale=head.scale,
        softcap=head.softcap or 0.0,
        bfloat=z_nv.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **pointers,
    )
