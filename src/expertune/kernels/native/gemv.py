"""Products of few tokens with 4-bit matrices, `gemv4.c`, and with others, `dense.c`: their functions on tensors.

What is computed is exact in integers of 16 bits: weights are rounded to 1/32768 of the largest value of the codebook, x
to 1/32766 of the largest number of each of its blocks of 64, so that small numbers beside a large one keep fewer bits
than bfloat16 gives them; sums of blocks are float32. `fine` keeps what rounding leaves, 7 bits more of both.
Threads are as many as torch uses.

Shape suffixes: T tokens, K experts per token, R = T * K routed tokens, N output features, E experts, r rank.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels import workspace
from expertune.kernels.native import call, function
from expertune.kernels.native.structures import DENSE_KINDS, SOURCE_KINDS, NativeNf4
from expertune.kernels.nf4.bytes import Nf4Bytes

MOST_ROUTED = 256
"""Routed tokens that a call may have."""

MOST_DENSE = 4
"""Tokens that `dense_gemv` takes."""

# Of gemv4.h: numbers of x that are laid out together.
_GROUP = 128


class LowRank(NamedTuple):
    """A low-rank update of one part of a product: y += scaling * B[slot] @ (A[slot] @ x).

    Attributes:
        a: float32, contiguous [S, r, columns].
        b: float32, contiguous [S, rows, r].
        slots: int64 [E], which matrices are each expert's, -1 for none; None where each has its own number's.
        part: of the matrices of an expert.
        scaling: a factor.
    """

    a: Tensor
    b: Tensor
    slots: Tensor | None
    part: int
    scaling: float


class Product(NamedTuple):
    """y[r] = x[r // sharing] @ W[expert of r].T, its bias and updates; see `Gemv` of gemv4.h.

    Attributes:
        weight: as many matrices for each expert.
        x: float32, bfloat16 or float16 [R / sharing, columns].
        y: of the same dtypes: [R, parts * rows]; [R, rows] with `swiglu`; [T, rows] with `top_k_weights`.
        parts: matrices of an expert.
        sharing: routed tokens, one behind the other, that read the same row of x.
        swiglu: y = silu(part 0) * part 1.
        top_k_weights: float32, contiguous [T, K]: what the experts of a token give is weighted and summed.
        bias: float32, contiguous [E, parts * rows].
        updates: low-rank updates.
        native: of the weight, where a caller has it already.
    """

    weight: Nf4Bytes
    x: Tensor
    y: Tensor
    parts: int = 1
    sharing: int = 1
    swiglu: bool = False
    top_k_weights: Tensor | None = None
    bias: Tensor | None = None
    updates: Sequence[LowRank] = ()
    native: NativeNf4 | None = None


class Gemvs:
    """Products one after the other, laid out for one call after the other: what differs between calls is their tokens.

    Args:
        products: a later one may read what an earlier one writes; weights, updates and biases stay in place.
        most: routed tokens of a call, at most `MOST_ROUTED`.
        avx512: False leaves instructions of AVX-512 alone.
        fine: off by about 1e-6 of a result; two thirds as fast.

    Raises:
        ValueError: more routed tokens than that.
    """

    def __init__(self, products: Sequence[Product], most: int, avx512: bool = True, fine: bool = False) -> None:
        _require(most)
        weights = [each.native or NativeNf4.of(each.weight) for each in products]
        updates = [_low_rank(each.updates) for each in products]
        sizes = [_scratch_floats(each, most) for each in products]
        scratch = workspace.take("gemv", sum(sizes))
        # What pointers point to lives as long.
        self._held, self._most, self._flags = (products, weights, updates, scratch), most, (not avx512, fine)
        self._arguments = (_Gemv * len(products))()
        self._each, at = list(self._arguments), scratch.data_ptr()
        for argument, product, weight, of_it, size in zip(self._each, products, weights, updates, sizes, strict=True):
            _fill(argument, product)
            argument.w, argument.updates, argument.scratch = ctypes.addressof(weight), ctypes.addressof(of_it), at
            at += size * 4
        self._function = function("expertune_gemv")

    def place(self, number: int, x: Tensor, y: Tensor, top_k_weights: Tensor | None = None) -> None:
        """Give the product of this number other tensors of the same dtypes; they live until the call."""
        argument = self._each[number]
        argument.x, argument.x_stride = x.data_ptr(), x.stride(-2)
        argument.y, argument.y_stride = y.data_ptr(), y.stride(-2)
        if top_k_weights is not None:
            argument.weights = top_k_weights.data_ptr()

    def __call__(self, routed: int, experts: Tensor | None = None) -> None:
        """Compute them.

        Args:
            routed: R.
            experts: int64, contiguous [R]; None takes the first expert's matrices for all.

        Raises:
            ValueError: more routed tokens than `most`.
        """
        _require(routed, self._most)
        at = None if experts is None else experts.data_ptr()
        for argument in self._each:
            argument.routed, argument.experts = routed, at
        self._function(self._arguments, len(self._each), torch.get_num_threads(), *self._flags)


def gemv(
    products: Sequence[Product],
    routed: int,
    experts: Tensor | None = None,
    avx512: bool = True,
    fine: bool = False,
) -> None:
    """Compute products one after the other, once; see `Gemvs`."""
    Gemvs(products, routed, avx512, fine)(routed, experts)


def _require(routed: int, most: int = MOST_ROUTED) -> None:
    if not 0 < routed <= most:
        raise ValueError(f"a call has 1 to {most} routed tokens, got {routed}")


def dense_gemv(x_TK: Tensor, weight_NK: Tensor, y_TN: Tensor) -> None:
    """y = x @ W.T, summed in float32.

    Args:
        x_TK: float32, contiguous; up to `MOST_DENSE` tokens.
        weight_NK: float32 or bfloat16; each row contiguous.
        y_TN: float32, contiguous; overwritten.

    Raises:
        ValueError: no tokens, or more than that.
    """
    if not 0 < len(x_TK) <= MOST_DENSE:
        raise ValueError(f"a call has 1 to {MOST_DENSE} tokens, got {len(x_TK)}")
    call(
        "expertune_dense_gemv",
        ctypes.c_void_p(weight_NK.data_ptr()),
        DENSE_KINDS[weight_NK.dtype],
        *map(ctypes.c_int64, (*weight_NK.shape, weight_NK.stride(0))),
        ctypes.c_void_p(x_TK.data_ptr()),
        len(x_TK),
        ctypes.c_void_p(y_TN.data_ptr()),
        torch.get_num_threads(),
    )


def _scratch_floats(product: Product, routed: int) -> int:
    """Rows of x as float32, as integers and with their scales and corrections; then A @ x of each update."""
    ranks = sum(update.a.shape[1] for update in product.updates)
    return routed // product.sharing * _row_floats(product.weight.in_features) + -(-routed * ranks // 16) * 16


def _row_floats(columns: int) -> int:
    wide = -(-columns // _GROUP) * _GROUP
    return 2 * (wide + -(-(wide // 32) // 16) * 16)


class _LowRank(ctypes.Structure):
    """`LowRank` of gemv4.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "slots")),
        *((name, ctypes.c_int64) for name in ("rank", "part")),
        ("scaling", ctypes.c_float),
    )


