"""Norms of the output features of adapted weights, ||W + scaling * B @ A||: what DoRA divides by.

A tile of each matrix is dequantized, the update is added to it, and only the norms of its rows are kept: no more than a
tile exists in 16 or 32 bits at a time.

Shape suffixes: S experts that have factors, N output features of one matrix, K in_features, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.kernels.dequant_gemm import Scratch
from expertune.kernels.expert_mlp.layer import ExpertLayer
from expertune.kernels.expert_mlp.operator import acquired
from expertune.kernels.lora import LoraUpdate, updates_by_expert
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack, dequantize


@torch.no_grad()
def row_norms(gate_up: Nf4Stack, down: Nf4Stack, layer: ExpertLayer, updates: Sequence[LoraUpdate]) -> list[Tensor]:
    """For each update float32 [S, N], the norms of W + scaling * B @ A of its projection.

    Offloaded weights are acquired once, as for a forward of the layer that is used once more next.

    Args:
        gate_up, down, layer: see `expertune.kernels.expert_mlp.expert_mlp`.
        updates: each is the only one of its projection and experts.
    """
    with acquired([*gate_up.bytes, *down.bytes], layer, backward=False, reused=True) as weights:
        stacks = Nf4Bytes(*weights[:4]), Nf4Bytes(*weights[4:8])
        return [_norms(*stacks, update) for update in updates]


def _norms(gate_up: Nf4Bytes, down: Nf4Bytes, update: LoraUpdate) -> Tensor:
    num_experts = down.packed.shape[0]
    num_parts = gate_up.packed.shape[0] // num_experts
    weight = down if update.part == num_parts else gate_up
    scratch = Scratch(weight.packed.device, torch.float32)
    norms_SN = torch.empty(len(update.a), weight.out_features, device=weight.packed.device)
    step, of_expert = scratch.tile_size(weight.out_features, weight.in_features), updates_by_expert([update])
    for expert, (_, slot, own) in ((each, held) for each in range(num_experts) for held in of_expert(each)):
        index = expert if update.part == num_parts else expert * num_parts + update.part
        a_rK, b_Nr = own.a.float(), own.b.float()
        for start in range(0, weight.out_features, step):
            rows = slice(start, min(start + step, weight.out_features))
            tile = dequantize(weight, index, scratch.tile(rows.stop - start, weight.in_features), rows=rows)
            tile.addmm_(b_Nr[rows], a_rK, alpha=update.scaling)
            torch.linalg.vector_norm(tile, dim=1, out=norms_SN[slot, rows])
    return norms_SN
