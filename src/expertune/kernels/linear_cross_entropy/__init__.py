"""Summed cross entropy of hidden states through an output head, without the logits of all rows at once.

logits = hidden @ W.T + bias + the head's low-rank updates, then `scale` and `softcap`; the loss is the sum of
-log softmax(logits)[label] over the rows that have a label. W and bias are frozen and get no gradient.

The operator `expertune::linear_cross_entropy` takes rows a chunk at a time, and those without a label never. The
gradients of a chunk are made while its logits are there, in the forward: the backward only multiplies them by the
gradient that arrives. So W is multiplied twice, once for the logits and once for the gradient of hidden, which is as
often as it must be (Hsu et al. 2024, "Liger Kernel", section 3.2).

Routes: `reference.py` is plain float32 with all logits, and what the other is tested against; `chunked.py` runs on any
device. `per_token.py` gives each row's log-probability in place of their sum.

Shape suffixes: T rows (tokens), D hidden size, V vocabulary, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertune.kernels.linear_cross_entropy import chunked
from expertune.kernels.linear_cross_entropy.chunked import IGNORE_INDEX
from expertune.kernels.operators import no_autocast

__all__ = ["IGNORE_INDEX", "HeadUpdate", "linear_cross_entropy"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class HeadUpdate:
    """One low-rank update of the head: logits += scaling * (x @ A.T) @ B.T, in float32.

    Attributes:
        a_rD: [r, D].
        b_Vr: [V, r], of A's dtype.
        scaling: alpha / r, or alpha / sqrt(r).
        x_TD: the update's own input [T, D], where dropout made it differ from hidden; None takes hidden.
    """

    a_rD: Tensor
    b_Vr: Tensor
    scaling: float
    x_TD: Tensor | None = None


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    updates: Sequence[HeadUpdate] = (),
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum the cross entropy of all rows with a label, and prepare the gradients that will be asked for.

    Args:
        hidden_TD: [T, D], input of the head; its dtype is the dtype of the GEMM. Softmax and loss are float32.
        weight_VD: [V, D], frozen; float32, float16 or bfloat16, converted a tile at a time where hidden has another.
        labels_T: int64 [T], the label of each row itself (already shifted); -100 is none.
        bias_V: [V], frozen.
        updates: any number of low-rank updates; they are summed.
        scale: factor on the logits, before the cap.
        softcap: logits become softcap * tanh(logits / softcap); None leaves them.

    Returns:
        The sum, a float32 scalar; 0 where no row has a label. Differentiable once, for hidden, A, B and an update's x.

    Raises:
        ValueError: a shape, dtype, device, label or constant does not fit; names the value received.
    """
    check(hidden_TD, weight_VD, labels_T, bias_V, updates, softcap)
    head, own_inputs = head_of(weight_VD, bias_V, updates, scale, softcap)
    wanted = torch.is_grad_enabled()
    loss, *_ = torch.ops.expertune.linear_cross_entropy(
        hidden_TD,
        head.weight_VD,
        head.bias_V,
        labels_T,
        head.scale,
        head.softcap,
        head.scalings,
        head.has_own_input,
        head.a,
        head.b,
        own_inputs,
        wanted and hidden_TD.requires_grad,
        wanted and any(tensor.requires_grad for tensor in (*head.a, *head.b, *own_inputs)),
    )
    return loss


