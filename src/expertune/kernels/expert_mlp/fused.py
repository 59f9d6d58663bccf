"""The expert layer by GEMMs that dequantize inside: each is one call for all experts. CPU; float32 arithmetic.

The library gathers tokens as it reads them, so that rows are never copied to their experts, and adds the low-rank
updates where it sums each output.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R routed rows, E experts, P parts of
the first GEMM, r rank.
"""

import torch
from torch import Tensor

from expertune.kernels import native, workspace
from expertune.kernels.dropout import dropout
from expertune.kernels.expert_mlp.plan import (
    Layer,
    LowRank,
    Sorted,
    bias_gradient,
    combine,
    differentiable,
    sort_rows,
)
from expertune.kernels.grouped_linear.fused import plain

# Gradients of A and B are added to what is there.
overwrites = False


def forward(
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    layer: Layer,
    low_rank: list[LowRank],
    h: list[Tensor],
    first_row: int,
    out_TD: Tensor,
) -> None:
    """Writes the layer's output to `out_TD` and x @ A of each update to `h`; `first_row` places the chunk."""
    rows, x_TD = sort_rows(top_k_index_TK, top_k_weights_TK, layer.num_experts, first_row), plain(hidden_TD)
    for update, out in _inner(layer, low_rank, h):
        if update.dropout:
            dropped = _dropped(x_TD, update, rows, rows.token_R)
            _dense(dropped, update.a, rows, out)
        else:
            _dense(x_TD, update.a, rows, out, rows.token_R)
    x_RF = _activate(_gate_up(x_TD, rows, layer, low_rank, h), layer)
    for update, out in _outer(layer, low_rank, h):
        dropped = _dropped(x_RF, update, rows) if update.dropout else x_RF
        _dense(dropped, update.a, rows, out)
    y_RD = workspace.take("rows", x_RF.shape[0], layer.hidden_size)
    updates = [_update(update, low, 0, layer.hidden_size) for update, low in _outer(layer, low_rank, h)]
    updates += _bias(layer.outer_bias, rows)
    native.grouped_gemm(x_RF, layer.down, rows.offsets_E, y_RD, transposed=True, updates=updates)
    out_TD.copy_(combine(y_RD.mul_(rows.weight_R[:, None]), rows.inverse_R, hidden_TD.shape[0]))


def backward(
    dout_TD: Tensor,
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    layer: Layer,
    low_rank: list[LowRank],
    h: list[Tensor],
    da: list[Tensor],
    db: list[Tensor],
    first_row: int,
    dhidden_TD: Tensor,
    dweights_TK: Tensor,
) -> None:
    """Writes gradients of hidden and of the router's weights; adds to `da` and `db`."""
    rows = sort_rows(top_k_index_TK, top_k_weights_TK, layer.num_experts, first_row)
    x_TD, dout_TD = plain(hidden_TD), plain(dout_TD)
    size = layer.intermediate_size
    gate_up = _gate_up(x_TD, rows, layer, low_rank, h)

    # Before the router's weight is applied, so that <inter, dInter> is the weight's own gradient.
    dh_down = {}
    for u, (update, low) in enumerate(zip(low_rank, h, strict=True)):
        if update.part == layer.num_parts:
            dh_down[u] = low.new_empty(low.shape, dtype=torch.float32)
            native.grouped_gemm(
                dout_TD, plain(update.b), rows.offsets_E, dh_down[u], transposed=False, index=rows.token_R
            )
            dh_down[u] *= update.scaling
    dinter_RF = workspace.take("intermediate", gate_up.shape[0], size)
    undropped = [
        native.Update(dh, plain(low_rank[u].a), 0, size) for u, dh in dh_down.items() if not low_rank[u].dropout
    ]
    native.grouped_gemm(
        dout_TD, layer.down, rows.offsets_E, dinter_RF, transposed=False, updates=undropped, index=rows.token_R
    )
    for u, dh in dh_down.items():
        if low_rank[u].dropout:
            dinter_RF += _low_rank_input(dh, low_rank[u], rows)
    inter_RF, dgate_up, dweight_R = _activation_backward(gate_up, dinter_RF, rows.weight_R, layer)
    if layer.outer_bias is not None:
        dweight_R += bias_gradient(dout_TD, layer.outer_bias, rows)

    for u, dh in dh_down.items():
        update, low = low_rank[u], h[u]
        dropped = _dropped(inter_RF, update, rows) if update.dropout else inter_RF
        _add_outer(da[u], dh * rows.weight_R[:, None], dropped, rows)
        transposed = db[u].new_empty(db[u].transpose(1, 2).shape)
        native.outer(
            low.float() * (rows.weight_R * update.scaling)[:, None], dout_TD, rows.offsets_E, transposed, rows.token_R
        )
        db[u] += transposed.transpose(1, 2)

    updates, dropped_dh = [], []
    for u, (update, low) in enumerate(zip(low_rank, h, strict=True)):
        if update.part == layer.num_parts:
            continue
        dpart = dgate_up[:, update.part * size : (update.part + 1) * size]
        dh = low.new_empty(low.shape, dtype=torch.float32)
        native.grouped_gemm(dpart, plain(update.b), rows.offsets_E, dh, transposed=False)
        dh *= update.scaling
        _add_outer(db[u], dpart, low.float() * update.scaling, rows)
        if update.dropout:
            _add_outer(da[u], dh, _dropped(x_TD, update, rows, rows.token_R), rows)
            dropped_dh.append((update, dh))
        else:
            _add_outer(da[u], dh, x_TD, rows, rows.token_R)
            updates.append(native.Update(dh, plain(update.a), 0, layer.hidden_size))
    dx_RD = workspace.take("rows", dgate_up.shape[0], layer.hidden_size)
    native.grouped_gemm(dgate_up, layer.gate_up, rows.offsets_E, dx_RD, transposed=False, updates=updates)
    for update, dh in dropped_dh:
        dx_RD += _low_rank_input(dh, update, rows)
    dweights_TK.copy_(dweight_R[rows.inverse_R].view(top_k_weights_TK.shape))
    dhidden_TD.copy_(combine(dx_RD, rows.inverse_R, hidden_TD.shape[0]))


