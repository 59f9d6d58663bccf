"""The expert layer expert by expert: dequantize a tile, use it for every GEMM that needs it, continue. Any device.

In backward a tile of gate_up's rows serves the recomputation and the input's gradient, so that a step dequantizes each
weight twice and not three times; a layer that has kept what the recomputation gives is spared that. Tiles run along the
intermediate size; the input's gradient is summed over them in float32.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R routed tokens of all experts, N of
one expert, M those with what pads them, E experts, P parts of the first GEMM, r rank.
"""

import torch
from torch import Tensor

from expertune.kernels.cpu import gemm_dtype, pad_rows
from expertune.kernels.dequant_gemm import Scratch, multiply, multiply_input_gradient, spans
from expertune.kernels.dropout import dropout
from expertune.kernels.expert_mlp.plan import (
    Chunk,
    FrozenLayer,
    Gradients,
    activate,
    activation_backward,
    bias_gradient,
    combine,
    differentiable,
    sort_by_expert,
)
from expertune.kernels.lora import LoraUpdate, updates_by_expert
from expertune.kernels.nf4 import Nf4Bytes, dequantize

# Gradients of A and B are added to what is there.
overwrites = False


def forward(chunk: Chunk, layer: FrozenLayer, updates: list[LoraUpdate], h: list[Tensor], out_TD: Tensor) -> None:
    """Writes the layer's output to `out_TD` and x @ A of each update to `h`; see `operator.Route`."""
    routed = sort_by_expert(chunk, layer.num_experts)
    dtype = gemm_dtype(chunk.hidden_TD.dtype, chunk.hidden_TD.device)
    y_RD = torch.empty(routed.token_R.shape[0], layer.hidden_size, dtype=torch.float32, device=chunk.hidden_TD.device)
    scratch, of_expert = Scratch(chunk.hidden_TD.device, dtype), updates_by_expert(updates)
    for expert, span in spans(routed.offsets_E):
        x_ND = chunk.hidden_TD[routed.token_R[span]].to(dtype)
        own = of_expert(expert)
        own_updates, h_N = [each.update for each in own], [h[each.number][span] for each in own]
        number_N = routed.number_R[span]
        for update, low in zip(own_updates, h_N, strict=True):
            if update.part < layer.num_parts:
                _shrink(x_ND, update, low, number_N)
        gate_up = _gate_up(x_ND, expert, layer, own_updates, h_N, number_N, scratch)
        if chunk.gate_up_RN is not None:
            chunk.gate_up_RN[span] = gate_up
        x_NF = activate(gate_up, layer)
        for update, low in zip(own_updates, h_N, strict=True):
            if update.part == layer.num_parts:
                _shrink(x_NF, update, low, number_N)
        y_ND = _down(x_NF, expert, layer, own_updates, h_N, number_N, scratch)
        if layer.activation.after is not None:
            y_ND = layer.activation.after(y_ND)
        torch.mul(y_ND, routed.weight_R[span, None], out=y_RD[span])
    out_TD.copy_(combine(y_RD, routed.inverse_R, chunk.hidden_TD.shape[0]))


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
    dtype = gemm_dtype(chunk.hidden_TD.dtype, chunk.hidden_TD.device)
    dx_RD = torch.empty(routed.token_R.shape[0], layer.hidden_size, dtype=torch.float32, device=chunk.hidden_TD.device)
    dweight_R = torch.empty_like(routed.weight_R)
    scratch, of_expert = Scratch(chunk.hidden_TD.device, dtype), updates_by_expert(updates)
    for expert, span in spans(routed.offsets_E):
        own = of_expert(expert)
        own_updates, h_N = [each.update for each in own], [h[each.number][span] for each in own]
        tokens, number_N = routed.token_R[span], routed.number_R[span]
        dout_ND, x_ND = dout_TD[tokens].to(dtype), chunk.hidden_TD[tokens].to(dtype)
        kept = None if chunk.gate_up_RN is None else chunk.gate_up_RN[span].to(dtype)
        weight_N1 = routed.weight_R[span, None]
        dweight_N = None
        if layer.activation.after is not None:
            # From here on dOut is the gradient of what `after` was given, with the router's weight in it.
            dout_ND, dweight_N = _after_backward(
                dout_ND, x_ND, kept, weight_N1, expert, layer, own_updates, h_N, number_N, scratch
            )
            weight_N1 = torch.ones_like(weight_N1)
        dx_RD[span], dweight_R[span] = _expert_backward(
            dout_ND,
            x_ND,
            kept,
            weight_N1,
            expert,
            layer,
            own_updates,
            h_N,
            [gradients.a[u][slot] for u, slot, _ in own],
            [gradients.b[u][slot] for u, slot, _ in own],
            [gradients.gains[u][slot] if update.gain is not None else None for u, slot, update in own],
            number_N,
            scratch,
        )
        if dweight_N is not None:
            dweight_R[span] = dweight_N
    if layer.outer_bias is not None and layer.activation.after is None:
        dweight_R += bias_gradient(dout_TD, layer.outer_bias, routed)
    gradients.top_k_weights_TK.copy_(dweight_R[routed.inverse_R].view_as(gradients.top_k_weights_TK))
    gradients.hidden_TD.copy_(combine(dx_RD, routed.inverse_R, chunk.hidden_TD.shape[0]))


