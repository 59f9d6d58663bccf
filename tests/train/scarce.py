"""Memory that runs out on purpose: the expert layer's operator fails where a batch is too large for it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune import api
from expertune.experts import module


class Scarce:
    """Fails in the expert layer while training or evaluating, as an allocator would.

    Args:
        most_tokens: more tokens than these at once do not fit.
        backward: fail in backward instead of forward.
        first_layer: number of the expert layer's forward, counted over the run, from which memory is scarce; there are
            two in each micro-batch.
        evaluating: fail in evaluations instead of training.
        error: makes what is raised.
    """

    def __init__(
        self,
        most_tokens: int,
        backward: bool = False,
        first_layer: int = 1,
        evaluating: bool = False,
        error: Callable[[], Exception] = lambda: torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
    ) -> None:
        self.most_tokens, self.backward, self.first_layer = most_tokens, backward, first_layer
        self.evaluating, self.error = evaluating, error
        self.num_layers = self.num_failures = 0
        self.most_seen = 0
        self.trainer: Any = None

    def too_large(self, tokens: int) -> bool:
        return tokens > self.most_tokens

    def fail(self, *_: object) -> None:
        self.num_failures += 1
        raise self.error()

    def install(self, patch: pytest.MonkeyPatch) -> "Scarce":
        """Make memory scarce from the trainer's start to its end."""
        real = module.expert_mlp
        scarce = self

        def expert_mlp(hidden: Tensor, *arguments: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Tensor]]:
            output, low_rank = real(hidden, *arguments, **kwargs)
            replayed = inspect.signature(real).bind(hidden, *arguments, **kwargs).arguments.get("replay")
            if scarce.trainer is None or replayed or torch.is_grad_enabled() == scarce.evaluating:
                return output, low_rank
            scarce.num_layers += 1
            if scarce.num_layers >= scarce.first_layer and scarce.too_large(hidden.shape[0]):
                if scarce.backward:
                    output.register_hook(scarce.fail)
                else:
                    scarce.fail()
            else:
                scarce.most_seen = max(scarce.most_seen, hidden.shape[0])
            return output, low_rank

        class Trainer(api.ExpertTrainer):
            def train(self, *args: Any, **kwargs: Any) -> Any:
                scarce.trainer = self
                try:
                    return super().train(*args, **kwargs)
                finally:
                    scarce.trainer = None

        patch.setattr(module, "expert_mlp", expert_mlp)
        patch.setattr(api, "ExpertTrainer", Trainer)
        return self
