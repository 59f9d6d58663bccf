"""Dispatch rows to experts and combine what comes back, deterministically and without atomics.

Shape suffixes: T tokens, D hidden size, K experts per token (top-k), R = T * K routed rows, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where each routed row goes.

    Attributes:
        order_R: int64 [R]; sorted row i is routed row `order_R[i]` (token `order_R[i] // K`, choice `order_R[i] % K`).
        inverse_R: int64 [R]; the inverse permutation.
        offsets_E: int64 [E]; the end of each expert's sorted rows.
    """

    order_R: Tensor
    inverse_R: Tensor
    offsets_E: Tensor


def sort_by_expert(top_k_index_TK: Tensor, num_experts: int) -> Routing:
    """Sort routed rows by expert, stably, so that equal inputs give equal bytes.

    Args:
        top_k_index_TK: integer [T, K], the experts of each token.
        num_experts: E.
    """
    flat_R = top_k_index_TK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    # searchsorted counts without atomics, and without a host synchronisation.
    experts_E = torch.arange(num_experts, device=flat_R.device, dtype=flat_R.dtype)
    offsets_E = torch.searchsorted(flat_R[order_R].contiguous(), experts_E, right=True)
    return Routing(order_R, inverse_R, offsets_E)


def dispatch(hidden_TD: Tensor, routing: Routing) -> Tensor:
    """Copy each token to its experts' rows: [T, D] -> [R, D], sorted by expert."""
    return _Dispatch.apply(hidden_TD, routing.order_R, routing.inverse_R)


def combine(rows_RD: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
    """Weight each expert's rows by its router score and sum a token's rows: [R, D] -> [T, D].

    The sum is taken in the wider dtype of rows and weights and rounded once to the rows' dtype.
    """
    num_tokens, top_k = weights_TK.shape
    unsorted = _Permute.apply(rows_RD, routing.inverse_R, routing.order_R).view(num_tokens, top_k, rows_RD.shape[1])
    return (unsorted * weights_TK.unsqueeze(-1)).sum(dim=1).to(rows_RD.dtype)


class _Dispatch(torch.autograd.Function):
    """A gather whose backward is a permutation and a sum, where autograd's own would be an atomic scatter-add."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.num_tokens = hidden_TD.shape[0]
        top_k = order_R.numel() // max(hidden_TD.shape[0], 1)
        return hidden_TD[torch.div(order_R, max(top_k, 1), rounding_mode="floor")]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (drows_RD,) = grads
        (inverse_R,) = ctx.saved_tensors
        top_k = max(inverse_R.numel() // max(ctx.num_tokens, 1), 1)
        return drows_RD[inverse_R].view(ctx.num_tokens, top_k, drows_RD.shape[1]).sum(dim=1), None, None


class _Permute(torch.autograd.Function):
    """A permutation of rows whose backward is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD[index_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0][inverse_R], None, None
