"""How evenly a step's tokens are spread over the experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertune.distributed.mesh import Ranks
from expertune.experts.module import Nf4Experts


class ExpertLoad:
    """Counts the tokens that are routed to each expert in training.

    A layer that is computed again for activation checkpointing counts its tokens twice, all of them alike.
    """

    def __init__(self) -> None:
        self._layers: list[Nf4Experts] = []
        self._counts: dict[nn.Module, Tensor] = {}
        self._ignores = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, a model's 4-bit expert layers are counted."""
        self._layers = [module for module in model.modules() if isinstance(module, Nf4Experts)]
        hooks = [layer.register_forward_pre_hook(self._count) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, layer: Any, inputs: tuple[Any, ...]) -> None:
        if not layer.training or self._ignores:
            return
        index_R = inputs[1].reshape(-1).long()
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(layer.num_experts, dtype=torch.int64, device=index_R.device)
        # Unlike bincount it does not wait for a GPU.
        self._counts[layer].scatter_add_(0, index_R, torch.ones_like(index_R))

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """While open, nothing is counted."""
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    def clear(self) -> None:
        """Forget what has been counted: the step is computed again."""
        self._counts.clear()

    def add_up(self, ranks: Ranks) -> None:
        """Count the tokens of all ranks; a layer that some have not run has none there."""
        if not ranks.several:
            return
        zeros = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in self._layers]
        own = [self._counts.get(layer, zero).cpu() for layer, zero in zip(self._layers, zeros, strict=True)]
        total = torch.tensor(ranks.total(torch.cat(own).tolist() if own else []))
        sizes = [layer.num_experts for layer in self._layers]
        self._counts = dict(zip(self._layers, total.split(sizes), strict=True))

    def take(self) -> dict[str, float]:
        """The step's figures by name, empty without layers; counting starts again.

        Returns:
            `expert_imbalance`: tokens of the busiest expert over the mean of all, averaged over layers; 1 is even.
            `experts_unused`: percent of the experts of all layers that saw no token.
        """
        if not self._counts:
            return {}
        imbalances = [counts.max() * counts.numel() / counts.sum() for counts in self._counts.values()]
        unused = torch.cat([counts == 0 for counts in self._counts.values()]).float().mean()
        self._counts.clear()
        imbalance, share = torch.stack([torch.stack(imbalances).mean(), unused]).tolist()
        return {"expert_imbalance": imbalance, "experts_unused": 100 * share}
