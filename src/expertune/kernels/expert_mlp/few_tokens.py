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
from expertune.kernels.native.gemv import Gemvs, LowRank, Product
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
    """What `Experts` needs of a layer; good for any tokens."""
    return Prepared(layer, NativeNf4.of(layer.gate_up), NativeNf4.of(layer.down))


class Experts:
    """The layer with its updates, laid out for one call after the other with as many tokens.

    Args:
        prepared: its weights.
        updates: whose factors stay in place too.
        shape: of the routing, [T, K].
    """

    def __init__(self, prepared: Prepared, updates: Sequence[LoraUpdate], shape: torch.Size) -> None:
        most, top_k = shape.numel(), shape[1]
        layer, dtype = prepared.layer, prepared.layer.dtype
        parts, self._swiglu = layer.num_parts, layer.activation.swiglu
        self._inner = workspace.take("gate_up", most, layer.intermediate_size * (1 if self._swiglu else parts))
        hidden = torch.empty(1, layer.hidden_size, dtype=dtype)
        first = Product(
            weight=layer.gate_up,
            x=hidden,
            y=self._inner,
            parts=parts,
            sharing=top_k,
            swiglu=self._swiglu,
            bias=layer.inner_bias,
            updates=[_low_rank(update, update.part) for update in updates if update.part < parts],
            native=prepared.gate_up,
        )
        second = Product(
            weight=layer.down,
            x=self._inner,
            y=hidden,
            top_k_weights=torch.empty(1, top_k),
            bias=layer.outer_bias,
            updates=[_low_rank(update, 0) for update in updates if update.part == parts],
            native=prepared.down,
        )
        self._layer, fine = layer, dtype == torch.float32
        self._calls = (
            [Gemvs([first, second], most, fine=fine)]
            if self._swiglu
            else [Gemvs([each], most, fine=fine) for each in (first, second)]
        )

    def __call__(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The layer's output, [T, D] of hidden's dtype, which is the layer's."""
        out_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format)
        hidden_TD = hidden_TD if hidden_TD.stride(1) == 1 else hidden_TD.contiguous()
        experts, weights_TK, routed = index_TK.contiguous(), as_float(weights_TK), index_TK.numel()
        inner = self._inner
        self._calls[0].place(0, hidden_TD, inner)
        if not self._swiglu:
            self._calls[0](routed, experts)
            with no_autocast(hidden_TD):
                inner = as_float(self._layer.activation.function(inner[:routed]))
        self._calls[-1].place(-1, inner, out_TD, weights_TK)
        self._calls[-1](routed, experts)
        return out_TD


def forward(chunk: Chunk, prepared: Prepared, updates: Sequence[LoraUpdate]) -> Tensor:
    """What `Experts` gives of a layer whose updates are of this call alone."""
    hidden_TD, index_TK, weights_TK = chunk[:3]
    return Experts(prepared, updates, index_TK.shape)(hidden_TD, index_TK, weights_TK)


def _low_rank(update: LoraUpdate, part: int) -> LowRank:
    return LowRank(as_float(update.a), as_float(update.b), update.slots, part, update.scaling)
