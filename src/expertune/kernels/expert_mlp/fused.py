"""The expert layer by GEMMs that dequantize inside: each is one call for all experts. CPU.

Between the GEMMs numbers are float32. Where tokens have 16 bits, frozen weights and what they multiply are rounded to
bfloat16, or to integers on a CPU that multiplies no floats of 16 bits (`native.arithmetic`), with sums in float32; all
other arithmetic is float32.

The library gathers tokens as it reads them, so that none is copied to its expert, drops what a low-rank factor reads as
it reads it, and adds the low-rank updates where it sums each output. In bfloat16 it applies SwiGLU there too.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R routed tokens, E experts, P parts
of the first GEMM, r rank.
"""

from typing import cast

import torch
from torch import Tensor

from expertune.kernels import native, workspace
from expertune.kernels.dequant_gemm import spans
from expertune.kernels.dropout import in_library
from expertune.kernels.expert_mlp.plan import (
    Chunk,
    FrozenLayer,
    Gradients,
    RoutedTokens,
    bias_gradient,
    combine,
    differentiable,
    pieces,
    sort_by_expert,
)
from expertune.kernels.lora import LoraUpdate, updates_by_expert
from expertune.kernels.workspace import as_float

# Gradients of A and B are added to what is there.
overwrites = False


def forward(chunk: Chunk, layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor], out_TD: Tensor) -> None:
    """Writes the layer's output to `out_TD` and x @ A of each update to `h`; see `operator.Route`."""
    routed = sort_by_expert(chunk, layer.num_experts)
    x_TD = as_float(chunk.hidden_TD, "tokens")
    for update, out in _inner(layer, updates, h):
        _dense(x_TD, update, routed, out, routed.token_R)
    kept = chunk.gate_up_RN
    if kept is not None:
        x_RF = _activate(_gate_up_to_keep(x_TD, routed, layer, updates, h, kept), layer)
    elif _swiglu_in_gemm(layer, updates):
        x_RF = workspace.take("intermediate", routed.token_R.shape[0], layer.intermediate_size)
        _multiply_gate_up(x_TD, routed, layer, updates, h, x_RF, swiglu=True)
    else:
        x_RF = _activate(_gate_up(x_TD, routed, layer, updates, h), layer)
    for update, out in _outer(layer, updates, h):
        _dense(x_RF, update, routed, out)
    y_RD = workspace.take("rows", x_RF.shape[0], layer.hidden_size)
    added = [_update(update, low, 0, layer.hidden_size) for update, low in _outer(layer, updates, h)]
    gained = [update for update, _ in _outer(layer, updates, h) if update.gain is not None]
    added += [] if gained else _bias(layer.outer_bias, routed)
    native.grouped_gemm(x_RF, layer.down, routed.offsets_E, y_RD, transposed=True, updates=added, dtype=layer.dtype)
    _scale(y_RD, gained, layer.outer_bias if gained else None, routed, first_part=layer.num_parts)
    out_TD.copy_(combine(y_RD.mul_(routed.weight_R[:, None]), routed.inverse_R, chunk.hidden_TD.shape[0]))


