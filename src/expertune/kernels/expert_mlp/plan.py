"""What both routes of the expert layer are handed, and how many tokens they take at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.nf4 import Nf4Bytes


class Layer(NamedTuple):
    """The frozen half of an expert layer; see `expertune.kernels.expert_mlp.expert_mlp`.

    `inner_bias` [E, P * F] and `outer_bias` [E, D] are float32 and come together, or not at all.
    """

    gate_up: Nf4Bytes
    down: Nf4Bytes
    function: Callable[[Tensor], Tensor]
    columnwise: bool
    swiglu: bool
    inner_bias: Tensor | None = None
    outer_bias: Tensor | None = None
    after: Callable[[Tensor], Tensor] | None = None

    @property
    def swiglu_in_gemm(self) -> bool:
        """Whether the GEMM itself can apply the activation: a bias would have to be added before it."""
        return self.swiglu and self.inner_bias is None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.packed.shape[0]

    @property
    def num_parts(self) -> int:
        """P."""
        return self.gate_up.packed.shape[0] // self.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.gate_up.columns

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.down.columns


class LowRank(NamedTuple):
    """An `ExpertUpdate` as the routes take it, with the seed of its dropout, int64 [] on the device."""

    part: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float
    seed: Tensor


class Sorted(NamedTuple):
    """A chunk's routed rows, sorted by expert.

    Attributes:
        token_R: int64 [R], the token of each sorted row.
        number_R: int64 [R], its number in the whole batch before sorting, by which dropout knows it.
        inverse_R: int64 [R], where routed row t * K + k lies among the sorted ones.
        weight_R: float32 [R], the router's weight of each sorted row.
        offsets_E: int64 [E], the end of each expert's rows.
    """

    token_R: Tensor
    number_R: Tensor
    inverse_R: Tensor
    weight_R: Tensor
    offsets_E: Tensor


def sort_rows(top_k_index_TK: Tensor, top_k_weights_TK: Tensor, num_experts: int, first_row: int) -> Sorted:
    """Sort routed rows by expert, stably, without a host synchronisation.

    `first_row` is the number in the whole batch of the chunk's first routed row.
    """
    flat_R = top_k_index_TK.reshape(-1)
    sorted_R, order_R = torch.sort(flat_R, stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    experts_E = torch.arange(num_experts, device=flat_R.device, dtype=flat_R.dtype)
    # searchsorted counts without atomics.
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True)
    token_R = torch.div(order_R, max(top_k_index_TK.shape[1], 1), rounding_mode="floor")
    return Sorted(token_R, order_R + first_row, inverse_R, top_k_weights_TK.reshape(-1)[order_R].float(), offsets_E)


def expert_of_rows(rows: Sorted) -> Tensor:
    """The expert of each sorted row, int64 [R], without a host synchronisation."""
    number_R = torch.arange(rows.token_R.shape[0], device=rows.offsets_E.device)
    return torch.searchsorted(rows.offsets_E, number_R, right=True)


def bias_gradient(dout_TD: Tensor, bias_ED: Tensor, rows: Sorted) -> Tensor:
    """<bias, dOut> of each sorted row, float32 [R]: the part of the router's gradient that a bias of down gives."""
    return (dout_TD.float() @ bias_ED.t())[rows.token_R, expert_of_rows(rows)]


@contextmanager
def differentiable() -> Iterator[None]:
    """Autograd inside an operator, where torch has it switched off: a family's activation is differentiated by it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        exclude = exclude.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude),
        torch.enable_grad(),
    ):
        yield


def combine(rows_RD: Tensor, inverse_R: Tensor, num_tokens: int) -> Tensor:
    """Sum each token's sorted rows: [R, D] -> float32 [T, D], in the order of the token's choices."""
    top_k = inverse_R.numel() // max(num_tokens, 1)
    if top_k == 0:
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=torch.float32)
    chosen = inverse_R.view(num_tokens, top_k)
    total = rows_RD[chosen[:, 0]].float()
    for k in range(1, top_k):
        total += rows_RD[chosen[:, k]]
    return total


def bytes_per_row(
    hidden_size: int, intermediate_size: int, num_parts: int, swiglu: bool, dropout: bool, device_type: str = "cpu"
) -> int:
    """Bytes that a routed row takes between the GEMMs, in backward.

    On a CPU float32 throughout: gate and up, which their gradients replace, and the intermediate row; the row's input
    gradient. Where an activation is differentiated by autograd: its result, its gradients, and two rows that it keeps.
    With dropout: a dropped row and the gradient of one, of either width. Elsewhere rows are 16-bit but for the input's
    gradient, the intermediate row has its gradient beside it, and nothing is kept for dropout.
    """
    if device_type == "cpu":
        inner = num_parts + 1 + (0 if swiglu else num_parts + 3) + (2 if dropout else 0)
        return 4 * (inner * intermediate_size + (3 if dropout else 1) * hidden_size)
    inner = num_parts + 2 + (0 if swiglu else num_parts + 3)
    return 2 * inner * intermediate_size + 4 * hidden_size


def chunk_tokens(layer: Layer, top_k: int, dropout: bool, working_set_bytes: int) -> int:
    """Tokens that are worked on at once; at least one."""
    device = layer.down.packed.device.type
    swiglu = layer.swiglu if device == "cpu" else layer.swiglu_in_gemm
    row = bytes_per_row(layer.hidden_size, layer.intermediate_size, layer.num_parts, swiglu, dropout, device)
    return max(working_set_bytes // (max(top_k, 1) * row), 1)
