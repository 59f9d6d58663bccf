"""NEFTune (Jain et al. 2023): uniform noise on the input embeddings in training, within alpha / sqrt(L * D).

L is the tokens of a sequence. transformers' own hook takes the width of the batch for it, which is all sequences
together where a batch has no padding, and the longest where it has: the noise would depend on a sequence's neighbors.

Shape suffixes: B sequences of a batch, T tokens, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """While open, a model in training mode adds noise to its input embeddings; in evaluation mode it does not.

    Args:
        model: of transformers, or a PeftModel on one.
        alpha: `neftune_noise_alpha`; None adds none.
    """
    if not alpha:
        yield
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    called: dict[str, Any] = {}

    def note(_module: nn.Module, _inputs: Any, arguments: dict[str, Any]) -> None:
        called.update({name: arguments.get(name) for name in ("position_ids", "attention_mask")})

    def add(module: nn.Module, _inputs: Any, embedded_BTD: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTD
        lengths_BT = sequence_lengths(embedded_BTD.shape[:2], **called).to(embedded_BTD.device)
        bound_BT1 = alpha / (lengths_BT * embedded_BTD.shape[2]).float().sqrt().unsqueeze(2)
        noise = torch.empty_like(embedded_BTD, dtype=torch.float32).uniform_(-1, 1)
        return embedded_BTD + (noise * bound_BT1).to(embedded_BTD.dtype)

    hooks = [
        base.register_forward_pre_hook(note, with_kwargs=True),
        base.get_input_embeddings().register_forward_hook(add),  # type: ignore[operator]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sequence_lengths(
    shape: torch.Size, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """Tokens of the sequence that each token of a batch [B, T] belongs to, int64.

    Sequences begin where positions do; without positions a row is one, less its padding.
    """
    if position_ids is not None and position_ids.shape == shape and position_ids.numel():
        begins_BT = position_ids == 0
        begins_BT[:, 0] = True
        number = begins_BT.flatten().cumsum(0) - 1
        return torch.bincount(number)[number].view(shape)
    if attention_mask is not None and attention_mask.shape == shape:
        return attention_mask.sum(dim=1, keepdim=True).clamp_min(1).expand(shape)
    return torch.full(shape, shape[1])
