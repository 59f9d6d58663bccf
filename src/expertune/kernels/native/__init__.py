"""The C library of the CPU routes, and its functions on tensors.

Everything here takes CPU tensors that the callers have checked; strides in the last dimension are 1. Threads are as
many as torch uses.

Shape suffixes: R tokens sorted by expert, K contraction, N columns of the output, E experts, r rank.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from expertune.kernels import workspace
from expertune.kernels.amounts import scratch_bytes
from expertune.kernels.native.build import Status, library, status
from expertune.kernels.native.structures import (
    DENSE_KINDS,
    NF4_KIND,
    SOURCE_KINDS,
    Dropout,
    NativeDropout,
    NativeNf4,
    NativeProduct,
    Update,
    native_updates,
)
from expertune.kernels.nf4.bytes import Nf4Bytes
from expertune.kernels.nf4.reference import (
    BLOCK_SIZE,
    FIT_ROUNDS,
    fit_factors,
    nf4_bounds,
    nf4_codebook,
)

__all__ = [
    "AMX",
    "INTEGERS",
    "Dropout",
    "Status",
    "Update",
    "arithmetic",
    "available",
    "bfloat16_arithmetic",
    "call",
    "dequantize",
    "dequantize_absmax",
    "dropout",
    "encode",
    "fit",
    "function",
    "grouped_gemm",
    "outer",
    "quantize",
    "status",
    "swiglu",
    "swiglu_backward",
]

# What multiplies NF4 weights, as grouped_gemm.h counts: matrix units, and integers of 16 bits.
AMX, INTEGERS = 2, 3


def available() -> bool:
    """Whether the library could be built and loaded; `status().reason` says where it is, or why not."""
    return library() is not None


@cache
def bfloat16_arithmetic() -> int:
    """What multiplies bfloat16 on this CPU: 2 AMX, 1 AVX512-BF16, 0 nothing."""
    return call("expertune_bfloat16")


def arithmetic(dtype: torch.dtype) -> int:
    """What multiplies NF4 or bfloat16 weights with tokens of a dtype: 3 integers, 2 AMX, 1 AVX512-BF16, 0 float32.

    Integers are for dtypes of 16 bits where the CPU has no instructions for either: they are faster than float32, and
    closer to it than bfloat16 or float16 would be.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 0
    floats = bfloat16_arithmetic()
    return (floats if dtype == torch.bfloat16 else 0) if floats else INTEGERS


