"""Loss of a model on windows of text."""

import torch
from torch import Tensor


@torch.no_grad()
def window_losses(model: torch.nn.Module, windows: Tensor, batch: int = 8) -> list[float]:
    """Mean cross entropy of each window [W, T] of token ids, in nats."""
    found: list[float] = []
    for start in range(0, len(windows), batch):
        ids = windows[start : start + batch]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found += losses.mean(dim=1).tolist()
    return found
