"""The expert layer on a GPU: all experts in each launch, nothing read back to the host, so that a step can be captured.

Two ways to multiply, otherwise the same: `fused` dequantizes NF4 inside the GEMM; `dequant_gemm` dequantizes the
matrices of as many experts as the working set holds at memory speed, and multiplies these. In backward a dequantized
group serves the recomputation and the input's gradient.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R routed tokens, E experts, P parts
of the first GEMM, r rank.

Updates of some experts are computed with zeros for the others: thin GEMMs for all of them are few beside the layer's.
Updates with gains are refused: the operator takes another route for them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from expertune.kernels.expert_mlp.plan import (
    Chunk,
    FrozenLayer,
    Gradients,
    RoutedTokens,
    bias_gradient,
    differentiable,
    expert_of_each,
)
from expertune.kernels.gpu import launch, nf4, routing, torch_gemm
from expertune.kernels.gpu import low_rank as thin
from expertune.kernels.gpu.grouped_gemm import Dequantized, Update, grouped_gemm, input_gradient
from expertune.kernels.gpu.low_rank import Expand, Outer, Shrink
from expertune.kernels.lora import LoraUpdate
from expertune.kernels.nf4 import Nf4Bytes

# Experts of one group of dequantized matrices, or None for all, and their matrices.
Group = tuple[slice | None, "Nf4Bytes | Dequantized"]


@dataclass(frozen=True)
class GroupedRoute:
    """A route of `expertune.kernels.expert_mlp`, for layers of at most two parts and one adapter of each projection.

    Attributes:
        dequantize_first: whether weights are dequantized before they are multiplied.
        buffer_bytes: most bytes of dequantized weights; one expert's matrices are held in any case.
        torch_gemm: multiply dequantized weights by torch's `grouped_mm`, where those of all experts fit the buffer.
        shuffle: dequantize by NVIDIA's inline assembly, where there is any.
    """

    dequantize_first: bool
    buffer_bytes: int = 2**30
    torch_gemm: bool = False
    shuffle: bool = True
    overwrites: ClassVar[bool] = True

    def forward(
        self,
        chunk: Chunk,
        layer: FrozenLayer,
        updates: list[LoraUpdate],
        h: list[Tensor],
        out_TD: Tensor,
    ) -> None:
        """Writes the layer's output to `out_TD` and x @ A of each update to `h`; see `operator.Route`."""
        _refuse_gains(updates)
        with launch.shuffling(self.shuffle):
            self._forward(chunk, layer, [update.of_all() for update in updates], h, out_TD)

    def _forward(
        self, chunk: Chunk, layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor], out_TD: Tensor
    ) -> None:
        hidden_TD = chunk.hidden_TD.contiguous()
        routed = RoutedTokens(
            *routing.sort_by_expert(chunk.top_k_index_TK, chunk.top_k_weights_TK, layer.num_experts, chunk.first)
        )
        inner, outer = _split(layer, updates, h)
        thin.shrink(hidden_TD, routed.offsets_E, [_shrink(u, low) for u, low in inner], routed.token_R, routed.number_R)
        terms = [Update(low, u.b, u.part, u.scaling) for u, low in inner]
        count = routed.token_R.shape[0]
        if layer.swiglu_in_gemm:
            inter_RF = hidden_TD.new_empty(count, layer.intermediate_size)
        else:
            inter_RF = hidden_TD.new_empty(count, layer.num_parts * layer.intermediate_size)
        for experts, weight in self._groups(layer.gate_up, layer.num_experts, hidden_TD.dtype):
            self._grouped_gemm(
                hidden_TD,
                weight,
                routed.offsets_E,
                inter_RF,
                terms,
                routed.token_R,
                experts=experts,
                swiglu=layer.swiglu_in_gemm,
            )
        if not layer.swiglu_in_gemm:
            inter_RF = layer.activation.function(_add_inner_bias(inter_RF, layer, routed)).contiguous()
        thin.shrink(inter_RF, routed.offsets_E, [_shrink(u, low) for u, low in outer], number_R=routed.number_R)
        terms = [Update(low, u.b, 0, u.scaling) for u, low in outer]
        y_RD = torch.empty(count, layer.hidden_size, dtype=torch.float32, device=hidden_TD.device)
        for experts, weight in self._groups(layer.down, layer.num_experts, hidden_TD.dtype):
            self._grouped_gemm(
                inter_RF, weight, routed.offsets_E, y_RD, terms, router_R=routed.weight_R, experts=experts
            )
        if layer.outer_bias is not None:
            y_RD.addcmul_(layer.outer_bias[expert_of_each(routed)], routed.weight_R[:, None])
        routing.combine(y_RD, routed.inverse_R, out_TD)

    def backward(
        self,
        dout_TD: Tensor,
        chunk: Chunk,
        layer: FrozenLayer,
        updates: list[LoraUpdate],
        h: list[Tensor],
        gradients: Gradients,
    ) -> None:
        """Writes a chunk's gradients; the first chunk writes those of A and B, others add."""
        _refuse_gains(updates)
        whole, a, b = [update.of_all() for update in updates], list(gradients.a), list(gradients.b)
        some = [u for u, update in enumerate(updates) if update.slots is not None]
        for u in some:
            a[u], b[u] = (torch.zeros_like(factor, dtype=torch.float32) for factor in (whole[u].a, whole[u].b))
        with launch.shuffling(self.shuffle):
            self._backward(dout_TD, chunk, layer, whole, h, gradients._replace(a=a, b=b))
        for u in some:
            for found, total in ((a[u], gradients.a[u]), (b[u], gradients.b[u])):
                own = found[_experts_of(updates[u].slots, len(total))]
                total.copy_(total + own if chunk.first else own)

    def _backward(
        self,
        dout_TD: Tensor,
        chunk: Chunk,
        layer: FrozenLayer,
        updates: list[LoraUpdate],
        h: list[Tensor],
        gradients: Gradients,
    ) -> None:
        dout_TD, hidden_TD = dout_TD.contiguous(), chunk.hidden_TD.contiguous()
        routed = RoutedTokens(
            *routing.sort_by_expert(chunk.top_k_index_TK, chunk.top_k_weights_TK, layer.num_experts, chunk.first)
        )
        offsets_E, count, size = routed.offsets_E, routed.token_R.shape[0], layer.intermediate_size
        inner, outer = _split(layer, updates, h)
        totals = {u.part: (a, b) for u, a, b in zip(updates, gradients.a, gradients.b, strict=True)}
        dh = {u.part: torch.empty(low.shape, dtype=torch.float32, device=low.device) for u, low in (*inner, *outer)}

        shrinks = [Shrink(u.b, dh[u.part], transposed=True, scaling=u.scaling) for u, _ in outer]
        thin.shrink(dout_TD, offsets_E, shrinks, routed.token_R)
        gate_up = hidden_TD.new_empty(count, layer.num_parts * size)
        dinter_RF, inter_RF = hidden_TD.new_empty(2, count, size)
        dx_RD = torch.empty(count, layer.hidden_size, dtype=torch.float32, device=hidden_TD.device)
        drouter_R = torch.empty_like(routed.weight_R)
        gradients_in = [_expand(u, dh[u.part]) for u, _ in outer]
        expanded = thin.expand(dinter_RF, offsets_E, gradients_in, dinter_RF.dtype, routed.number_R)

        def recompute(
            experts: slice | None, gate_up_weight: Nf4Bytes | Dequantized, down: Nf4Bytes | Dequantized
        ) -> None:
            terms = [Update(low, u.b, u.part, u.scaling) for u, low in inner]
            self._grouped_gemm(hidden_TD, gate_up_weight, offsets_E, gate_up, terms, routed.token_R, experts=experts)
            # Before the router's weight is applied, so that <inter, dInter> is the weight's own gradient.
            self._input_gradient(dout_TD, down, offsets_E, dinter_RF, routed.token_R, experts, expanded)

        def through_gate_up(experts: slice | None, gate_up_weight: Nf4Bytes | Dequantized, dgate_up: Tensor) -> None:
            shrinks = [
                Shrink(u.b, dh[u.part], transposed=True, scaling=u.scaling, column=u.part * size) for u, _ in inner
            ]
            thin.shrink(dgate_up, offsets_E, shrinks, experts=experts)
            gradients_in = [_expand(u, dh[u.part]) for u, _ in inner]
            added = thin.expand(dx_RD, offsets_E, gradients_in, dgate_up.dtype, routed.number_R, experts)
            self._input_gradient(dgate_up, gate_up_weight, offsets_E, dx_RD, None, experts, added)

        if layer.swiglu_in_gemm:
            for experts, weight, down in self._pairs(layer, hidden_TD.dtype):
                recompute(experts, weight, down)
                routing.gate_backward(gate_up, dinter_RF, routed.weight_R, inter_RF, drouter_R, offsets_E, experts)
                through_gate_up(experts, weight, gate_up)
        else:
            for experts, weight, down in self._pairs(layer, hidden_TD.dtype):
                recompute(experts, weight, down)
            _add_inner_bias(gate_up, layer, routed)
            gate_up, inter_RF, drouter_R = _activation_backward(layer, gate_up, dinter_RF, routed.weight_R)
            if layer.outer_bias is not None:
                drouter_R += bias_gradient(dout_TD, layer.outer_bias, routed)
            for experts, weight in self._groups(layer.gate_up, layer.num_experts, hidden_TD.dtype):
                through_gate_up(experts, weight, gate_up)

        add, token_R, number_R = chunk.first > 0, routed.token_R, routed.number_R
        items = [Outer(low, totals[u.part][1], transposed=True, scaling=u.scaling) for u, low in outer]
        thin.outer(dout_TD, offsets_E, items, token_R, router_R=routed.weight_R, add=add)
        items = [_input_outer(u, dh[u.part], totals[u.part][0]) for u, _ in outer]
        thin.outer(inter_RF, offsets_E, items, number_R=number_R, router_R=routed.weight_R, add=add)
        items = [Outer(low, totals[u.part][1], True, u.scaling, column=u.part * size) for u, low in inner]
        thin.outer(gate_up, offsets_E, items, add=add)
        items = [_input_outer(u, dh[u.part], totals[u.part][0]) for u, _ in inner]
        thin.outer(hidden_TD, offsets_E, items, token_R, number_R, add=add)
        routing.combine(dx_RD, routed.inverse_R, gradients.hidden_TD, drouter_R, gradients.top_k_weights_TK)

    def _grouped_gemm(
        self,
        x: Tensor,
        weight: Nf4Bytes | Dequantized,
        offsets_E: Tensor,
        out: Tensor,
        updates: Sequence[Update],
        token_R: Tensor | None = None,
        router_R: Tensor | None = None,
        experts: slice | None = None,
        swiglu: bool = False,
    ) -> None:
        if self.torch_gemm and isinstance(weight, Dequantized) and _are_all(experts, offsets_E):
            torch_gemm.grouped_gemm(x, weight, offsets_E, out, updates, token_R, router_R, swiglu)
        else:
            grouped_gemm(x, weight, offsets_E, out, updates, token_R, router_R, experts, swiglu)

    def _input_gradient(
        self,
        dy: Tensor,
        weight: Nf4Bytes | Dequantized,
        offsets_E: Tensor,
        out: Tensor,
        token_R: Tensor | None,
        experts: slice | None,
        add: bool,
    ) -> None:
        if self.torch_gemm and isinstance(weight, Dequantized) and _are_all(experts, offsets_E):
            torch_gemm.input_gradient(dy, weight, offsets_E, out, token_R, add)
        else:
            input_gradient(dy, weight, offsets_E, out, token_R, experts, add)

    def _groups(self, stack: Nf4Bytes, num_experts: int, dtype: torch.dtype) -> Iterator[Group]:
        """All experts' bytes at once; or dequantized, as many experts as the buffer holds."""
        if not self.dequantize_first:
            yield None, stack
            return
        parts = stack.packed.shape[0] // num_experts
        size = self._group_size(num_experts, parts * stack.out_features * stack.in_features * dtype.itemsize)
        buffer = stack.packed.new_empty(size * parts, stack.out_features, stack.in_features, dtype=dtype)
        for experts in _ranges(num_experts, size):
            yield experts, _dequantized(stack, experts, parts, buffer)

    def _pairs(
        self, layer: FrozenLayer, dtype: torch.dtype
    ) -> Iterator[tuple[slice | None, Nf4Bytes | Dequantized, Nf4Bytes | Dequantized]]:
        """The same of both stacks."""
        gate_up, down = layer.gate_up, layer.down
        if not self.dequantize_first:
            yield None, gate_up, down
            return
        count, parts = layer.num_experts, layer.num_parts
        size = self._group_size(count, (parts + 1) * down.out_features * down.in_features * dtype.itemsize)
        first = gate_up.packed.new_empty(size * parts, gate_up.out_features, gate_up.in_features, dtype=dtype)
        second = down.packed.new_empty(size, down.out_features, down.in_features, dtype=dtype)
        for experts in _ranges(count, size):
            yield experts, _dequantized(gate_up, experts, parts, first), _dequantized(down, experts, 1, second)

    def _group_size(self, num_experts: int, bytes_of_expert: int) -> int:
        """Experts of a group, as even as the buffer allows."""
        most = max(self.buffer_bytes // bytes_of_expert, 1)
        return -(-num_experts // -(-num_experts // most))


def _refuse_gains(updates: list[LoraUpdate]) -> None:
    """The operator computes updates with gains expert by expert; here they would be left out unseen."""
    if any(update.gain is not None for update in updates):
        raise NotImplementedError("these kernels have no gains (DoRA)")


def _experts_of(slots: Tensor | None, count: int) -> Tensor:
    """The experts that have factors, so many, in the order of these; nothing is read back to the host."""
    assert slots is not None
    return slots.argsort()[slots.numel() - count :]


def _are_all(experts: slice | None, offsets_E: Tensor) -> bool:
    return experts is None or (experts.start, experts.stop) == (0, offsets_E.shape[0])


def _ranges(num_experts: int, size: int) -> Iterator[slice]:
    for first in range(0, num_experts, size):
        yield slice(first, min(first + size, num_experts))


def _dequantized(stack: Nf4Bytes, experts: slice, parts: int, buffer: Tensor) -> Dequantized:
    matrices = slice(experts.start * parts, experts.stop * parts)
    weights = buffer[: matrices.stop - matrices.start]
    nf4.dequantize(stack, matrices, weights.flatten(0, 1))
    return Dequantized(weights, experts.start)


def _split(
    layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor]
) -> tuple[list[tuple[LoraUpdate, Tensor]], list[tuple[LoraUpdate, Tensor]]]:
    """Updates of the first GEMM, by part, and those of down, each with its x @ A."""
    pairs = sorted(zip(updates, h, strict=True), key=lambda pair: pair[0].part)
    return (
        [pair for pair in pairs if pair[0].part < layer.num_parts],
        [pair for pair in pairs if pair[0].part == layer.num_parts],
    )


def _shrink(update: LoraUpdate, low_Rr: Tensor) -> Shrink:
    return Shrink(update.a, low_Rr, dropout=update.dropout, seed=update.seed)


def _expand(update: LoraUpdate, dh_Rr: Tensor) -> Expand:
    return Expand(dh_Rr, update.a, update.dropout, update.seed)


def _input_outer(update: LoraUpdate, dh_Rr: Tensor, da: Tensor) -> Outer:
    return Outer(dh_Rr, da, dropout=update.dropout, seed=update.seed)


def _add_inner_bias(gate_up: Tensor, layer: FrozenLayer, routed: RoutedTokens) -> Tensor:
    """In place: each token's expert's bias, added in float32 and rounded once."""
    if layer.inner_bias is None:
        return gate_up
    return gate_up.add_(layer.inner_bias[expert_of_each(routed)])


def _activation_backward(
    layer: FrozenLayer, gate_up: Tensor, dinter_RF: Tensor, weight_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A family's own activation by autograd: gradient of its input, its output, and <inter, dInter>."""
    gate_up.requires_grad_()
    with differentiable():
        x_RF = layer.activation.function(gate_up)
    inter_RF = x_RF.detach().contiguous()
    drouter_R = torch.linalg.vecdot(inter_RF.float(), dinter_RF.float())
    (dgate_up,) = torch.autograd.grad(x_RF, gate_up, (dinter_RF * weight_R[:, None]).to(x_RF.dtype))
    return dgate_up.contiguous(), inter_RF, drouter_R
