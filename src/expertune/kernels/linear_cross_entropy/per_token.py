"""Log-probabilities of labels one by one, with gradients, and never the logits of all rows.

What each row's gradient is multiplied by is known in the backward only. A summed loss makes its gradients while a
chunk's logits are there (`chunked.py`); here the backward makes the logits of each chunk again, so that the weight is
multiplied three times, and nothing of the vocabulary's size is kept between the two.

Shape suffixes: T rows (tokens), D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expertune.kernels.linear_cross_entropy import HeadUpdate, check, chunked, head_of
from expertune.kernels.operators import no_autocast


def linear_log_probs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    updates: Sequence[HeadUpdate] = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(logits)[label] of each row.

    Args:
        hidden_TD, weight_VD, labels_T, bias_V, updates, scale, softcap: see `linear_cross_entropy`.

    Returns:
        float32 [T], 0 where there is no label. Differentiable once, for hidden, A, B and an update's x.

    Raises:
        ValueError: see `linear_cross_entropy`.
    """
    check(hidden_TD, weight_VD, labels_T, bias_V, updates, softcap)
    head, own_inputs = head_of(weight_VD, bias_V, updates, scale, softcap)
    log_probs: Tensor = _LogProbs.apply(head, labels_T, hidden_TD, *own_inputs, *head.a, *head.b)
    return log_probs


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: chunked.Head, labels_T: Tensor, hidden_TD: Tensor, *others: Tensor) -> Tensor:
        num_own = sum(head.has_own_input)
        ctx.head, ctx.num_own = head._replace(a=[], b=[]), num_own
        ctx.save_for_backward(labels_T, hidden_TD, *others)
        with no_autocast(hidden_TD):
            losses_N, *_ = chunked.forward(hidden_TD, head, labels_T, list(others[:num_own]), False, False)
        return losses_N.new_zeros(labels_T.shape).masked_scatter_(labels_T != chunked.IGNORE_INDEX, -losses_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        labels_T, hidden_TD, *others = ctx.saved_tensors
        own, factors = others[: ctx.num_own], others[ctx.num_own :]
        count = len(factors) // 2
        head = ctx.head._replace(a=factors[:count], b=factors[count:])
        _, _, wants_hidden, *wants_others = ctx.needs_input_grad
        with no_autocast(hidden_TD):
            _, d_hidden_TD, d_a, d_b, d_own = chunked.forward(
                hidden_TD, head, labels_T, own, wants_hidden, any(wants_others), -gradients[0].float()
            )
        made: list[Tensor | None] = [*d_own, *d_a, *d_b] or [None] * len(others)
        return None, None, d_hidden_TD if wants_hidden else None, *made
