"""The grouped GEMM in plain torch: every expert dequantized to float32, differentiated by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.kernels.grouped_linear import LoraUpdate
from expertune.kernels.nf4 import Nf4Stack


def grouped_linear(x_RK: Tensor, weight: Nf4Stack, offsets_E: Tensor, updates: Sequence[LoraUpdate] = ()) -> Tensor:
    """The same as `expertune.kernels.grouped_linear.grouped_linear`, in float32 whatever x's dtype.

    Returns:
        float32 [R, P * N].
    """
    num_experts = offsets_E.shape[0]
    num_parts = weight.num_matrices // num_experts
    pieces, start = [], 0
    for expert, end in enumerate(offsets_E.tolist()):
        x = x_RK[start:end].float()
        outputs = [x @ weight.dequantize(expert * num_parts + part, torch.float32).t() for part in range(num_parts)]
        for update in updates:
            x_update = x if update.x_RK is None else update.x_RK[start:end].float()
            low_rank = x_update @ update.a_ErK[expert].float().t() @ update.b_ENr[expert].float().t()
            outputs[update.part] = outputs[update.part] + update.scaling * low_rank
        pieces.append(torch.cat(outputs, dim=1))
        start = end
    return torch.cat(pieces)