@torch.library.custom_op(
    "expertune::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, "
    "float[] scalings, bool[] has_own_input, Tensor[] a, Tensor[] b, Tensor[] own_inputs, "
    "bool hidden_gradient, bool update_gradients) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    scalings: list[float],
    has_own_input: list[bool],
    a: list[Tensor],
    b: list[Tensor],
    own_inputs: list[Tensor],
    hidden_gradient: bool,
    update_gradients: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    head = chunked.Head(weight, bias, scale, softcap, scalings, has_own_input, a, b)
    with no_autocast(hidden):
        losses, d_hidden, *rest = chunked.forward(hidden, head, labels, own_inputs, hidden_gradient, update_gradients)
    d_a, d_b, d_own = rest
    return losses.sum(), d_hidden, d_a, d_b, d_own


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    scalings: list[float],
    has_own_input: list[bool],
    a: list[Tensor],
    b: list[Tensor],
    own_inputs: list[Tensor],
    hidden_gradient: bool,
    update_gradients: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    loss = hidden.new_empty((), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if hidden_gradient else 0)
    if not update_gradients:
        return loss, d_hidden, [], [], []
    # Always contiguous, whatever the strides of the inputs.
    d_a, d_b, d_own = ([tensor.new_empty(tensor.shape) for tensor in held] for held in (a, b, own_inputs))
    return loss, d_hidden, d_a, d_b, d_own


@torch.library.custom_op(
    "expertune::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor d_loss, Tensor[] gradients) -> Tensor[]",
)
def _backward(d_loss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    # In float32: a scalar takes the dtype of the tensor that it multiplies, and would be rounded to half precision.
    return [(gradient.float() * d_loss).to(gradient.dtype) for gradient in gradients]


@_backward.register_fake
def _(d_loss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]
) -> None:
    *_, scalings, _, _, _, own_inputs, hidden_gradient, update_gradients = inputs
    ctx.num_updates, ctx.num_own = len(scalings), len(own_inputs)
    ctx.hidden_gradient, ctx.update_gradients = hidden_gradient, update_gradients
    _, d_hidden, d_a, d_b, d_own = output
    ctx.save_for_backward(*([d_hidden] if hidden_gradient else []), *d_a, *d_b, *d_own)


def _autograd(ctx: Any, d_loss: Tensor, *_unused: Any) -> tuple[Any, ...]:
    gradients = torch.ops.expertune.linear_cross_entropy_backward(d_loss, list(ctx.saved_tensors))
    d_hidden = gradients.pop(0) if ctx.hidden_gradient else None
    count, num_own = ctx.num_updates, ctx.num_own
    if ctx.update_gradients:
        d_a, d_b, d_own = gradients[:count], gradients[count : 2 * count], gradients[2 * count :]
    else:
        d_a, d_b, d_own = [None] * count, [None] * count, [None] * num_own
    # torch takes an empty list for a list of tensors, and wants a list back for it.
    no_gradients: list[Tensor] | None = None if count else []
    return (d_hidden, *[None] * 5, no_gradients, no_gradients, d_a, d_b, d_own, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def head_of(
    weight_VD: Tensor, bias_V: Tensor | None, updates: Sequence[HeadUpdate], scale: float, softcap: float | None
) -> tuple[chunked.Head, list[Tensor]]:
    """The head as operators take it, and the inputs [T, D] of those updates that have their own, in order."""
    head = chunked.Head(
        weight_VD,
        bias_V,
        scale,
        softcap,
        [update.scaling for update in updates],
        [update.x_TD is not None for update in updates],
        [update.a_rD for update in updates],
        [update.b_Vr for update in updates],
    )
    return head, [update.x_TD for update in updates if update.x_TD is not None]


def check(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    updates: Sequence[HeadUpdate],
    softcap: float | None,
) -> None:
    """Refuse arguments of `linear_cross_entropy` that do not fit together.

    Raises:
        ValueError: names the value received.
    """
    if weight_VD.ndim != 2 or weight_VD.shape[0] == 0:
        raise ValueError(f"weight must be [vocabulary, hidden size], got {tuple(weight_VD.shape)}")
    vocabulary, width = weight_VD.shape
    if hidden_TD.ndim != 2 or hidden_TD.shape[1] != width:
        raise ValueError(f"hidden must be [rows, {width}], got {tuple(hidden_TD.shape)}")
    if labels_T.dtype != torch.int64 or tuple(labels_T.shape) != (hidden_TD.shape[0],):
        raise ValueError(f"labels must be int64 [{hidden_TD.shape[0]}], got {labels_T.dtype} {tuple(labels_T.shape)}")
    if bias_V is not None and tuple(bias_V.shape) != (vocabulary,):
        raise ValueError(f"bias must be [{vocabulary}], got {tuple(bias_V.shape)}")
    for frozen, what in ((weight_VD, "weight"), (bias_V, "bias")):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(f"{what} must be frozen, got one that requires a gradient")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    for update in updates:
        rank = update.a_rD.shape[0] if update.a_rD.ndim == 2 else None
        if tuple(update.a_rD.shape) != (rank, width):
            raise ValueError(f"A must be [r, {width}], got {tuple(update.a_rD.shape)}")
        if tuple(update.b_Vr.shape) != (vocabulary, rank):
            raise ValueError(f"B must be [{vocabulary}, {rank}], got {tuple(update.b_Vr.shape)}")
        if update.b_Vr.dtype != update.a_rD.dtype:
            raise ValueError(f"B is {update.b_Vr.dtype}, A is {update.a_rD.dtype}")
        if update.x_TD is not None and update.x_TD.shape != hidden_TD.shape:
            raise ValueError(f"the update's x must be {tuple(hidden_TD.shape)}, got {tuple(update.x_TD.shape)}")
    of_updates = [
        (tensor, what)
        for update in updates
        for tensor, what in ((update.a_rD, "A"), (update.b_Vr, "B"), (update.x_TD, "the update's x"))
    ]
    for tensor, what in ((hidden_TD, "hidden"), (weight_VD, "weight"), (bias_V, "bias"), *of_updates):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{what} must be float32, float16 or bfloat16, got {tensor.dtype}")
    for tensor, what in ((weight_VD, "weight"), (bias_V, "bias"), (labels_T, "labels"), *of_updates):
        if tensor is not None and tensor.device != hidden_TD.device:
            raise ValueError(f"{what} is on {tensor.device}, hidden is on {hidden_TD.device}")
