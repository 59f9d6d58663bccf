"""The whole expert layer: y[t] = sum over k of w[t, k] * down(gate(gate_up(x[t]))) of expert index[t, k], with LoRA.

One operator, `expertune::expert_mlp`, whose backward keeps the layer's input, the routing and x @ A, computes gate and
up again, and needs no GEMM of down_proj for that: the router's gradient is <inter, dInter> with dInter taken before
the router's weight is applied. Gradients go to the input, the router's weights, A and B; the weights are frozen.

Tokens are worked on in chunks, so that what lies between the GEMMs stays within `routes.Settings.working_set_bytes`
whatever the batch is. Rows are sorted by expert, stably, and combined by the inverse permutation: no atomics, and two
runs give identical bytes. Experts with biases have them added after each GEMM; where something comes after each
expert (a norm), it is differentiated by autograd from the expert's output, computed anew.

Routes on a CPU: `fused.py` dequantizes inside the GEMM, all experts in one call; `dequant_gemm.py` dequantizes a
tile once for the recomputation and for the gradient, expert by expert, and runs on any device. On a GPU both are
`grouped.py`, all experts in each launch. `reference.py` is plain float32 with autograd, what all are tested against.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R = T * K routed rows, E experts, P
parts of the first GEMM (gate and up: 2; ungated: 1), r rank.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from expertune.kernels import routes
from expertune.kernels.expert_mlp import dequant_gemm, fused
from expertune.kernels.expert_mlp.plan import Layer, LowRank, chunk_tokens
from expertune.kernels.grouped_linear import own_dtypes
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack

__all__ = ["Activation", "ExpertUpdate", "LayerHandle", "expert_mlp"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Route(Protocol):
    """A module or object that computes a chunk of tokens; see `grouped.GroupedRoute`."""

    @property
    def overwrites(self) -> bool:
        """Whether the first chunk's gradients of A and B replace what is there; others add."""

    def forward(self, *arguments: Any) -> None: ...

    def backward(self, *arguments: Any) -> None: ...


