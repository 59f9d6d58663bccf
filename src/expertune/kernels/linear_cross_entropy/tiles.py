"""What surrounds the GEMMs of a tile of the vocabulary: its logits, and the gradient of its products.

On a CPU the native library makes each in one pass; elsewhere torch does, operator by operator.

Shape suffixes: D hidden size, V vocabulary, v of it in a tile, n rows of a chunk, R sum of the updates' ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.native import cross_entropy

# Ranks together from which GEMMs of torch are faster than the native library's pass over a tile, row by row.
GEMM_RANK = 32


class Head(NamedTuple):
    """The output head as the operator receives it; see `expertune.kernels.linear_cross_entropy.linear_cross_entropy`.

    Attributes:
        has_own_input: for each update, whether its input is its own or hidden.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    scalings: list[float]
    has_own_input: list[bool]
    a: list[Tensor]
    b: list[Tensor]


class LowRank(NamedTuple):
    """All updates side by side on the rows of a chunk; all float32.

    Attributes:
        h_nR: scaling * x @ A.T.
        b_VR: B.
        dh_nR, db_VR: gradients of both, summed up tile by tile.
    """

    h_nR: Tensor
    b_VR: Tensor
    dh_nR: Tensor
    db_VR: Tensor


class TileLoss(NamedTuple):
    """What a row's gradient depends on: label int64 [n], log-sum-exp float32 [n], and a factor [n] or None."""

    labels_n: Tensor
    lse_n: Tensor
    weights_n: Tensor | None


def complete(z_nv: Tensor, tile: slice, head: Head, low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """Products of a tile -> its float32 logits [n, v], which may take their place, and their log-sum-exp [n]."""
    if _native(z_nv):
        z_nv = _readable(z_nv)
        if _by_gemm(low_rank):
            z_nv = z_nv.float().addmm_(low_rank.h_nR, low_rank.b_VR[tile].t())
        return cross_entropy.logits(z_nv, _head(tile, head, low_rank))
    z_nv = z_nv.float().addmm_(low_rank.h_nR, low_rank.b_VR[tile].t())
    if head.bias_V is not None:
        z_nv.add_(head.bias_V[tile].float())
    if head.scale != 1.0:
        z_nv.mul_(head.scale)
    if head.softcap is not None:
        z_nv.div_(head.softcap).tanh_().mul_(head.softcap)
    return z_nv, torch.logsumexp(z_nv, dim=1)


def gradient(
    logits_nv: Tensor, tile: slice, head: Head, low_rank: LowRank, loss: TileLoss, dtype: torch.dtype
) -> Tensor:
    """The loss's gradient of a tile's products [n, v], in the GEMM's dtype; adds to those of the updates.

    It may take the place of the logits, which are used up.
    """
    labels_n, lse_n, weights_n = loss
    if _native(logits_nv):
        by_gemm = _by_gemm(low_rank)
        found, dh_nR = cross_entropy.gradients(
            logits_nv,
            _head(tile, head, low_rank),
            lse_n,
            labels_n - tile.start,
            weights_n,
            low_rank.db_VR[tile],
            torch.bfloat16 if dtype == torch.bfloat16 and not by_gemm else torch.float32,
        )
        if by_gemm:
            _add_gradients(found, tile, low_rank)
        else:
            low_rank.dh_nR.add_(dh_nR)
        return found.to(dtype)
    # d (c tanh(z / c)) / dz = 1 - tanh(z / c) ** 2, from the capped logits themselves.
    slope_nv = None if head.softcap is None else logits_nv.div(head.softcap).square_().neg_().add_(1)
    d_nv = logits_nv.sub_(lse_n.unsqueeze(1)).exp_()
    column_n, inside_n = columns_of_labels(labels_n, tile)
    d_nv[torch.arange(labels_n.shape[0], device=labels_n.device), column_n] -= inside_n.float()
    if slope_nv is not None:
        d_nv.mul_(slope_nv)
    if head.scale != 1.0:
        d_nv.mul_(head.scale)
    if weights_n is not None:
        d_nv.mul_(weights_n.unsqueeze(1))
    _add_gradients(d_nv, tile, low_rank)
    return d_nv.to(dtype)


def columns_of_labels(labels_n: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Each label's column in a tile, and whether it is in there; without asking the device how many are."""
    inside_n = (labels_n >= tile.start) & (labels_n < tile.stop)
    return (labels_n - tile.start).clamp(0, tile.stop - tile.start - 1), inside_n


def _add_gradients(d_nv: Tensor, tile: slice, low_rank: LowRank) -> None:
    """Add a tile's gradients of h and b, from that of its products in float32."""
    low_rank.dh_nR.addmm_(d_nv, low_rank.b_VR[tile])
    low_rank.db_VR[tile].addmm_(d_nv.t(), low_rank.h_nR)


def _native(z_nv: Tensor) -> bool:
    return z_nv.device.type == "cpu" and native.available()


def _readable(z_nv: Tensor) -> Tensor:
    return z_nv if z_nv.dtype in (torch.float32, torch.bfloat16) else z_nv.float()


def _by_gemm(low_rank: LowRank) -> bool:
    return low_rank.h_nR.shape[1] >= GEMM_RANK


def _head(tile: slice, head: Head, low_rank: LowRank) -> cross_entropy.Head:
    """Without the updates where these are added by GEMMs."""
    bias_v = None if head.bias_V is None else head.bias_V[tile].float()
    h_nr, b_vr = low_rank.h_nR, low_rank.b_VR[tile]
    if _by_gemm(low_rank):
        h_nr, b_vr = (each.new_empty(len(each), 0) for each in (h_nr, b_vr))
    return cross_entropy.Head(h_nr, b_vr, bias_v, head.scale, head.softcap)
