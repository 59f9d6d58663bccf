"""The four buffers of M matrices [N, K] held as NF4, as operators receive them; see `expertune.kernels.nf4`."""

from typing import NamedTuple

from torch import Tensor


class Nf4Bytes(NamedTuple):
    """The buffers of an `Nf4Stack`.

    Attributes:
        packed: uint8 [M, N, K/2].
        absmax: uint8 [M, N*K/64], or float32 without double quantization.
        nested_absmax: float32 [M, ceil(N*K/64/256)]; last dimension 0 without double quantization.
        offset: float32 [M]; empty without double quantization.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    @property
    def rows(self) -> int:
        """N of one matrix."""
        return self.packed.shape[1]

    @property
    def columns(self) -> int:
        """K."""
        return self.packed.shape[2] * 2

    @property
    def double_quantization(self) -> bool:
        """Whether the absmax values are themselves held in 8 bits."""
        return self.offset.shape[0] > 0

    def rows_of(self, num_experts: int) -> int:
        """Rows of all matrices of one expert."""
        return self.packed.shape[0] // num_experts * self.rows
