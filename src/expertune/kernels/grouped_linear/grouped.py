"""`grouped_linear` on a GPU: all experts in each launch, dequantized inside the GEMM or before it.

Shape suffixes: R routed rows, K in_features, N out_features of one matrix, E experts, P matrices per expert, r rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertune.kernels.gpu import nf4
from expertune.kernels.gpu.grouped_gemm import Dequantized, Update, grouped_gemm, input_gradient
from expertune.kernels.gpu.low_rank import Expand, Outer, Shrink, expand, outer, shrink
from expertune.kernels.nf4 import Nf4Bytes


@dataclass(frozen=True)
class GroupedRoute:
    """A route of `expertune.kernels.grouped_linear`, for at most two parts and one update of each.

    Attributes:
        dequantize_first: whether weights are dequantized before they are multiplied, all of them at once.
    """

    dequantize_first: bool

    def forward(
        self,
        x_RK: Tensor,
        weight: Nf4Bytes,
        offsets_E: Tensor,
        parts: list[int],
        scalings: list[float],
        a: list[Tensor],
        b: list[Tensor],
        x_updates: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """The GEMM and, for each update, h = x @ A.T (kept for backward, [R, r])."""
        x_RK = x_RK.contiguous()
        y_RN = x_RK.new_empty(x_RK.shape[0], weight.rows_of(offsets_E.shape[0]))
        h = [factor.new_empty(x_RK.shape[0], factor.shape[1]) for factor in a]
        for factor, x, low in zip(a, x_updates, h, strict=True):
            shrink(x.contiguous(), offsets_E, [Shrink(factor, low)])
        updates = [Update(*values) for values in zip(h, b, parts, scalings, strict=True)]
        grouped_gemm(x_RK, self._held(weight, x_RK.dtype), offsets_E, y_RN, updates)
        return y_RN, h

    def backward(
        self,
        dy_RN: Tensor,
        weight: Nf4Bytes,
        offsets_E: Tensor,
        parts: list[int],
        scalings: list[float],
        a: list[Tensor],
        b: list[Tensor],
        x_updates: list[Tensor],
        h: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """dX of the frozen GEMM, and dA, dB, dX of each update. Experts without rows get zeros."""
        dy_RN = dy_RN.contiguous()
        dx_RK = dy_RN.new_empty(dy_RN.shape[0], weight.columns)
        input_gradient(dy_RN, self._held(weight, dy_RN.dtype), offsets_E, dx_RK)
        da, db, dx_updates = [], [], []
        for u, part in enumerate(parts):
            column, x = part * weight.rows, x_updates[u].contiguous()
            dh = torch.empty(h[u].shape, dtype=torch.float32, device=dy_RN.device)
            shrink(dy_RN, offsets_E, [Shrink(b[u], dh, transposed=True, scaling=scalings[u], column=column)])
            total_a, total_b = (torch.empty(f.shape, dtype=torch.float32, device=f.device) for f in (a[u], b[u]))
            outer(x, offsets_E, [Outer(dh, total_a)], add=False)
            items = [Outer(h[u], total_b, transposed=True, scaling=scalings[u], column=column)]
            outer(dy_RN, offsets_E, items, add=False)
            dx_update = torch.empty_like(x)
            expand(dx_update, offsets_E, [Expand(dh, a[u])], x.dtype)
            da.append(total_a.to(a[u].dtype))
            db.append(total_b.to(b[u].dtype))
            dx_updates.append(dx_update)
        return dx_RK, da, db, dx_updates

    def _held(self, weight: Nf4Bytes, dtype: torch.dtype) -> Nf4Bytes | Dequantized:
        if not self.dequantize_first:
            return weight
        dequantized = weight.packed.new_empty(weight.packed.shape[0], weight.rows, weight.columns, dtype=dtype)
        nf4.dequantize(weight, slice(0, weight.packed.shape[0]), dequantized.flatten(0, 1))
        return Dequantized(dequantized)
