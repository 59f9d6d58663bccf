"""The expert layer for few tokens of an answer, on a CPU: one call of the native library.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R = T * K routed tokens, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels import workspace
from expertune.kernels.expert_mlp.plan import Chunk, FrozenLayer
from expertune.kernels.lora import LoraUpdate
from expertune.kernels.native.gemv import LowRank, Product, gemv
from expertune.kernels.native.structures import NativeNf4
from expertune.kernels.operators import no_autocast
from expertune.kernels.workspace import as_float


def takes(after: object, updates: Sequence[LoraUpdate]) -> bool:
    """Whether an expert layer is one that can run here: with nothing after its experts, without dropout and gains."""
    return after is None and all(not update.dropout and update.gain is None for update in updates)


class Prepared(NamedTuple):
    """A layer's weights as the library takes them, for as long as their bytes stay in place."""

    layer: FrozenLayer
    gate_up: NativeNf4
    down: NativeNf4


def prepare(layer: FrozenLayer) -> Prepared:
    """What `forward` needs of a layer; good for any tokens."""
    return Prepared(layer, NativeNf4.of(layer.gate_up), NativeNf4.of(layer.down))


def forward(chunk: Chunk, prepared: Prepared, updates: Sequence[LoraUpdate]) -> Tensor:
    """The layer's output, [T, D] of hidden's dtype."""
    layer = prepared.layer
    hidden_TD, index_TK, weights_TK = chunk[:3]
    routed, parts, swiglu = index_TK.numel(), layer.num_parts, layer.activation.swiglu
    inner = workspace.take("gate_up", routed, layer.intermediate_size * (1 if swiglu else parts))
    out_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
    first = Product(
        weight=layer.gate_up,
        x=hidden_TD if hidden_TD.stride(1) == 1 else hidden_TD.contiguous(),
        y=inner,
        parts=parts,
        sharing=index_TK.shape[1],
        swiglu=swiglu,
        bias=layer.inner_bias,
        updates=[_low_rank(update, update.part) for update in updates if update.part < parts],
        native=prepared.gate_up,
    )
    second = Product(
        weight=layer.down,
        x=inner,
        y=out_TD,
        top_k_weights=as_float(weights_TK),
        bias=layer.outer_bias,
        updates=[_low_rank(update, 0) for update in updates if update.part == parts],
        native=prepared.down,
    )
    experts, fine = index_TK.contiguous(), hidden_TD.dtype == torch.float32
    if swiglu:
        gemv([first, second], routed, experts, fine=fine)
        return out_TD
    gemv([first], routed, experts, fine=fine)
    with no_autocast(hidden_TD):
        second = second._replace(x=as_float(layer.activation.function(inner)))
    gemv([second], routed, experts, fine=fine)
    return out_TD


def _low_rank(update: LoraUpdate, part: int) -> LowRank:
    return LowRank(as_float(update.a), as_float(update.b), update.slots, part, update.scaling)
