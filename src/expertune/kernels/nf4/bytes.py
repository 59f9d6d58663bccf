"""The four buffers of M matrices [N, K] held in 4 bits, as operators receive them; see `expertune.kernels.nf4`."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scheme = Literal["nf4", "mxfp4"]


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
