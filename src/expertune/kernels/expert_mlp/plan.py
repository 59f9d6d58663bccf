"""What the routes of the expert layer are handed, and how many tokens they take at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.amounts import bytes_per_gained_token, bytes_per_routed_token
from expertune.kernels.nf4 import Nf4Bytes

# On a CPU, gate and up of the tokens whose activation torch computes at once: enough for each of its operators.
_ACTIVATED_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Activation:
    """What a family computes between the GEMMs and after them.

    Attributes:
        function: [tokens, P * F] -> [tokens, F], the parts side by side; differentiable by autograd.
        columnwise: column f of the result depends on column f of each part alone, so that it may be computed on some
            columns at a time.
        swiglu: it is silu(gate) * up to the last bits, for which there is a kernel.
        after: [tokens, D] -> [tokens, D], applied to what an expert gives before the router's weight; None applies
            nothing.
    """

    function: Callable[[Tensor], Tensor]
    columnwise: bool = False
    swiglu: bool = False
    after: Callable[[Tensor], Tensor] | None = None


class FrozenLayer(NamedTuple):
    """The frozen half of an expert layer; see `expertune.kernels.expert_mlp.expert_mlp`.

    `inner_bias` [E, P * F] and `outer_bias` [E, D] are float32 and come together, or not at all. `dtype` is that of the
    tokens, in which a route multiplies where it can.
    """

    gate_up: Nf4Bytes
    down: Nf4Bytes
    activation: Activation
    inner_bias: Tensor | None = None
    outer_bias: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def swiglu_in_gemm(self) -> bool:
        """Whether the GEMM itself can apply the activation: a bias would have to be added before it."""
        return self.activation.swiglu and self.inner_bias is None

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
        return self.gate_up.in_features

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.down.in_features


class Chunk(NamedTuple):
    """Tokens that are worked on at once.

    Attributes:
        hidden_TD: [T, D].
        top_k_index_TK: int64 [T, K].
        top_k_weights_TK: [T, K].
        first: number in the whole batch of the first routed token.
        gate_up_RN: [R, P * F] of hidden's dtype, what the first GEMM gives sorted tokens, with updates and bias:
            forward writes it, and backward reads it. None where backward computes it again.
    """

    hidden_TD: Tensor
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    first: int = 0
    gate_up_RN: Tensor | None = None


class Gradients(NamedTuple):
    """Where a chunk's backward writes: [T, D] and [T, K], and of each update float32 [E, r, *], [E, *, r] and [E, *].

    The last is the gain's, and empty where an update has none; none at all where no update has one.
    """

    hidden_TD: Tensor
    top_k_weights_TK: Tensor
    a: list[Tensor]
    b: list[Tensor]
    gains: Sequence[Tensor] = ()


class RoutedTokens(NamedTuple):
    """A chunk's routed tokens, sorted by expert.

    Attributes:
        token_R: int64 [R], the token of each.
        number_R: int64 [R], its number in the whole batch before sorting, by which dropout knows it.
        inverse_R: int64 [R], where routed token t * K + k lies among the sorted ones.
        weight_R: float32 [R], its router's weight.
        offsets_E: int64 [E], the end of each expert's tokens.
    """

    token_R: Tensor
    number_R: Tensor
    inverse_R: Tensor
    weight_R: Tensor
    offsets_E: Tensor


def sort_by_expert(chunk: Chunk, num_experts: int) -> RoutedTokens:
    """Sort routed tokens by expert, stably, without a host synchronization."""
    _, top_k_index_TK, top_k_weights_TK, first, _ = chunk
    flat_R = top_k_index_TK.reshape(-1)
    sorted_R, order_R = torch.sort(flat_R, stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    experts_E = torch.arange(num_experts, device=flat_R.device, dtype=flat_R.dtype)
    # searchsorted counts without atomics.
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True)
    token_R = torch.div(order_R, max(top_k_index_TK.shape[1], 1), rounding_mode="floor")
    weight_R = top_k_weights_TK.reshape(-1)[order_R].float()
    return RoutedTokens(token_R, order_R + first, inverse_R, weight_R, offsets_E)


def expert_of_each(routed: RoutedTokens) -> Tensor:
    """The expert of each sorted token, int64 [R], without a host synchronization."""
    number_R = torch.arange(routed.token_R.shape[0], device=routed.offsets_E.device)
    return torch.searchsorted(routed.offsets_E, number_R, right=True)


def bias_gradient(dout_TD: Tensor, bias_ED: Tensor, routed: RoutedTokens) -> Tensor:
    """<bias, dOut> of each sorted token, float32 [R]: the part of the router's gradient that a bias of down gives."""
    return (dout_TD.float() @ bias_ED.t())[routed.token_R, expert_of_each(routed)]


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


