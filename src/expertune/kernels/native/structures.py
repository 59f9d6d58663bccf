"""What the native library's functions take beside tensors, and the same as C holds it."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.nf4.bytes import Nf4Bytes
from expertune.kernels.nf4.reference import codebook, dynamic_codebook

SOURCE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DENSE_KINDS = {torch.float32: 1, torch.bfloat16: 2}
NF4_KIND = 0


class Dropout(NamedTuple):
    """Which elements of R rows are dropped; see `expertune.kernels.dropout`.

    Attributes:
        number_R: int64 [R].
        seed: 0 <= seed < 2**63.
        threshold: elements whose hash is below are dropped.
        scale: of the others.
        columns: of the whole rows, by which elements are numbered.
    """

    number_R: Tensor
    seed: int
    threshold: int
    scale: float
    columns: int


class Update(NamedTuple):
    """A low-rank update of some columns: y[:, column:column_end] += h @ b[e], or what of it is not dropped.

    Attributes:
        h_Rr: float32 [R, r], already scaled.
        b: float32, contiguous: [E, column_end - column, r] where the GEMM is transposed, [E, r, column_end - column]
            where it is not.
        column, column_end: the columns of y.
        slots: int64 [E], which matrix of b is each expert's, -1 for none; None where each has its own number's.
        dropout: of what is added, where the GEMM is not transposed.
    """

    h_Rr: Tensor
    b: Tensor
    column: int
    column_end: int
    slots: Tensor | None = None
    dropout: Dropout | None = None


class NativeNf4(ctypes.Structure):
    """`Nf4` of common.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("nested_stride", ctypes.c_int64),
        ("halves", ctypes.c_int64),
    )

    @classmethod
    def of(cls, weight: Nf4Bytes) -> "NativeNf4":
        """Pointers into the weight's buffers, which have to live as long."""
        double = weight.double_quantization
        return cls(
            packed=weight.packed.data_ptr(),
            absmax=weight.absmax.data_ptr(),
            nested=weight.nested_absmax.data_ptr() if double else None,
            offset=weight.offset.data_ptr() if double else None,
            codebook=dynamic_codebook(weight.packed.device).data_ptr() if double else None,
            values=codebook(weight.scheme, weight.packed.device).data_ptr(),
            rows=weight.out_features,
            columns=weight.in_features,
            nested_stride=weight.nested_absmax.shape[-1],
            halves=weight.scheme == "mxfp4",
        )


class NativeDropout(ctypes.Structure):
    """`Dropout` of grouped_gemm.h."""

    _fields_ = (
        ("number", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("seed", "seed_high", "threshold")),
        ("scale", ctypes.c_float),
    )

    @classmethod
    def of(cls, dropout: Dropout | None) -> "NativeDropout | None":
        """With a pointer to the numbers of rows, which have to live as long; None of None."""
        if dropout is None:
            return None
        number_R, seed, threshold, scale, columns = dropout
        halves = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        return cls(number_R.data_ptr(), columns, *halves, threshold, scale)


class NativeUpdate(ctypes.Structure):
    """`Update` of grouped_gemm.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("h", "b", "slots", "dropout")),
        *((name, ctypes.c_int64) for name in ("rank", "h_stride", "b_expert_stride", "column", "column_end")),
    )


class NativeProduct(ctypes.Structure):
    """`Product` of grouped_gemm.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "index", "offsets", "nf4", "dense", "slots", "updates")),
        *((name, ctypes.c_void_p) for name in ("dropout", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "dense_stride", "dense_expert_stride")),
        *((name, ctypes.c_int64) for name in ("experts", "parts", "depth", "columns")),
        *((name, ctypes.c_int32) for name in ("kind", "transposed", "num_updates", "threads", "arithmetic", "swiglu")),
        ("scratch", ctypes.c_void_p),
        ("scratch_stride", ctypes.c_int64),
    )


def native_updates(updates: Sequence[Update]) -> tuple[ctypes.Array[NativeUpdate], list[NativeDropout | None]]:
    """As the library takes them, and what they point to."""
    dropped = [NativeDropout.of(update.dropout) for update in updates]
    held = (NativeUpdate * len(updates))(
        *(
            NativeUpdate(
                h=update.h_Rr.data_ptr(),
                b=update.b.data_ptr(),
                slots=None if update.slots is None else update.slots.data_ptr(),
                dropout=dropout and ctypes.addressof(dropout),
                rank=update.h_Rr.shape[1],
                h_stride=update.h_Rr.stride(0),
                b_expert_stride=update.b.stride(0),
                column=update.column,
                column_end=update.column_end,
            )
            for update, dropout in zip(updates, dropped, strict=True)
        )
    )
    return held, dropped