def _gate_up(
    x_ND: Tensor,
    expert: int,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    number_N: Tensor,
    scratch: Scratch,
) -> Tensor:
    """An expert's first GEMM [N, P * F] with its updates, whose x @ A are in `h`, and its bias."""
    size, num_parts = layer.intermediate_size, layer.num_parts
    gate_up = x_ND.new_empty(x_ND.shape[0], num_parts * size)
    x_MD = pad_rows(x_ND)
    for part in range(num_parts):
        multiply(x_MD, layer.gate_up, expert * num_parts + part, _part(gate_up, part, size), scratch)
    for update, low in zip(updates, h, strict=True):
        if update.part < num_parts:
            matrix = expert * num_parts + update.part
            dropped = _of_dropped(x_ND, update, number_N, layer.gate_up, matrix, scratch)
            _add(_part(gate_up, update.part, size), low, update, dropped=dropped)
    return gate_up if layer.inner_bias is None else gate_up.add_(layer.inner_bias[expert])


def _down(
    x_NF: Tensor,
    expert: int,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    number_N: Tensor,
    scratch: Scratch,
) -> Tensor:
    """An expert's second GEMM [N, D] with its updates and its bias."""
    y_ND = x_NF.new_empty(x_NF.shape[0], layer.hidden_size)
    multiply(x_NF, layer.down, expert, y_ND, scratch)
    for update, low in zip(updates, h, strict=True):
        if update.part == layer.num_parts:
            dropped = _of_dropped(x_NF, update, number_N, layer.down, expert, scratch)
            _add(y_ND, low, update, dropped=dropped)
    return y_ND if layer.outer_bias is None else y_ND.add_(layer.outer_bias[expert])


