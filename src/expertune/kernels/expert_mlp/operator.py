"""The operator `expertune::expert_mlp` as torch sees it: flat arguments, chunks of tokens, its gradient.

Shape suffixes: T tokens, D hidden size, K experts per token, r rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from expertune.kernels import routes
from expertune.kernels.expert_mlp import dequant_gemm, few_tokens, fused
from expertune.kernels.expert_mlp.layer import ExpertLayer
from expertune.kernels.expert_mlp.plan import Chunk, FrozenLayer, Gradients, chunk_tokens
from expertune.kernels.few_tokens import once, serves
from expertune.kernels.huge_pages import ask_for_huge_pages
from expertune.kernels.lora import SCHEMA, LoraUpdate, draw_seeds, pack, unpack
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.operators import find, no_autocast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_INPUTS = f"Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor[] weights, str layer, {SCHEMA}"
_NUM_INPUTS = 13


class Route(Protocol):
    """A module or object that computes a chunk of tokens; see `grouped.GroupedRoute`."""

    @property
    def overwrites(self) -> bool:
        """Whether the first chunk's gradients of A and B replace what is there; others add."""

    def forward(
        self, chunk: Chunk, layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor], out_TD: Tensor
    ) -> None:
        """Writes the layer's output to `out_TD`, and x @ A of each update to `h`."""

    def backward(
        self,
        dout_TD: Tensor,
        chunk: Chunk,
        layer: FrozenLayer,
        updates: list[LoraUpdate],
        h: list[Tensor],
        gradients: Gradients,
    ) -> None:
        """Writes the chunk's gradients; adds to those of A and B unless it `overwrites`."""


def run(
    tokens: Chunk,
    weights: list[Tensor],
    layer: ExpertLayer,
    updates: Sequence[LoraUpdate],
    replay: Sequence[Tensor],
    inner_size: int,
) -> tuple[Tensor, list[Tensor]]:
    """Call the operator, or what few tokens take; see `expertune.kernels.expert_mlp.expert_mlp`.

    `inner_size` is how many numbers the first GEMM gives a routed token, P * F.
    """
    hidden, top_k_index, top_k_weights = tokens[:3]
    if not replay and _are_few(hidden, top_k_index, weights, layer, updates):
        layer.settings.ran[routes.FUSED] += 1
        if layer.handle is not None:
            layer.handle.announce(False)
        with acquired(weights, layer, backward=False) as here:

            def prepare() -> few_tokens.Prepared:
                return few_tokens.prepare(_frozen(here, layer, hidden.dtype))

            # What a handle brings lies in memory that layers take turns in.
            prepared = once(layer, prepare) if layer.handle is None else prepare()
            return few_tokens.forward(tokens, prepared, updates), []
    leaves = (hidden, top_k_weights, *(leaf for update in updates for leaf in (update.a, update.b, update.gain)))
    backward_follows = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    packed = pack(updates, draw_seeds(updates, hidden.device))
    inputs = (hidden, top_k_index, top_k_weights, weights, layer.name, *packed)
    # A replay's graph is not the one that runs backward; the forward that it replays has kept it already.
    keep = inner_size if backward_follows and not replay and _keeps(layer, hidden, updates) else 0
    out, h, _ = torch.ops.expertune.expert_mlp(*inputs, list(replay), keep, backward_follows)
    return out, h


def of_answer(
    tokens: Chunk, weights: list[Tensor], layer: ExpertLayer, updates: Sequence[LoraUpdate]
) -> few_tokens.Experts | None:
    """The layer for as many tokens, laid out for the answer that is being written; None where it takes another way."""
    hidden, top_k_index = tokens[:2]
    if layer.handle is not None or not _are_few(hidden, top_k_index, weights, layer, updates):
        return None
    prepared = once(layer, lambda: few_tokens.prepare(_frozen(weights, layer, hidden.dtype)))
    return few_tokens.Experts(prepared, updates, top_k_index.shape)


def _are_few(
    hidden: Tensor, top_k_index: Tensor, weights: list[Tensor], layer: ExpertLayer, updates: Sequence[LoraUpdate]
) -> bool:
    """Whether these are few tokens of an answer, for a layer that few tokens' way can compute."""
    routed = top_k_index.numel()
    served = serves(hidden, routed, min(weights[4].shape[0], routed), layer.settings)
    return served and few_tokens.takes(layer.activation.after, updates)


def _keeps(layer: ExpertLayer, hidden: Tensor, updates: Sequence[LoraUpdate]) -> bool:
    """Whether what the first GEMM gives is kept for backward.

    Gains are differentiated by what they scale, which is another tensor; float16 has no room for every number that
    lies between the GEMMs in float32. On a GPU it is computed again: no kernel there has been tried with what is kept.
    """
    plain = hidden.dtype != torch.float16 and all(update.gain is None for update in updates)
    return layer.keeps and plain and hidden.device.type == "cpu"