class _Gemv(ctypes.Structure):
    """`Gemv` of gemv4.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "x", "y", "experts", "weights", "bias", "updates", "scratch")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "routed", "sharing", "top_k")),
        *((name, ctypes.c_int32) for name in ("x_kind", "y_kind", "parts", "num_updates", "swiglu")),
    )


def _fill(argument: _Gemv, product: Product) -> None:
    x, y, weights = product.x, product.y, product.top_k_weights
    argument.x, argument.x_stride, argument.x_kind = x.data_ptr(), x.stride(0), SOURCE_KINDS[x.dtype]
    argument.y, argument.y_stride, argument.y_kind = y.data_ptr(), y.stride(0), SOURCE_KINDS[y.dtype]
    argument.weights = None if weights is None else weights.data_ptr()
    argument.top_k = 1 if weights is None else weights.shape[1]
    argument.bias = None if product.bias is None else product.bias.data_ptr()
    argument.sharing = product.sharing
    argument.parts, argument.num_updates, argument.swiglu = product.parts, len(product.updates), product.swiglu


def _low_rank(updates: Sequence[LowRank]) -> ctypes.Array[_LowRank]:
    return (_LowRank * len(updates))(
        *(
            _LowRank(
                update.a.data_ptr(),
                update.b.data_ptr(),
                None if update.slots is None else update.slots.data_ptr(),
                update.a.shape[1],
                update.part,
                update.scaling,
            )
            for update in updates
        )
    )
