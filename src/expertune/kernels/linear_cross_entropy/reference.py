"""Cross entropy through an output head in plain torch: all logits in float32, differentiated by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from expertune.kernels.linear_cross_entropy import HeadUpdate


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    updates: Sequence[HeadUpdate] = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same as `expertune.kernels.linear_cross_entropy.linear_cross_entropy`, in float32 whatever hidden's dtype.

    Returns:
        float32 scalar.
    """
    logits_TV = hidden_TD.float() @ weight_VD.float().t()
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.float()
    for update in updates:
        x_TD = hidden_TD if update.x_TD is None else update.x_TD
        logits_TV = logits_TV + update.scaling * (x_TD.float() @ update.a_rD.float().t()) @ update.b_Vr.float().t()
    logits_TV = logits_TV * scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return F.cross_entropy(logits_TV, labels_T, reduction="sum")
