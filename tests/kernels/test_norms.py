"""Norms of adapted output features, a tile at a time."""

import torch

from expertune.kernels.expert_mlp.norms import row_norms
from tests.kernels.expert_layers import make_case


def test_norms_are_those_of_the_sum_of_weight_and_update() -> None:
    # Down of 1,088 columns and 2,048 rows is more than a tile.
    case = make_case(1, num_experts=2, hidden=2048, intermediate=1088)
    found = row_norms(case.gate_up, case.down, case.layer, case.updates)
    for update, norms in zip(case.updates, found, strict=True):
        for expert in range(2):
            stack, index = (case.down, expert) if update.part == 2 else (case.gate_up, 2 * expert + update.part)
            whole = stack.dequantize(index, torch.float32) + update.scaling * update.b[expert] @ update.a[expert]
            torch.testing.assert_close(norms[expert], whole.norm(dim=1), rtol=1e-5, atol=0)