class LayerHandle(Protocol):
    """Acquires a layer's offloaded bytes on the device that computes; see `expertune.placement.prefetch`."""

    def announce(self, backward: bool) -> None:
        """Called before each forward: whether a backward of the same tokens follows."""

    def acquire(
        self, weights: list[Tensor], backward: bool, reused: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """The tensors on the device that computes while the block runs; `weights` are the offloaded ones.

        `backward` is the direction in which the layers are passed; `reused`: the same layer is used once more next.
        """


@dataclass(eq=False)
class Activation:
    """What a family computes between the GEMMs and after them, and how the layer's bytes come to be there.

    Attributes:
        function: [rows, P * F] -> [rows, F], the parts side by side; differentiable by autograd.
        columnwise: column f of the result depends on column f of each part alone, so that it may be computed on some
            columns at a time.
        swiglu: it is silu(gate) * up to the last bits, for which there is a kernel.
        after: [rows, D] -> [rows, D], applied to what an expert gives before the router's weight; None applies nothing.
        layer_handle: acquires the layer's offloaded bytes; None where they stay on the device.
    """

    function: Callable[[Tensor], Tensor]
    columnwise: bool = False
    swiglu: bool = False
    after: Callable[[Tensor], Tensor] | None = None
    layer_handle: LayerHandle | None = None
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        self.handle = id(self)
        _activations[self.handle] = self

    def __reduce__(self) -> tuple[type["Activation"], tuple[Any, ...]]:
        # A copy is found under a number of its own.
        return Activation, (self.function, self.columnwise, self.swiglu, self.after, self.layer_handle)


# Operators take numbers, not functions: the owner of an activation keeps it alive, and here it is found by number.
_activations: "weakref.WeakValueDictionary[int, Activation]" = weakref.WeakValueDictionary()


@dataclass
class ExpertUpdate:
    """A low-rank update of one projection of every expert: y += scaling * B[e] @ A[e] @ dropout(x).

    Attributes:
        part: 0 .. P-1 for a part of the first GEMM, P for down.
        a: [E, r, in_features].
        b: [E, out_features, r], of A's dtype.
        scaling: alpha / r, or alpha / sqrt(r).
        dropout: probability that an element of the update's input is dropped.
    """

    part: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0


def expert_mlp(
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    activation: Activation,
    updates: Sequence[ExpertUpdate] = (),
    replay: Sequence[Tensor] = (),
    biases: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Send each token through its experts and sum what comes back.

    Args:
        hidden_TD: [T, D], float32, float16 or bfloat16.
        top_k_index_TK: int64 [T, K].
        top_k_weights_TK: [T, K], floating point.
        gate_up: E * P matrices [F, D]; matrix e * P + p is part p of expert e.
        down: E matrices [D, F].
        activation: what is between the GEMMs.
        updates: low-rank updates; those of one projection are summed.
        replay: what an earlier call with the same arguments returned, laid flat; it is returned again and not computed,
            which is how activation checkpointing is spared the second forward.
        biases: frozen, floating point: of the first GEMM [E, P * F], its parts side by side, and of down [E, D].

    Returns:
        [T, D] of hidden's dtype, and for each update x @ A [R, r] in A's dtype, rows sorted within a chunk of tokens.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the value received.
    """
    _check(hidden_TD, top_k_index_TK, top_k_weights_TK, gate_up, down, activation, updates, biases)
    if activation.layer_handle is not None:
        leaves = (hidden_TD, top_k_weights_TK, *(factor for update in updates for factor in (update.a, update.b)))
        activation.layer_handle.announce(torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves))
    dropped = any(update.dropout > 0 for update in updates)
    # Drawn from torch's own generator of the device, so that a run's seed decides, and checkpointing draws the same
    # again; on a GPU they stay there, and a captured graph draws new ones each time.
    # Without dropout nothing is drawn: an evaluation must not move what training draws next.
    if dropped:
        seeds = torch.randint(2**62, (len(updates),), device=hidden_TD.device)
    else:
        seeds = torch.zeros(len(updates), dtype=torch.int64)
    out, low_rank = torch.ops.expertune.expert_mlp(
        hidden_TD,
        top_k_index_TK,
        top_k_weights_TK,
        [*gate_up.bytes, *down.bytes, *(biases or ())],
        activation.handle,
        [update.part for update in updates],
        [update.scaling for update in updates],
        [update.dropout for update in updates],
        seeds,
        [update.a for update in updates],
        [update.b for update in updates],
        list(replay),
    )
    return out, low_rank


@torch.library.custom_op(
    "expertune::expert_mlp",
    mutates_args=(),
    schema="(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor[] weights, int activation, int[] parts, "
    "float[] scalings, float[] dropouts, Tensor seeds, Tensor[] a, Tensor[] b, Tensor[] replay) -> (Tensor, Tensor[])",
)
def _forward(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: list[Tensor],
    activation: int,
    parts: list[int],
    scalings: list[float],
    dropouts: list[float],
    seeds: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    replay: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    if replay:
        return replay[0].clone(), [tensor.clone() for tensor in replay[1:]]
    top_k = top_k_index.shape[1]
    out = torch.empty_like(hidden)
    h = [factor.new_empty(top_k_index.numel(), factor.shape[1]) for factor in a]
    with own_dtypes(hidden), _acquired(weights, activation, backward=False) as weights:
        layer, low_rank = _layer(weights, activation, parts, scalings, dropouts, seeds, a, b)
        for tokens, route in _chunks(hidden, top_k_index, layer, parts, dropouts):
            rows = slice(tokens.start * top_k, tokens.stop * top_k)
            h_chunk = [tensor[rows] for tensor in h]
            route.forward(
                hidden[tokens],
                top_k_index[tokens],
                top_k_weights[tokens],
                layer,
                low_rank,
                h_chunk,
                rows.start,
                out[tokens],
            )
    return out, h


@_forward.register_fake
def _(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: list[Tensor],
    activation: int,
    parts: list[int],
    scalings: list[float],
    dropouts: list[float],
    seeds: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    replay: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(hidden), [factor.new_empty(top_k_index.numel(), factor.shape[1]) for factor in a]


@torch.library.custom_op(
    "expertune::expert_mlp_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor[] weights, int activation, "
    "int[] parts, float[] scalings, float[] dropouts, Tensor seeds, Tensor[] a, Tensor[] b, Tensor[] h) "
    "-> (Tensor, Tensor, Tensor[], Tensor[])",
)
def _backward(
    dout: Tensor,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: list[Tensor],
    activation: int,
    parts: list[int],
    scalings: list[float],
    dropouts: list[float],
    seeds: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    h: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    top_k = top_k_index.shape[1]
    dhidden, dweights = torch.empty_like(hidden), torch.empty_like(top_k_weights)
    with own_dtypes(hidden), _acquired(weights, activation, backward=True) as weights:
        layer, low_rank = _layer(weights, activation, parts, scalings, dropouts, seeds, a, b)
        chunks = list(_chunks(hidden, top_k_index, layer, parts, dropouts))
        # Summed over chunks in float32, whatever the factors' dtype.
        make = torch.empty if chunks and chunks[0][1].overwrites else torch.zeros
        da = [make(factor.shape, dtype=torch.float32, device=factor.device) for factor in a]
        db = [make(factor.shape, dtype=torch.float32, device=factor.device) for factor in b]
        for tokens, route in chunks:
            rows = slice(tokens.start * top_k, tokens.stop * top_k)
            h_chunk = [tensor[rows] for tensor in h]
            route.backward(
                dout[tokens],
                hidden[tokens],
                top_k_index[tokens],
                top_k_weights[tokens],
                layer,
                low_rank,
                h_chunk,
                da,
                db,
                rows.start,
                dhidden[tokens],
                dweights[tokens],
            )
    da, db = ([g.to(f.dtype) for g, f in zip(*pair, strict=True)] for pair in ((da, a), (db, b)))
    return dhidden, dweights, da, db


@_backward.register_fake
def _(
    dout: Tensor,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: list[Tensor],
    activation: int,
    parts: list[int],
    scalings: list[float],
    dropouts: list[float],
    seeds: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    h: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    da, db = ([torch.empty_like(factor) for factor in factors] for factors in (a, b))
    return torch.empty_like(hidden), torch.empty_like(top_k_weights), da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    hidden, index, top_k_weights, weights, activation, parts, scalings, dropouts, seeds, a, b, replay = inputs
    ctx.plain = activation, parts, scalings, dropouts
    ctx.num_weights, ctx.num_updates, ctx.num_replayed = len(weights), len(parts), len(replay)
    ctx.save_for_backward(hidden, index, top_k_weights, seeds, *weights, *a, *b, *output[1])


def _autograd(ctx: Any, dout: Tensor, _dh: list[Tensor]) -> tuple[Any, ...]:
    # Read once: under activation checkpointing each access would recompute the layer.
    hidden, index, top_k_weights, seeds, *rest = ctx.saved_tensors
    held, count = ctx.num_weights, ctx.num_updates
    weights = rest[:held]
    a, b, h = (rest[held + i * count : held + (i + 1) * count] for i in range(3))
    activation, parts, scalings, dropouts = ctx.plain
    dhidden, dweights, da, db = torch.ops.expertune.expert_mlp_backward(
        dout, hidden, index, top_k_weights, weights, activation, parts, scalings, dropouts, seeds, a, b, h
    )
    # torch takes an empty list for a list of tensors, and wants a list back for it.
    plain: list[Tensor] | None = None if count else []
    frozen = [None] * len(weights)
    replayed = [None] * ctx.num_replayed
    return dhidden, None, dweights, frozen, None, plain, plain, plain, None, da, db, replayed


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _acquired(weights: list[Tensor], activation: int, backward: bool) -> AbstractContextManager[list[Tensor]]:
    layer_handle = _activations[activation].layer_handle
    if layer_handle is None:
        return nullcontext(weights)
    # A forward that backward runs again (checkpointing without replay) passes the layers in backward's order.
    recomputed = not backward and torch._C._current_graph_task_id() != -1
    return layer_handle.acquire(weights, backward or recomputed, reused=recomputed)


def _layer(
    weights: list[Tensor],
    activation: int,
    parts: list[int],
    scalings: list[float],
    dropouts: list[float],
    seeds: Tensor,
    a: list[Tensor],
    b: list[Tensor],
) -> tuple[Layer, list[LowRank]]:
    gate_up, down = Nf4Bytes(*weights[:4]), Nf4Bytes(*weights[4:8])
    inner_bias, outer_bias = (bias.float() for bias in weights[8:]) if len(weights) > 8 else (None, None)
    owner = _activations[activation]
    layer = Layer(gate_up, down, owner.function, owner.columnwise, owner.swiglu, inner_bias, outer_bias, owner.after)
    low_rank = [LowRank(*values) for values in zip(parts, a, b, scalings, dropouts, seeds.unbind(), strict=True)]
    return layer, low_rank


def _chunks(
    hidden: Tensor, top_k_index: Tensor, layer: Layer, parts: list[int], dropouts: list[float]
) -> Iterator[tuple[slice, _Route]]:
    """Tokens of each chunk and the route for it; forward and backward cut alike."""
    top_k, device = top_k_index.shape[1], hidden.device
    held_bytes = routes.working_set_bytes(device.type)
    # On a GPU one half is for rows and one for dequantized weights; whichever the route, chunks are the same.
    step = chunk_tokens(layer, top_k, any(dropouts), held_bytes // (1 if device.type == "cpu" else 2))
    rows_per_expert = min(hidden.shape[0], step) * top_k / layer.num_experts
    grouped = layer.num_parts <= 2 and len(set(parts)) == len(parts)
    route: _Route = dequant_gemm
    if layer.after is None:
        name = routes.choose(device, rows_per_expert, hidden.dtype, grouped, fusable=layer.gate_up.scheme == "nf4")
        route = _route(name, device, hidden.dtype, held_bytes // 2)
    for start in range(0, hidden.shape[0], step):
        yield slice(start, min(start + step, hidden.shape[0])), route


def _route(name: routes.Route, device: torch.device, dtype: torch.dtype, buffer_bytes: int) -> _Route:
    if device.type == "cpu":
        return fused if name == routes.FUSED else dequant_gemm
    if name == routes.EXPERT_BY_EXPERT:
        return dequant_gemm
    from expertune.kernels.expert_mlp.grouped import GroupedRoute

    dequantize_first = name == routes.DEQUANT_GEMM
    return GroupedRoute(dequantize_first, buffer_bytes, dequantize_first and routes.gemm(dtype, device) == "torch")


def _check(
    hidden: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    activation: Activation,
    updates: Sequence[ExpertUpdate],
    biases: tuple[Tensor, Tensor] | None,
) -> None:
    num_experts, columns, rows = down.num_matrices, gate_up.columns, gate_up.rows
    if hidden.ndim != 2 or hidden.shape[1] != columns:
        raise ValueError(f"hidden must be [tokens, {columns}], got {tuple(hidden.shape)}")
    if hidden.dtype not in _DTYPES:
        raise ValueError(f"hidden must be float32, float16 or bfloat16, got {hidden.dtype}")
    if index.ndim != 2 or index.shape[0] != hidden.shape[0] or index.dtype != torch.int64:
        raise ValueError(f"top_k_index must be int64 [{hidden.shape[0]}, k], got {index.dtype} {tuple(index.shape)}")
    if top_k_weights.shape != index.shape or not top_k_weights.is_floating_point():
        raise ValueError(
            f"top_k_weights must be floating point {tuple(index.shape)}, "
            f"got {top_k_weights.dtype} {tuple(top_k_weights.shape)}"
        )
    if (down.rows, down.columns) != (columns, rows):
        raise ValueError(f"down must be matrices {(columns, rows)}, got {(down.rows, down.columns)}")
    if num_experts == 0 or gate_up.num_matrices % num_experts:
        raise ValueError(f"{gate_up.num_matrices} matrices cannot be shared out to {num_experts} experts")
    parts = gate_up.num_matrices // num_experts
    stacks = [] if activation.layer_handle is not None else [(gate_up.packed, "gate_up"), (down.packed, "down")]
    for tensor, what in (*stacks, (index, "top_k_index")):
        if tensor.device != hidden.device:
            raise ValueError(f"{what} is on {tensor.device}, hidden is on {hidden.device}")
    for bias, width, what in zip(biases or (), (parts * rows, columns), ("gate_up", "down"), strict=False):
        if tuple(bias.shape) != (num_experts, width) or not bias.is_floating_point():
            wanted = (num_experts, width)
            raise ValueError(
                f"the bias of {what} must be floating point {wanted}, got {bias.dtype} {tuple(bias.shape)}"
            )
        if bias.device != hidden.device:
            raise ValueError(f"the bias of {what} is on {bias.device}, hidden is on {hidden.device}")
    for update in updates:
        if not 0 <= update.part <= parts:
            raise ValueError(f"part must be from 0 to {parts}, got {update.part}")
        if not 0 <= update.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {update.dropout}")
        width, height = (rows, columns) if update.part == parts else (columns, rows)
        rank = update.a.shape[1] if update.a.ndim == 3 else None
        if tuple(update.a.shape) != (num_experts, rank, width):
            raise ValueError(f"A must be [{num_experts}, r, {width}], got {tuple(update.a.shape)}")
        if tuple(update.b.shape) != (num_experts, height, rank):
            raise ValueError(f"B must be [{num_experts}, {height}, {rank}], got {tuple(update.b.shape)}")
        if update.a.dtype not in _DTYPES:
            raise ValueError(f"A must be float32, float16 or bfloat16, got {update.a.dtype}")
        if update.b.dtype != update.a.dtype:
            raise ValueError(f"B is {update.b.dtype}, A is {update.a.dtype}")
        for held, what in ((update.a, "A"), (update.b, "B")):
            if held.device != hidden.device:
                raise ValueError(f"{what} is on {held.device}, hidden is on {hidden.device}")