def backward(
    dout_TD: Tensor,
    chunk: Chunk,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    gradients: Gradients,
) -> None:
    """Writes gradients of hidden and of the router's weights; adds to those of A and B."""
    routed = sort_by_expert(chunk, layer.num_experts)
    x_TD = as_float(chunk.hidden_TD, "tokens")
    dout_TD = as_float(dout_TD, "output_gradient")
    size = layer.intermediate_size
    before_gain = _before_gain(routed, layer, updates)
    if chunk.gate_up_RN is None:
        gate_up = _gate_up(x_TD, routed, layer, updates, h, before_gain)
    else:
        gate_up = as_float(chunk.gate_up_RN, "gate_up")

    # Before the router's weight is applied, so that <inter, dInter> is the weight's own gradient.
    dh_down = {}
    dy, token_R = dout_TD, cast(Tensor | None, routed.token_R)
    gained = [update for update, _ in _outer(layer, updates, h) if update.gain is not None]
    if gained:  # each expert scales the gradient by a gain of its own
        dy, token_R = workspace.take("output", routed.token_R.shape[0], layer.hidden_size), None
        torch.index_select(dout_TD, 0, routed.token_R, out=dy)
        _scale(dy, gained, None, routed, first_part=layer.num_parts)
    for u, (update, low) in enumerate(zip(updates, h, strict=True)):
        if update.part == layer.num_parts:
            dh_down[u] = low.new_empty(low.shape, dtype=torch.float32)
            _product(dy, update.b, update, routed, dh_down[u], transposed=False, index=token_R)
            dh_down[u] *= update.scaling
    dinter_RF = workspace.take("intermediate", gate_up.shape[0], size)
    added = [_input_update(updates[u], dh, routed) for u, dh in dh_down.items()]
    native.grouped_gemm(
        dy,
        layer.down,
        routed.offsets_E,
        dinter_RF,
        transposed=False,
        updates=added,
        index=token_R,
        dtype=layer.dtype,
    )
    inter_RF, dgate_up, dweight_R = _activation_backward(gate_up, dinter_RF, routed.weight_R, layer)
    if layer.outer_bias is not None:
        dweight_R += bias_gradient(dout_TD, layer.outer_bias, routed)

    for u, dh in dh_down.items():
        update, low = updates[u], h[u]
        dropped = _dropout(update, routed)
        _add_outer(gradients.a[u], dh * routed.weight_R[:, None], inter_RF, routed, update.slots, dropout=dropped)
        scaled = low.float() * (routed.weight_R * update.scaling)[:, None]
        _add_outer(gradients.b[u].transpose(1, 2), scaled, dy, routed, update.slots, token_R)
        if update.gain is not None:
            y_RD = workspace.take("rows", inter_RF.shape[0], layer.hidden_size)
            added = [_update(update, low, 0, layer.hidden_size)]
            native.grouped_gemm(
                inter_RF, layer.down, routed.offsets_E, y_RD, transposed=True, updates=added, dtype=layer.dtype
            )
            _add_gain_gradient(
                gradients.gains[u], update, dout_TD[routed.token_R] * routed.weight_R[:, None], y_RD, routed
            )

    if before_gain is not None:
        for u, update in enumerate(updates):
            if update.part < layer.num_parts and update.gain is not None:
                columns = slice(update.part * size, (update.part + 1) * size)
                _add_gain_gradient(gradients.gains[u], update, dgate_up[:, columns], before_gain[:, columns], routed)
        _scale(dgate_up, [update for update, _ in _inner(layer, updates, h) if update.gain is not None], None, routed)
    added = []
    for u, (update, low) in enumerate(zip(updates, h, strict=True)):
        if update.part == layer.num_parts:
            continue
        dpart = dgate_up[:, update.part * size : (update.part + 1) * size]
        dh = low.new_empty(low.shape, dtype=torch.float32)
        _product(dpart, update.b, update, routed, dh, transposed=False)
        dh *= update.scaling
        _add_outer(gradients.b[u].transpose(1, 2), low.float() * update.scaling, dpart, routed, update.slots)
        _add_outer(gradients.a[u], dh, x_TD, routed, update.slots, routed.token_R, _dropout(update, routed))
        added.append(_input_update(update, dh, routed))
    dx_RD = workspace.take("rows", dgate_up.shape[0], layer.hidden_size)
    native.grouped_gemm(
        dgate_up, layer.gate_up, routed.offsets_E, dx_RD, transposed=False, updates=added, dtype=layer.dtype
    )
    gradients.top_k_weights_TK.copy_(dweight_R[routed.inverse_R].view_as(gradients.top_k_weights_TK))
    gradients.hidden_TD.copy_(combine(dx_RD, routed.inverse_R, chunk.hidden_TD.shape[0]))


def _swiglu_in_gemm(layer: FrozenLayer, updates: list[LoraUpdate]) -> bool:
    """Whether the first GEMM of the forward gives the intermediate values: gains come between, and have no kernel."""
    in_bfloat16 = layer.dtype == torch.bfloat16 and native.bfloat16_arithmetic() > 0
    return in_bfloat16 and layer.activation.swiglu and all(update.gain is None for update in updates)