@torch.library.custom_op(
    "expertune::expert_mlp",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor[] replay, SymInt keep, bool backward_follows) -> (Tensor, Tensor[], Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    inputs, (replay, keep, backward_follows) = arguments[:_NUM_INPUTS], arguments[_NUM_INPUTS:]
    hidden, top_k_index, top_k_weights, weights, name, *packed = inputs
    layer: ExpertLayer = find(name)
    if layer.handle is not None:
        layer.handle.announce(backward_follows)
    # Empty where nothing is kept; otherwise tens of megabytes, of which each small page takes a fault.
    gate_up = ask_for_huge_pages(hidden.new_empty(top_k_index.numel(), keep))
    if replay:
        return replay[0].clone(), [tensor.clone() for tensor in replay[1:]], gate_up
    updates = unpack(*packed)
    out = torch.empty_like(hidden)
    # What no expert's update is computed from stays zero, not whatever was in memory.
    h = [
        (update.a.new_empty if update.slots is None else update.a.new_zeros)(top_k_index.numel(), update.a.shape[1])
        for update in updates
    ]
    with no_autocast(hidden), acquired(weights, layer, backward=False) as here:
        frozen = _frozen(here, layer, hidden.dtype)
        for tokens, route in _chunks(hidden, top_k_index, layer, frozen, updates):
            whole = Chunk(hidden, top_k_index, top_k_weights, gate_up_RN=gate_up if keep else None)
            chunk, h_chunk = _chunk(whole, tokens, h)
            route.forward(chunk, frozen, updates, h_chunk, out[tokens])
    return out, h, gate_up


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    hidden, top_k_index, *_, a, _b, _slots, _gains, _replay, keep, _backward_follows = arguments
    routed = top_k_index.numel()
    h = [factor.new_empty(routed, factor.shape[1]) for factor in a]
    return torch.empty_like(hidden), h, hidden.new_empty(routed, keep)


@torch.library.custom_op(
    "expertune::expert_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_INPUTS}, Tensor[] h, Tensor? kept) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
)
def _backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    hidden, top_k_index, top_k_weights, weights, name, *packed, h, kept = arguments
    layer: ExpertLayer = find(name)
    updates = unpack(*packed)
    dhidden, dweights = torch.empty_like(hidden), torch.empty_like(top_k_weights)
    with no_autocast(hidden), acquired(weights, layer, backward=True) as here:
        frozen = _frozen(here, layer, hidden.dtype)
        chunks = list(_chunks(hidden, top_k_index, layer, frozen, updates))
        # Summed over chunks in float32, whatever the factors' dtype.
        make = torch.empty if chunks and chunks[0][1].overwrites else torch.zeros
        da = [make(update.a.shape, dtype=torch.float32, device=update.a.device) for update in updates]
        db = [make(update.b.shape, dtype=torch.float32, device=update.b.device) for update in updates]
        gains = (hidden.new_empty(0) if update.gain is None else update.gain for update in updates)
        dgains = [torch.zeros_like(gain, dtype=torch.float32) for gain in gains]
        for tokens, route in chunks:
            chunk, h_chunk = _chunk(Chunk(hidden, top_k_index, top_k_weights, gate_up_RN=kept), tokens, h)
            gradients = Gradients(dhidden[tokens], dweights[tokens], da, db, dgains)
            route.backward(dout[tokens], chunk, frozen, updates, h_chunk, gradients)
    da = [gradient.to(update.a.dtype) for gradient, update in zip(da, updates, strict=True)]
    db = [gradient.to(update.b.dtype) for gradient, update in zip(db, updates, strict=True)]
    return dhidden, dweights, da, db, dgains


@_backward.register_fake
def _(_dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    hidden, _index, top_k_weights, *_, a, b, _slots, gains, _h, _kept = arguments
    da, db = ([torch.empty_like(factor) for factor in factors] for factors in (a, b))
    dgains = [torch.empty_like(gain, dtype=torch.float32) for gain in gains]
    return torch.empty_like(hidden), torch.empty_like(top_k_weights), da, db, dgains


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], Tensor]) -> None:
    hidden, index, top_k_weights, weights, name, parts, scalings, dropouts, seeds, a, b, *more = inputs
    slots, gains, replay, keep, _ = more
    ctx.plain = name, parts, scalings, dropouts
    ctx.num_weights, ctx.num_updates, ctx.num_replayed = len(weights), len(parts), len(replay)
    ctx.save_for_backward(hidden, index, top_k_weights, seeds, *weights, *a, *b, *slots, *gains, *output[1])
    # Not among what is saved: activation checkpointing would throw it away, and have it made again. Detached, since an
    # output refers to its node.
    ctx.kept, ctx.keep = output[2].detach() if keep else None, keep
    # No zeros of that size are made for its gradient, which nobody asks for.
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, _dh: list[None], _dkept: None) -> tuple[Any, ...]:
    # Read once: under activation checkpointing each access would recompute the layer.
    hidden, index, top_k_weights, seeds, *rest = ctx.saved_tensors
    # Taken once, so that it is free when this is done, whoever holds the graph.
    kept, ctx.kept = ctx.kept, None
    dout = torch.zeros_like(hidden) if dout is None else dout
    held, count = ctx.num_weights, ctx.num_updates
    weights = rest[:held]
    a, b, slots, gains, h = (rest[held + i * count : held + (i + 1) * count] for i in range(5))
    if ctx.keep and kept is None:  # a second backward: by forward again, so that what was rounded is rounded alike
        with torch.no_grad():
            inputs = hidden, index, top_k_weights, weights, *ctx.plain, seeds, a, b, slots, gains
            kept = torch.ops.expertune.expert_mlp(*inputs, [], ctx.keep, True)[2]
    dhidden, dweights, da, db, dgains = torch.ops.expertune.expert_mlp_backward(
        dout, hidden, index, top_k_weights, weights, *ctx.plain, seeds, a, b, slots, gains, h, kept
    )
    # torch takes an empty list for a list of tensors, and wants a list back for it.
    plain: list[Tensor] | None = None if count else []
    frozen, replayed = [None] * held, [None] * ctx.num_replayed
    no_slots = [None] * count
    none = plain, plain, plain, None
    return dhidden, None, dweights, frozen, None, *none, da, db, no_slots, dgains, replayed, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def acquired(
    weights: list[Tensor], layer: ExpertLayer, backward: bool, reused: bool = False
) -> AbstractContextManager[list[Tensor]]:
    """A layer's weights on the device that computes while the block runs; see `LayerHandle.acquire`."""
    if layer.handle is None:
        return nullcontext(weights)
    # A forward that backward runs again (checkpointing without replay) is on backward's way through the layers.
    recomputed = not backward and torch._C._current_graph_task_id() != -1
    return layer.handle.acquire(weights, backward or recomputed, reused=reused or recomputed)


