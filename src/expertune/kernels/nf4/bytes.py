"""The four buffers of M matrices [N, K] held in 4 bits, as operators receive them; see `expertune.kernels.nf4`."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.amounts import Scheme, slice_bytes


class Part(NamedTuple):
    """Which slice of each buffer is held: number `rank` of `size`.

    Slices are of one size, in whole bytes of whole values, save that the last ones may be shorter or empty. Where
    `size` divides the number of matrices, each is so many matrices.
    """

    rank: int
    size: int

    def each(self, whole: Tensor) -> int:
        """Bytes of one slice of a buffer, which may be without memory."""
        return slice_bytes(whole[:1].nbytes, whole.shape[0], self.size)

    def of(self, whole: Tensor) -> range:
        """Which bytes of a buffer are in the slice."""
        each = self.each(whole)
        start = min(self.rank * each, whole.nbytes)
        return range(start, min(start + each, whole.nbytes))

    def experts(self, wholes: Iterable[Tensor], matrices: int) -> list[range]:
        """Experts that the slices of buffers have bytes of, where each expert has so many matrices."""
        held = ((self.of(whole), matrices * whole[:1].nbytes) for whole in wholes)
        return [range(here.start // size, -(-here.stop // size)) for here, size in held if here]


class Fit(NamedTuple):
    """Scales are chosen by error and not by the largest magnitude.

    Attributes:
        importance_K: float32 [K], what a squared error in each input feature counts; None means all the same.
    """

    importance_K: Tensor | None = None


class Nf4Bytes(NamedTuple):
    """The buffers of an `Nf4Stack`.

    Attributes:
        packed: uint8 [M, N, K/2].
        absmax: uint8 [M, N*K/64], or float32 without double quantization; of MXFP4 uint8 [M, N*K/32].
        nested_absmax: float32 [M, ceil(N*K/64/256)]; last dimension 0 without double quantization and of MXFP4.
        offset: float32 [M]; empty without double quantization and of MXFP4.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    @property
    def out_features(self) -> int:
        """N of one matrix."""
        return self.packed.shape[1]

    @property
    def in_features(self) -> int:
        """K."""
        return self.packed.shape[2] * 2

    @property
    def scheme(self) -> Scheme:
        """Which codebook and scales these are: 8-bit scales that refer to nothing are MXFP4's exponents."""
        return "mxfp4" if self.absmax.dtype == torch.uint8 and not self.double_quantization else "nf4"

    @property
    def double_quantization(self) -> bool:
        """Whether the absmax values are themselves held in 8 bits."""
        return self.offset.shape[0] > 0

    def out_features_of(self, num_experts: int) -> int:
        """Output features of all matrices of one expert."""
        return self.packed.shape[0] // num_experts * self.out_features