def _after_backward(
    dout_ND: Tensor,
    x_ND: Tensor,
    kept: Tensor | None,
    weight_N1: Tensor,
    expert: int,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    number_N: Tensor,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Through what comes after an expert: gradient of what it was given [N, D], and of the router's weight [N].

    It needs the expert's output, which is computed again.
    """
    assert layer.activation.after is not None
    gate_up = _gate_up(x_ND, expert, layer, updates, h, number_N, scratch) if kept is None else kept
    x_NF = activate(gate_up, layer)
    y_ND = _down(x_NF, expert, layer, updates, h, number_N, scratch).detach().requires_grad_()
    with differentiable():
        out_ND = layer.activation.after(y_ND)
    dweight_N = torch.linalg.vecdot(out_ND.detach().float(), dout_ND.float())
    (dy_ND,) = torch.autograd.grad(out_ND, y_ND, (dout_ND * weight_N1).to(out_ND.dtype))
    return dy_ND, dweight_N


def _expert_backward(
    dout_ND: Tensor,
    x_ND: Tensor,
    kept: Tensor | None,
    weight_N1: Tensor,
    expert: int,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    da: list[Tensor],
    db: list[Tensor],
    dgains: list[Tensor | None],
    number_N: Tensor,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """dX float32 [N, D] and the weights' gradient [N] of one expert; adds to its `da`, `db` and `dgains`.

    `kept` [N, P * F] is what `_gate_up` gave in forward, where no update has a gain; None computes it again.
    """
    size, num_parts = layer.intermediate_size, layer.num_parts
    dx_ND = torch.zeros(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    dweight_N = dx_ND.new_zeros(dx_ND.shape[0])
    dh = [torch.zeros_like(low, dtype=torch.float32) for low in h]
    dgemm_ND = dout_ND  # gradient of W @ x
    # With a gain and dropout W is multiplied by the dropped input too, which has a gradient of its own.
    on_dropped = {u: update for u, update in enumerate(updates) if update.gain is not None and update.dropout}
    dropped_x = {u: _drop(x_ND.float(), each, number_N).to(x_ND.dtype) for u, each in on_dropped.items()}
    ddropped: dict[int, Tensor] = {}
    inter_whole_NF = None
    for u, update in enumerate(updates):
        if update.part == num_parts:
            dscaled = dout_ND
            if update.gain is not None:
                dscaled = dout_ND * update.gain.to(dout_ND.dtype)
                inter_whole_NF = x_ND.new_empty(x_ND.shape[0], size)
                if u in on_dropped:
                    ddropped[u] = dout_ND.new_empty(dout_ND.shape[0], size)
                    multiply_input_gradient(dscaled - dout_ND, layer.down, expert, 1, ddropped[u], scratch)
                else:
                    dgemm_ND = dscaled
            dout = dscaled.to(update.b.dtype)
            dh[u] = (dout @ update.b).float() * update.scaling
            db[u] += dout.t().float() @ (h[u].float() * weight_N1 * update.scaling)
        elif u in on_dropped:
            ddropped[u] = torch.zeros_like(dx_ND)

    dinter_of_down_NF = dout_ND.new_empty(dout_ND.shape[0], size)
    multiply_input_gradient(dgemm_ND, layer.down, expert, 1, dinter_of_down_NF, scratch)
    rows, x_MD = slice(x_ND.shape[0]), pad_rows(x_ND)
    step = scratch.tile_size(size, num_parts * layer.hidden_size) if layer.activation.columnwise else size
    for start in range(0, size, step):
        columns = slice(start, min(start + step, size))
        width = columns.stop - start
        w_gate_up = scratch.tile(num_parts * width, layer.hidden_size)
        for part in range(num_parts):
            target = w_gate_up[part * width : (part + 1) * width]
            dequantize(layer.gate_up, expert * num_parts + part, target, rows=columns)

        before_gain: dict[int, Tensor] = {}
        if kept is None:
            gate_up = (x_MD @ w_gate_up.t())[rows]
            before_gain = _add_inner(gate_up, expert, layer, updates, h, columns, w_gate_up, dropped_x)
        else:
            gate_up = kept.unflatten(1, (num_parts, size))[:, :, columns].flatten(1)
        dinter_NF = dinter_of_down_NF[:, columns]
        for u, update in enumerate(updates):
            if update.part == num_parts:
                low = dh[u] @ update.a[:, columns].float()
                low = low + ddropped[u][:, columns] if u in on_dropped else low
                dinter_NF += _drop(low, update, number_N, start, size)
        inter_NF, dgate_up = activation_backward(gate_up, dinter_NF, weight_N1, layer)
        if inter_whole_NF is not None:
            inter_whole_NF[:, columns] = inter_NF
        for u, update in enumerate(updates):
            if update.part == num_parts:
                dropped = _drop(inter_NF.float(), update, number_N, start, size)
                da[u][:, columns] += (dh[u] * weight_N1).t() @ dropped
        # Before the router's weight is applied, so that <inter, dInter> is the weight's own gradient.
        dweight_N += torch.linalg.vecdot(inter_NF.float(), dinter_NF.float())

        dscaled_parts: dict[int, Tensor] = {}
        for u, scaled in before_gain.items():
            update, dpart = updates[u], _part(dgate_up, updates[u].part, width)
            dgain = dgains[u]
            assert update.gain is not None
            assert dgain is not None
            dgain[columns] += (dpart.float() * scaled.float()).sum(dim=0)
            dscaled_parts[u] = dpart * update.gain[columns].to(dpart.dtype)
            if u in on_dropped:
                ddropped[u] += (dscaled_parts[u] - dpart) @ w_gate_up[update.part * width : (update.part + 1) * width]
            else:
                dpart.copy_(dscaled_parts[u])
        if dx_ND.dtype == dgate_up.dtype:
            dx_ND.addmm_(dgate_up, w_gate_up)
        else:
            dx_ND += (pad_rows(dgate_up) @ w_gate_up)[rows]
        for u, update in enumerate(updates):
            if update.part < num_parts:
                dpart = dscaled_parts.get(u, _part(dgate_up, update.part, width)).float()
                dh[u].addmm_(dpart, update.b[columns].float(), alpha=update.scaling)
                db[u][columns] += dpart.t() @ (h[u].float() * update.scaling)
    for u, update in enumerate(updates):
        if update.part < num_parts:
            da[u] += dh[u].t() @ _drop(x_ND.float(), update, number_N)
            low = dh[u] @ update.a.float()
            dx_ND += _drop(low + ddropped[u] if u in on_dropped else low, update, number_N)
        elif update.gain is not None:
            dgain = dgains[u]
            assert inter_whole_NF is not None
            assert dgain is not None
            of_whole = _of_dropped(inter_whole_NF, update, number_N, layer.down, expert, scratch)
            if of_whole is None:
                of_whole = dout_ND.new_empty(dout_ND.shape)
                multiply(inter_whole_NF, layer.down, expert, of_whole, scratch)
            _add_expanded(of_whole, h[u], update, update.b)
            dgain += (dout_ND.float() * weight_N1 * of_whole.float()).sum(dim=0)
    return dx_ND, dweight_N


def _add_inner(
    gate_up: Tensor,
    expert: int,
    layer: FrozenLayer,
    updates: list[LoraUpdate],
    h: list[Tensor],
    columns: slice,
    w_gate_up: Tensor,
    dropped_x: dict[int, Tensor],
) -> dict[int, Tensor]:
    """Add updates and bias to some columns of each part of W @ x, in place; returns what gains scale, by update.

    `w_gate_up` holds the rows of W for these columns, and `dropped_x` the inputs of updates with a gain and dropout.
    """
    width, before_gain = gate_up.shape[1] // layer.num_parts, {}
    for u, update in enumerate(updates):
        if update.part < layer.num_parts:
            w_part = w_gate_up[update.part * width : (update.part + 1) * width]
            of_dropped = dropped_x[u] @ w_part.t() if u in dropped_x else None
            scaled = _add(_part(gate_up, update.part, width), h[u], update, columns, of_dropped)
            if scaled is not None:
                before_gain[u] = scaled
    if layer.inner_bias is not None:
        gate_up += layer.inner_bias[expert].view(layer.num_parts, -1)[:, columns].flatten()
    return before_gain


def _part(tensor: Tensor, part: int, size: int) -> Tensor:
    return tensor[:, part * size : (part + 1) * size]


def _drop(x: Tensor, update: LoraUpdate, number_N: Tensor, first_column: int = 0, columns: int | None = None) -> Tensor:
    if not update.dropout:
        return x
    return dropout(x, number_N, update.seed, update.dropout, None, first_column, columns)


def _shrink(x_NK: Tensor, update: LoraUpdate, out_Nr: Tensor, number_N: Tensor) -> None:
    """out = dropout(x) @ A.T, in the adapter's dtype."""
    dropped = _drop(x_NK.float(), update, number_N) if update.dropout else x_NK
    torch.mm(dropped.to(update.a.dtype), update.a.t(), out=out_Nr)


def _of_dropped(
    x_NK: Tensor, update: LoraUpdate, number_N: Tensor, weight: Nf4Bytes, index: int, scratch: Scratch
) -> Tensor | None:
    """W @ dropout(x), where an update's gain scales that."""
    if update.gain is None or not update.dropout:
        return None
    out_NM = x_NK.new_empty(x_NK.shape[0], weight.out_features)
    multiply(_drop(x_NK.float(), update, number_N).to(x_NK.dtype), weight, index, out_NM, scratch)
    return out_NM


def _add(
    y_NM: Tensor,
    h_Nr: Tensor,
    update: LoraUpdate,
    columns: slice = slice(None),
    dropped: Tensor | None = None,
) -> Tensor | None:
    """Make y = W @ x the output with an update, in place; returns what its gain scales, if there is one.

    Args:
        y_NM: [N, output features].
        h_Nr: x @ A.T.
        update: of the expert.
        columns: the output features that y has.
        dropped: W @ dropout(x), where the gain scales that; it is written to.
    """
    if update.gain is None:
        _add_expanded(y_NM, h_Nr, update, update.b[columns])
        return None
    scaled = y_NM.clone() if dropped is None else dropped
    y_NM -= scaled
    _add_expanded(scaled, h_Nr, update, update.b[columns])
    y_NM += scaled * update.gain[columns].to(scaled.dtype)
    return scaled


def _add_expanded(y_NM: Tensor, h_Nr: Tensor, update: LoraUpdate, b_Mr: Tensor) -> None:
    """y += scaling * h @ B.T, computed in the adapter's dtype and rounded once to y's."""
    if y_NM.dtype == h_Nr.dtype:
        y_NM.addmm_(h_Nr, b_Mr.t(), alpha=update.scaling)
    else:
        y_NM += (h_Nr * update.scaling) @ b_Mr.t()