def _gate_up(
    x_TD: Tensor,
    routed: RoutedTokens,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    before_gain: Tensor | None = None,
) -> Tensor:
    """The first GEMM with its updates, float32 [R, P * F]; without gains and bias also in `before_gain`."""
    out = workspace.take("gate_up", routed.token_R.shape[0], layer.num_parts * layer.intermediate_size)
    _multiply_gate_up(x_TD, routed, layer, updates, h, out)
    gained = [update for update, _ in _inner(layer, updates, h) if update.gain is not None]
    if before_gain is not None:
        before_gain.copy_(out)
    _scale(out, gained, layer.inner_bias if gained else None, routed)
    return out


def _gate_up_to_keep(
    x_TD: Tensor, routed: RoutedTokens, layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor], kept: Tensor
) -> Tensor:
    """The first GEMM with its updates, none of which has a gain, in float32; also in `kept`, in that one's dtype."""
    if kept.dtype == torch.float32:
        _multiply_gate_up(x_TD, routed, layer, updates, h, kept)
        return kept
    gate_up = _gate_up(x_TD, routed, layer, updates, h)
    kept.copy_(gate_up)
    return gate_up


def _multiply_gate_up(
    x_TD: Tensor,
    routed: RoutedTokens,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    out: Tensor,
    swiglu: bool = False,
) -> None:
    """The first GEMM with its updates, and its bias where no gain comes before that."""
    size, inner = layer.intermediate_size, _inner(layer, updates, h)
    added = [_update(update, low, update.part * size, (update.part + 1) * size) for update, low in inner]
    added += [] if any(update.gain is not None for update, _ in inner) else _bias(layer.inner_bias, routed)
    native.grouped_gemm(
        x_TD,
        layer.gate_up,
        routed.offsets_E,
        out,
        transposed=True,
        updates=added,
        index=routed.token_R,
        dtype=layer.dtype,
        swiglu=swiglu,
    )


def _before_gain(routed: RoutedTokens, layer: FrozenLayer, updates: list[LoraUpdate]) -> Tensor | None:
    """Memory for the first GEMM before its gains, whose gradients need it; None where it has none."""
    if not any(update.part < layer.num_parts and update.gain is not None for update in updates):
        return None
    return workspace.take("before_gain", routed.token_R.shape[0], layer.num_parts * layer.intermediate_size)


def _scale(
    y_RN: Tensor, gained: list[LoraUpdate], bias_EN: Tensor | None, routed: RoutedTokens, first_part: int = 0
) -> None:
    """Scale each expert's tokens by its gains, part by part beginning with `first_part`, and add its bias after."""
    own_updates = updates_by_expert(gained)
    for expert, span in spans(routed.offsets_E) if gained else ():
        for _, _, update in own_updates(expert):
            assert update.gain is not None
            first, width = update.part - first_part, len(update.gain)
            y_RN[span, first * width : (first + 1) * width] *= update.gain
        if bias_EN is not None:
            y_RN[span] += bias_EN[expert]


def _add_gain_gradient(total_SN: Tensor, update: LoraUpdate, dy_RN: Tensor, y_RN: Tensor, routed: RoutedTokens) -> None:
    """total += the sum over an expert's tokens of dY * Y."""
    own_update = updates_by_expert([update])
    for expert, span in spans(routed.offsets_E):
        for _, slot, _ in own_update(expert):
            total_SN[slot] += torch.einsum("rn,rn->n", dy_RN[span], y_RN[span])


def _activate(gate_up: Tensor, layer: FrozenLayer) -> Tensor:
    out = workspace.take("intermediate", gate_up.shape[0], layer.intermediate_size)
    if layer.activation.swiglu:
        native.swiglu(gate_up, out)
    else:
        for rows in pieces(gate_up):
            out[rows] = layer.activation.function(gate_up[rows])
    return out