def _gate_up(x_TD: Tensor, rows: Sorted, layer: Layer, low_rank: list[LowRank], h: list[Tensor]) -> Tensor:
    """The first GEMM with its updates, float32 [R, P * F]."""
    size = layer.intermediate_size
    out = workspace.take("gate_up", rows.token_R.shape[0], layer.num_parts * size)
    updates = [
        _update(update, low, update.part * size, (update.part + 1) * size) for update, low in _inner(layer, low_rank, h)
    ]
    updates += _bias(layer.inner_bias, rows)
    native.grouped_gemm(x_TD, layer.gate_up, rows.offsets_E, out, transposed=True, updates=updates, index=rows.token_R)
    return out


def _activate(gate_up: Tensor, layer: Layer) -> Tensor:
    if not layer.swiglu:
        return plain(layer.function(gate_up))
    out = workspace.take("intermediate", gate_up.shape[0], layer.intermediate_size)
    native.swiglu(gate_up, out)
    return out


def _activation_backward(
    gate_up: Tensor, dinter_RF: Tensor, weight_R: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, Tensor]:
    """What the activation gave [R, F], the gradient of its input [R, P * F], and <inter, dInter> [R]."""
    if layer.swiglu:
        dweight_R = torch.empty_like(weight_R)
        native.swiglu_backward(gate_up, dinter_RF, weight_R, dweight_R)
        return dinter_RF, gate_up, dweight_R
    gate_up.requires_grad_()
    with differentiable():
        x_RF = layer.function(gate_up)
    inter_RF = plain(x_RF.detach())
    dweight_R = torch.linalg.vecdot(inter_RF, dinter_RF)
    (dgate_up,) = torch.autograd.grad(x_RF, gate_up, dinter_RF.mul_(weight_R[:, None]))
    return inter_RF, plain(dgate_up), dweight_R


def _inner(layer: Layer, low_rank: list[LowRank], h: list[Tensor]) -> list[tuple[LowRank, Tensor]]:
    return [pair for pair in zip(low_rank, h, strict=True) if pair[0].part < layer.num_parts]


def _outer(layer: Layer, low_rank: list[LowRank], h: list[Tensor]) -> list[tuple[LowRank, Tensor]]:
    return [pair for pair in zip(low_rank, h, strict=True) if pair[0].part == layer.num_parts]


def _update(update: LowRank, h: Tensor, column: int, column_end: int) -> native.Update:
    return native.Update(h.float() * update.scaling, plain(update.b), column, column_end)


def _bias(bias_EN: Tensor | None, rows: Sorted) -> list[native.Update]:
    """A bias as an update of rank one whose h is 1 everywhere, so that the library adds it where it sums."""
    if bias_EN is None:
        return []
    ones = torch.ones(rows.token_R.shape[0], 1)
    return [native.Update(ones, bias_EN.contiguous().unsqueeze(2), 0, bias_EN.shape[1])]


def _dropped(x: Tensor, update: LowRank, rows: Sorted, index: Tensor | None = None) -> Tensor:
    out = workspace.take("dropped", rows.number_R.shape[0], x.shape[1])
    return dropout(x, rows.number_R, update.seed, update.dropout, index, out=out)


def _dense(x: Tensor, a_ErK: Tensor, rows: Sorted, out_Rr: Tensor, index: Tensor | None = None) -> None:
    """out = x @ A[e].T, rounded to out's dtype."""
    low = torch.empty(out_Rr.shape, dtype=torch.float32)
    native.grouped_gemm(x, plain(a_ErK), rows.offsets_E, low, transposed=True, index=index)
    out_Rr.copy_(low)


def _low_rank_input(dh_Rr: Tensor, update: LowRank, rows: Sorted) -> Tensor:
    """Gradient of a dropped input: dh @ A[e] where it was kept, float32 [R, K]."""
    out = workspace.take("low_rank", dh_Rr.shape[0], update.a.shape[2])
    native.grouped_gemm(dh_Rr, plain(update.a), rows.offsets_E, out, transposed=False)
    return dropout(out, rows.number_R, update.seed, update.dropout, out=out)


def _add_outer(total_Epq: Tensor, u: Tensor, v: Tensor, rows: Sorted, index: Tensor | None = None) -> None:
    """total += u[rows of e].T @ v[rows of e]."""
    out = torch.empty_like(total_Epq)
    native.outer(u, v, rows.offsets_E, out, index)
    total_Epq += out
