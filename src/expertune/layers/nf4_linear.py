"""A dense 4-bit linear (attention, shared experts): bitsandbytes' `Linear4bit`, multiplied on a CPU by our operator.

The layer is bitsandbytes' in bytes, in what it saves, and in what PEFT takes it for. On a CPU bitsandbytes dequantizes
the whole matrix for each GEMM; there `expertune.kernels.linear` runs instead. On other devices bitsandbytes' own GEMM
runs.
"""

import bitsandbytes as bnb
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.few_tokens import Linear, in_answer, once
from expertune.kernels.linear import nf4_linear
from expertune.kernels.nf4 import BLOCK_SIZE, Nf4Bytes
from expertune.kernels.routes import HasKernelSettings


class Nf4Linear(bnb.nn.Linear4bit, HasKernelSettings):
    """y = x @ W.T + bias with W [out_features, in_features] in NF4; arguments and files are `Linear4bit`'s."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of x's dtype; the GEMM runs in `compute_dtype`."""
        of_answer = in_answer(self, self._of_answer)
        if of_answer is not None and of_answer.takes(x):
            y = of_answer(x)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        if x.device.type != "cpu":
            return super().forward(x)
        x_RK = x.reshape(-1, self.in_features).to(self.compute_dtype or x.dtype)
        y = nf4_linear(x_RK, once((self, "bytes"), self.nf4_bytes), self.kernel_settings).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _of_answer(self) -> Linear | None:
        """What multiplies a few tokens of `compute_dtype` while an answer is written; None where nothing can."""
        if self.compute_dtype is None or self.weight.device.type != "cpu" or not native.available():
            return None
        return Linear(self.nf4_bytes(), self.compute_dtype, self.kernel_settings)

    def nf4_bytes(self) -> Nf4Bytes:
        """The frozen weight as a stack of one matrix; shares memory with bitsandbytes' parameter."""
        state = self.weight.quant_state
        packed = self.weight.data.view(1, self.out_features, self.in_features // 2)
        absmax = state.absmax.view(1, self.out_features * self.in_features // BLOCK_SIZE)
        if not state.nested:
            return Nf4Bytes(packed, absmax, absmax.new_empty(1, 0), absmax.new_empty(0))
        return Nf4Bytes(packed, absmax, state.state2.absmax.view(1, -1), state.offset.reshape(1))