def pieces(gate_up: Tensor) -> list[slice]:
    """On a CPU, rows of which `_ACTIVATED_BYTES` are gate and up; elsewhere all of them at once.

    What autograd keeps of an activation, and the gradients between its parts, come to several times its input.
    """
    num_rows = gate_up.shape[0]
    if gate_up.device.type != "cpu":
        return [slice(0, num_rows)]
    step = max(_ACTIVATED_BYTES // (gate_up.shape[1] * gate_up.itemsize), 1)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def activate(gate_up: Tensor, layer: FrozenLayer) -> Tensor:
    """What the activation makes of [N, P * F], some tokens at a time: [N, F]."""
    all_rows = pieces(gate_up)
    if len(all_rows) == 1:
        return layer.activation.function(gate_up)
    x_NF = gate_up.new_empty(gate_up.shape[0], layer.intermediate_size)
    for rows in all_rows:
        x_NF[rows] = layer.activation.function(gate_up[rows])
    return x_NF


def activation_backward(
    gate_up: Tensor, dinter_NF: Tensor, weight_N1: Tensor, layer: FrozenLayer
) -> tuple[Tensor, Tensor]:
    """What the activation gives on some columns [N, width], and the gradient of its input [N, P * width].

    `dinter_NF` is the gradient of what it gives times the router's weight.
    """
    all_rows = pieces(gate_up)
    inter_NF, dgate_up = torch.empty_like(dinter_NF), torch.empty_like(gate_up)
    for rows in all_rows:
        piece = gate_up[rows].detach().requires_grad_()
        with differentiable():
            x_NF = layer.activation.function(piece)
        (dpiece,) = torch.autograd.grad(x_NF, piece, (dinter_NF[rows] * weight_N1[rows]).to(x_NF.dtype))
        if len(all_rows) == 1:
            return x_NF.detach(), dpiece
        inter_NF[rows], dgate_up[rows] = x_NF.detach(), dpiece
    return inter_NF, dgate_up


def combine(y_RD: Tensor, inverse_R: Tensor, num_tokens: int) -> Tensor:
    """Sum what each token's experts gave: [R, D] -> float32 [T, D], in the order of the token's choices."""
    top_k = inverse_R.numel() // max(num_tokens, 1)
    if top_k == 0:
        return y_RD.new_zeros(num_tokens, y_RD.shape[1], dtype=torch.float32)
    chosen = inverse_R.view(num_tokens, top_k)
    total = y_RD[chosen[:, 0]].float()
    for k in range(1, top_k):
        total += y_RD[chosen[:, k]]
    return total


def chunk_tokens(layer: FrozenLayer, top_k: int, dropped: bool, working_set_bytes: int, gain: bool = False) -> int:
    """Tokens that are worked on at once; at least one."""
    device = layer.down.packed.device.type
    swiglu = layer.activation.swiglu if device == "cpu" else layer.swiglu_in_gemm
    sizes = layer.hidden_size, layer.intermediate_size, layer.num_parts
    size = bytes_per_routed_token(*sizes, swiglu, dropped, device) + (bytes_per_gained_token(*sizes) if gain else 0)
    return max(working_set_bytes // (max(top_k, 1) * size), 1)