def _activation_backward(
    gate_up: Tensor, dinter_RF: Tensor, weight_R: Tensor, layer: FrozenLayer
) -> tuple[Tensor, Tensor, Tensor]:
    """What the activation gave [R, F], the gradient of its input [R, P * F], and <inter, dInter> [R].

    The first takes the place of `dinter_RF`. `gate_up` is not written to unless it lies in the memory of that name.
    """
    dgate_up, dweight_R = workspace.take("gate_up", *gate_up.shape), torch.empty_like(weight_R)
    if layer.activation.swiglu:
        native.swiglu_backward(gate_up, dinter_RF, weight_R, dgate_up, dweight_R)
        return dinter_RF, dgate_up, dweight_R
    for rows in pieces(gate_up):
        dinter = dinter_RF[rows]
        piece = gate_up[rows].detach().requires_grad_()
        with differentiable():
            activated = layer.activation.function(piece)
        dweight_R[rows] = torch.linalg.vecdot(activated.detach(), dinter)
        (dgate_up[rows],) = torch.autograd.grad(activated, piece, dinter.mul_(weight_R[rows, None]))
        dinter.copy_(activated.detach())
    return dinter_RF, dgate_up, dweight_R


def _inner(layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor]) -> list[tuple[LoraUpdate, Tensor]]:
    return [pair for pair in zip(updates, h, strict=True) if pair[0].part < layer.num_parts]


def _outer(layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor]) -> list[tuple[LoraUpdate, Tensor]]:
    return [pair for pair in zip(updates, h, strict=True) if pair[0].part == layer.num_parts]


def _update(update: LoraUpdate, h: Tensor, column: int, column_end: int) -> native.Update:
    return native.Update(h.float() * update.scaling, as_float(update.b), column, column_end, update.slots)


def _bias(bias_EN: Tensor | None, routed: RoutedTokens) -> list[native.Update]:
    """A bias as an update of rank one whose h is 1 everywhere, so that the library adds it where it sums."""
    if bias_EN is None:
        return []
    ones = torch.ones(routed.token_R.shape[0], 1)
    return [native.Update(ones, bias_EN.contiguous().unsqueeze(2), 0, bias_EN.shape[1])]


def _input_update(update: LoraUpdate, dh_Rr: Tensor, routed: RoutedTokens) -> native.Update:
    """The gradient of an update's input, dh @ A[e] where it was kept, as an update of the frozen weights' own."""
    a = as_float(update.a)
    return native.Update(dh_Rr, a, 0, a.shape[2], update.slots, _dropout(update, routed))


def _dropout(update: LoraUpdate, routed: RoutedTokens) -> native.Dropout | None:
    """Of the update's input, whose columns it reads by A."""
    if not update.dropout:
        return None
    return in_library(routed.number_R, int(update.seed), update.dropout, update.a.shape[2])


def _dense(x: Tensor, update: LoraUpdate, routed: RoutedTokens, out_Rr: Tensor, index: Tensor | None = None) -> None:
    """out = x @ A[e].T of the dropped x, rounded to out's dtype."""
    low = torch.empty(out_Rr.shape, dtype=torch.float32)
    dropped = _dropout(update, routed)
    _product(x, update.a, update, routed, low, transposed=True, index=index, dropout=dropped)
    out_Rr.copy_(low)


def _product(
    x: Tensor,
    factor: Tensor,
    update: LoraUpdate,
    routed: RoutedTokens,
    out: Tensor,
    *,
    transposed: bool,
    index: Tensor | None = None,
    dropout: native.Dropout | None = None,
) -> None:
    """out = x @ factor[e].T (transposed) or @ factor[e], a factor of the update; zeros where an expert has none."""
    offsets_E, slots = routed.offsets_E, update.slots
    native.grouped_gemm(
        x, as_float(factor), offsets_E, out, transposed=transposed, index=index, slots=slots, dropout=dropout
    )


def _add_outer(
    total_Epq: Tensor,
    u: Tensor,
    v: Tensor,
    routed: RoutedTokens,
    slots: Tensor | None,
    index: Tensor | None = None,
    dropout: native.Dropout | None = None,
) -> None:
    """total += u[tokens of e].T @ v[tokens of e]; fast where v is the wide one, whose rows are read as they lie."""
    out = total_Epq.new_empty(total_Epq.shape)
    native.outer(u, v, routed.offsets_E, out, index, slots, dropout)
    total_Epq += out