def quantize(matrix_NK: Tensor, packed: Tensor, absmax: Tensor) -> bool:
    """Contiguous float32, bfloat16 or float16 [N, K] -> packed uint8 [N, K/2], float32 absmax [N*K/64].

    Returns whether all weights are finite; where they are not, the outputs are of no use.
    """
    bad_blocks = call(
        "expertune_quantize",
        _pointer(matrix_NK),
        SOURCE_KINDS[matrix_NK.dtype],
        ctypes.c_int64(matrix_NK.numel() // BLOCK_SIZE),
        _pointer(nf4_bounds()),
        _pointer(packed),
        _pointer(absmax),
        torch.get_num_threads(),
    )
    return bad_blocks == 0


def fit(matrix_NK: Tensor, importance_K: Tensor | None, scale: Tensor) -> None:
    """Scales of blocks by error, in the place of their absmax; see `expertune.kernels.nf4.reference.fit_scales`."""
    factors = fit_factors()
    call(
        "expertune_fit",
        _pointer(matrix_NK),
        SOURCE_KINDS[matrix_NK.dtype],
        ctypes.c_int64(scale.numel()),
        ctypes.c_int64(matrix_NK.shape[1] // BLOCK_SIZE),
        None if importance_K is None else _pointer(importance_K),
        _pointer(factors),
        ctypes.c_int64(len(factors)),
        ctypes.c_int64(FIT_ROUNDS),
        _pointer(nf4_bounds()),
        _pointer(nf4_codebook(torch.device("cpu"))),
        _pointer(scale),
        torch.get_num_threads(),
    )


def encode(matrix_NK: Tensor, scale: Tensor, packed: Tensor) -> None:
    """Codes of a contiguous matrix for float32 scales [N*K/64] -> packed uint8 [N, K/2]."""
    call(
        "expertune_encode",
        _pointer(matrix_NK),
        SOURCE_KINDS[matrix_NK.dtype],
        ctypes.c_int64(scale.numel()),
        _pointer(nf4_bounds()),
        _pointer(scale),
        _pointer(packed),
        torch.get_num_threads(),
    )


def dequantize_absmax(weight: Nf4Bytes, index: int, out: Tensor) -> None:
    """Scales of the blocks of one matrix -> contiguous float32 [N*K/64]."""
    view = NativeNf4.of(weight)
    call(
        "expertune_dequantize_absmax", ctypes.byref(view), ctypes.c_int64(index), _pointer(out), torch.get_num_threads()
    )


def dequantize(weight: Nf4Bytes, index: int, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> None:
    """Part of one matrix -> out [rows, columns], float32 or bfloat16; columns begin and end with blocks of 64."""
    view = NativeNf4.of(weight)
    bounds = [ctypes.c_int64(value) for value in (*rows, *columns)]
    call(
        "expertune_dequantize",
        ctypes.byref(view),
        ctypes.c_int64(index),
        *bounds,
        SOURCE_KINDS[out.dtype],
        _pointer(out),
        ctypes.c_int64(out.stride(0)),
        torch.get_num_threads(),
    )


def grouped_gemm(
    x: Tensor,
    weight: Nf4Bytes | Tensor,
    offsets_E: Tensor,
    y_RN: Tensor,
    *,
    transposed: bool,
    updates: Sequence[Update] = (),
    index: Tensor | None = None,
    slots: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: Dropout | None = None,
    swiglu: bool = False,
) -> None:
    """y[tokens of e] = x[tokens of e] @ W[e].T (transposed) or @ W[e], and the updates on top.

    Args:
        x: float32 [R, K], or [T, K] where `index` says which row each of R sorted tokens is.
        weight: NF4 matrices, a whole number of them for each expert, seen as one matrix of all their rows; or dense
            matrices [E, rows, columns], float32 or bfloat16.
        offsets_E: int64 [E], the end of each expert's sorted tokens.
        y_RN: float32 [R, N], overwritten.
        transposed: contract along the columns of W, otherwise along its rows.
        updates: low-rank updates of y.
        index: int64 [R].
        slots: int64 [E], which dense matrix is each expert's, -1 for none, whose tokens get zeros; None where each has
            its own number's.
        dtype: bfloat16 rounds x and NF4 weights to it before they are multiplied, where the CPU has instructions for
            that and no `slots` are given; where it has none, 16 bits round x and weights that are NF4, or bfloat16
            as `dtype` is, to integers of as many. Sums and updates are float32 in any case.
        dropout: of x, where the weight is dense and `dtype` float32.
        swiglu: y_RN [R, N/2] is silu(gate) * up of the two halves of columns; where `bfloat16_arithmetic` multiplies
            NF4 weights, transposed.

    Raises:
        ValueError: `dropout` or `swiglu` where it would not be computed.
    """
    experts = offsets_E.shape[0]
    nf4 = NativeNf4.of(weight) if isinstance(weight, Nf4Bytes) else None
    shape = (
        (weight.out_features_of(experts), weight.in_features)
        if isinstance(weight, Nf4Bytes)
        else tuple(weight.shape[1:])
    )
    columns, depth = shape if transposed else (shape[1], shape[0])
    # These live as long as the call.
    (held, _of_updates), dropped = native_updates(updates), NativeDropout.of(dropout)
    chosen = _arithmetic_with(weight, slots, dtype)
    in_bfloat16 = chosen not in (0, INTEGERS)
    if dropout is not None and (chosen or isinstance(weight, Nf4Bytes)):
        raise ValueError("dropout of x is for dense weights in float32 arithmetic: drop elements of x first")
    if swiglu and not (in_bfloat16 and transposed and isinstance(weight, Nf4Bytes)):
        raise ValueError("swiglu is for transposed NF4 weights in bfloat16 arithmetic: apply it to the product")
    stride = scratch_bytes(len(y_RN), depth) if in_bfloat16 else 0
    scratch = workspace.take("bfloat16", torch.get_num_threads() * stride // 4)
    arguments = NativeProduct(
        x=x.data_ptr(),
        index=None if index is None else index.data_ptr(),
        offsets=offsets_E.data_ptr(),
        nf4=None if nf4 is None else ctypes.addressof(nf4),
        dense=None if isinstance(weight, Nf4Bytes) else weight.data_ptr(),
        slots=None if slots is None else slots.data_ptr(),
        updates=ctypes.addressof(held),
        dropout=dropped and ctypes.addressof(dropped),
        y=y_RN.data_ptr(),
        x_stride=x.stride(0),
        y_stride=y_RN.stride(0),
        dense_stride=0 if isinstance(weight, Nf4Bytes) else weight.stride(1),
        dense_expert_stride=0 if isinstance(weight, Nf4Bytes) else weight.stride(0),
        experts=experts,
        parts=shape[0] // weight.out_features if isinstance(weight, Nf4Bytes) else 1,
        depth=depth,
        columns=columns // 2 if swiglu else columns,
        kind=NF4_KIND if isinstance(weight, Nf4Bytes) else DENSE_KINDS[weight.dtype],
        transposed=transposed,
        num_updates=len(held),
        threads=torch.get_num_threads(),
        arithmetic=chosen,
        swiglu=swiglu,
        scratch=scratch.data_ptr(),
        scratch_stride=stride,
    )
    call("expertune_grouped_gemm", ctypes.byref(arguments))


def _arithmetic_with(weight: Nf4Bytes | Tensor, slots: Tensor | None, dtype: torch.dtype) -> int:
    """What multiplies a weight, which may be dense, with tokens of a dtype."""
    if isinstance(weight, Nf4Bytes):
        return arithmetic(dtype)
    shared = weight.dtype == dtype == torch.bfloat16 and slots is None
    return arithmetic(dtype) if shared else 0


def outer(
    u_Rp: Tensor,
    v: Tensor,
    offsets_E: Tensor,
    out_Epq: Tensor,
    index: Tensor | None = None,
    slots: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """out[e] = u[tokens of e].T @ v[tokens of e], float32, out contiguous [E, p, q]; zeros where an expert has none.

    With `slots`, int64 [E], it is out[slots[e]], and nothing for an expert of -1. `dropout` is v's.
    """
    dropped = NativeDropout.of(dropout)
    call(
        "expertune_outer",
        _pointer(u_Rp),
        ctypes.c_int64(u_Rp.stride(0)),
        ctypes.c_int64(u_Rp.shape[1]),
        _pointer(v),
        ctypes.c_int64(v.stride(0)),
        None if index is None else _pointer(index),
        ctypes.c_int64(v.shape[1]),
        None if dropped is None else ctypes.byref(dropped),
        _pointer(offsets_E),
        ctypes.c_int64(offsets_E.shape[0]),
        None if slots is None else _pointer(slots),
        _pointer(out_Epq),
        torch.get_num_threads(),
    )


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Contiguous float32 [R, 2F] -> [R, F]: silu(gate) * up; F is a multiple of 8."""
    rows, size = out.shape
    counts = ctypes.c_int64(rows), ctypes.c_int64(size)
    call("expertune_swiglu", _pointer(gate_up), *counts, _pointer(out), torch.get_num_threads())


def swiglu_backward(gate_up: Tensor, dinter: Tensor, weight_R: Tensor, dgate_up: Tensor, dweight_R: Tensor) -> None:
    """The gradient of gate_up [R, 2F] goes to `dgate_up`, which may be gate_up itself.

    In place: dinter [R, F], before the router's weight, becomes the activation. `dweight_R` is filled with
    <inter, dinter>, the gradient of the router's weight. All float32 and contiguous.
    """
    rows, size = dinter.shape
    call(
        "expertune_swiglu_backward",
        *map(_pointer, (gate_up, dinter, weight_R, dgate_up, dweight_R)),
        *(ctypes.c_int64(rows), ctypes.c_int64(size)),
        torch.get_num_threads(),
    )


def dropout(x: Tensor, out_RK: Tensor, dropout: Dropout, first: int, index: Tensor | None = None) -> None:
    """out = x where the element's hash reaches the threshold, scaled, else 0; x's columns begin with number `first`."""
    dropped = NativeDropout.of(dropout)
    assert dropped is not None
    call(
        "expertune_dropout",
        _pointer(x),
        ctypes.c_int64(x.stride(0)),
        None if index is None else _pointer(index),
        ctypes.byref(dropped),
        ctypes.c_int64(out_RK.shape[0]),
        ctypes.c_int64(out_RK.shape[1]),
        ctypes.c_int64(first),
        _pointer(out_RK),
        torch.get_num_threads(),
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def function(name: str) -> Callable[..., int]:
    """A function of the library by its name in C."""
    loaded = library()
    assert loaded is not None, status().reason
    found: Callable[..., int] = getattr(loaded, name)
    return found


def call(name: str, *arguments: object) -> int:
    """What a function of the library returns."""
    return function(name)(*arguments)