def _frozen(weights: list[Tensor], layer: ExpertLayer, dtype: torch.dtype) -> FrozenLayer:
    gate_up, down = Nf4Bytes(*weights[:4]), Nf4Bytes(*weights[4:8])
    inner_bias, outer_bias = (bias.float() for bias in weights[8:]) if weights[8:] else (None, None)
    return FrozenLayer(gate_up, down, layer.activation, inner_bias, outer_bias, dtype)


def _chunks(
    hidden: Tensor, top_k_index: Tensor, layer: ExpertLayer, frozen: FrozenLayer, updates: list[LoraUpdate]
) -> Iterator[tuple[slice, Route]]:
    """Tokens of each chunk and the route for it; forward and backward cut alike."""
    top_k, device = top_k_index.shape[1], hidden.device
    held_bytes = layer.settings.working_set_on(device.type)
    dropped = any(update.dropout for update in updates)
    # On a GPU one half is for routed tokens and one for dequantized weights; whichever the route, chunks are the same.
    gained = any(update.gain is not None for update in updates)
    routed_bytes = held_bytes // (1 if device.type == "cpu" else 2)
    step = chunk_tokens(frozen, top_k, False, routed_bytes, gained)
    tokens_per_expert = min(hidden.shape[0], step) * top_k / frozen.num_experts
    # Triton's kernels have no gains. With dropout a gain takes one more GEMM, which the native library has not either.
    grouped = frozen.num_parts <= 2 and len({update.part for update in updates}) == len(updates) and not gained
    route: Route = dequant_gemm
    if frozen.activation.after is None and not (gained and dropped):
        fusable = frozen.gate_up.scheme == "nf4"
        name = layer.settings.choose(device, tokens_per_expert, hidden.dtype, grouped, fusable)
        route = _route(name, layer.settings, device, hidden.dtype)
    if dropped and route is dequant_gemm:
        step = chunk_tokens(frozen, top_k, True, routed_bytes, gained)
    for start in range(0, hidden.shape[0], step):
        yield slice(start, min(start + step, hidden.shape[0])), route


def _chunk(whole: Chunk, tokens: slice, h: list[Tensor]) -> tuple[Chunk, list[Tensor]]:
    """Some tokens, and x @ A of each update for them."""
    hidden, top_k_index, top_k_weights, _, gate_up = whole
    first, end = (number * top_k_index.shape[1] for number in (tokens.start, tokens.stop))
    own = None if gate_up is None else gate_up[first:end]
    chunk = Chunk(hidden[tokens], top_k_index[tokens], top_k_weights[tokens], first, own)
    return chunk, [low[first:end] for low in h]


def _route(name: routes.Route, settings: routes.KernelSettings, device: torch.device, dtype: torch.dtype) -> Route:
    if device.type == "cpu":
        return fused if name == routes.FUSED else dequant_gemm
    if name == routes.EXPERT_BY_EXPERT:
        return dequant_gemm
    from expertune.kernels.expert_mlp.grouped import GroupedRoute
    from expertune.kernels.expert_mlp.selfcheck import checked

    dequantize_first = name == routes.DEQUANT_GEMM
    torch_gemm = dequantize_first and settings.gemm_on(device, dtype) == "torch"
    shuffle = "shuffle" in checked(device, dtype).passed
    return GroupedRoute(dequantize_first, settings.working_set_on(device.type) // 2, torch_gemm, shuffle)
