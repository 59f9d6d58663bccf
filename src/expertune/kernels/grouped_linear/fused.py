"""Dequantize inside the GEMM, in the native library: weights never reach memory. CPU; float32 arithmetic.

Shape suffixes: R routed rows, K in_features, N out_features of one matrix, E experts, P matrices per expert, r rank.
"""

import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.nf4 import Nf4Bytes


def forward(
    x_RK: Tensor,
    weight: Nf4Bytes,
    offsets_E: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The GEMM and, for each update, h = x @ A.T; see `dequant_gemm.forward`."""
    rows, x = weight.rows, plain(x_RK)
    h, updates = [], []
    for part, scaling, factor_a, factor_b, x_update in zip(parts, scalings, a, b, x_updates, strict=True):
        low = x.new_empty(x.shape[0], factor_a.shape[1])
        native.grouped_gemm(plain(x_update), plain(factor_a), offsets_E, low, transposed=True)
        h.append(low.to(factor_a.dtype))
        updates.append(native.Update(h[-1].float() * scaling, plain(factor_b), part * rows, (part + 1) * rows))
    y_RN = x.new_empty(x.shape[0], weight.rows_of(offsets_E.shape[0]))
    native.grouped_gemm(x, weight, offsets_E, y_RN, transposed=True, updates=updates)
    return y_RN.to(x_RK.dtype), h


def backward(
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
    """dX of the frozen GEMM, and dA, dB, dX of each update; see `dequant_gemm.backward`."""
    dy, rows = plain(dy_RN), weight.rows
    dx_RK = dy.new_empty(dy.shape[0], weight.columns)
    native.grouped_gemm(dy, weight, offsets_E, dx_RK, transposed=False)
    da: list[Tensor] = []
    db: list[Tensor] = []
    dx_updates: list[Tensor] = []
    for part, scaling, factor_a, factor_b, x_update, low in zip(parts, scalings, a, b, x_updates, h, strict=True):
        dy_part = dy[:, part * rows : (part + 1) * rows]
        dh = dy.new_empty(low.shape)
        native.grouped_gemm(dy_part, plain(factor_b), offsets_E, dh, transposed=False)
        dh *= scaling
        for gradients, factor, u, v in (
            (da, factor_a, dh, plain(x_update)),
            (db, factor_b, dy_part, low.float() * scaling),
        ):
            gradient = torch.empty(factor.shape, dtype=torch.float32)
            native.outer(u, v, offsets_E, gradient)
            gradients.append(gradient.to(factor.dtype))
        dx = dy.new_empty(x_update.shape)
        native.grouped_gemm(dh, plain(factor_a), offsets_E, dx, transposed=False)
        dx_updates.append(dx.to(x_update.dtype))
    return dx_RK.to(dy_RN.dtype), da, db, dx_updates


def plain(tensor: Tensor) -> Tensor:
    """The tensor as the library reads it: float32, and adjoining in memory."""
    return tensor.float().contiguous()
