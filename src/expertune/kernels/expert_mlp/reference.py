"""The expert layer in plain torch: every expert dequantized to float32, differentiated by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.kernels.expert_mlp import Activation, LoraUpdate
from expertune.kernels.lora import updates_by_expert
from expertune.kernels.nf4 import Nf4Stack


def expert_mlp(
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    activation: Activation,
    updates: Sequence[LoraUpdate] = (),
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same as `expertune.kernels.expert_mlp.expert_mlp` without dropout, in float32 whatever hidden's dtype.

    Returns:
        float32 [T, D].
    """
    num_parts = gate_up.num_matrices // down.num_matrices
    out = torch.zeros(hidden_TD.shape, dtype=torch.float32)
    for expert in range(down.num_matrices):
        tokens, choices = (top_k_index_TK == expert).nonzero(as_tuple=True)
        x = hidden_TD[tokens].float()
        matrices = [gate_up.dequantize(expert * num_parts + part, torch.float32) for part in range(num_parts)]
        inner = [_project(x, matrix, expert, part, updates) for part, matrix in enumerate(matrices)]
        gate_up_row = torch.cat(inner, dim=1)
        inter = activation.function(gate_up_row if biases is None else gate_up_row + biases[0][expert].float())
        y = _project(inter, down.dequantize(expert, torch.float32), expert, num_parts, updates)
        y = y if biases is None else y + biases[1][expert].float()
        y = y if activation.after is None else activation.after(y)
        out = out.index_add(0, tokens, y * top_k_weights_TK[tokens, choices, None].float())
    return out


def _project(x: Tensor, matrix: Tensor, expert: int, part: int, updates: Sequence[LoraUpdate]) -> Tensor:
    own = [update for *_, update in updates_by_expert(updates)(expert) if update.part == part]
    y = x @ matrix.t()
    for update in own:
        y = y + update.scaling * x @ update.a.float().t() @ update.b.float().t()
    gains = [update.gain for update in own if update.gain is not None]
    return y * gains[0] if gains else y
