"""Which experts tokens are sent to: the one count of them, and that of an evaluation.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expertune.distributed.mesh import Ranks
from expertune.experts.module import Nf4Experts


def add_tokens(totals_E: Tensor, index_TK: Tensor, weights_TK: Tensor | None = None) -> None:
    """Add to totals, in place, how many of some tokens each expert is sent.

    Args:
        totals_E: int64 or float64 [E], on the device of the indices.
        index_TK: the experts of each token, any integers of any shape.
        weights_TK: what each of them counts for, or [T, 1] what each token does; None means 1.
    """
    ones = torch.ones((), dtype=totals_E.dtype, device=totals_E.device)
    values_TK = ones if weights_TK is None else weights_TK.to(totals_E)
    # Unlike bincount it does not wait for a GPU.
    totals_E.scatter_add_(0, index_TK.reshape(-1).long(), values_TK.expand_as(index_TK).reshape(-1))


class RoutingCounts:
    """Counts the tokens of each expert in an evaluation, and how evenly the router weighs a token's experts.

    Args:
        model: its 4-bit expert layers are counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: each for name, each in model.named_modules() if isinstance(each, Nf4Experts)}
        self._total: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor] | None = None
        self._mask: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, `counting` counts."""
        hooks = [layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def counting(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Count one batch, unless computing it fails: it is then computed again. Padding is left out.

        Args:
            inputs: what the model is called with.
        """
        self._batch, self._mask = {}, inputs.get("attention_mask")
        try:
            yield
            for name, seen in self._batch.items():
                self._total[name] = self._total[name] + seen if name in self._total else seen
        finally:
            self._batch = self._mask = None

    def _see(self, name: str, layer: Any, inputs: tuple[Any, ...]) -> None:
        """Keep what a layer was called with last: a pass that compares two ways of taking the loss may come before."""
        if self._batch is None:
            return
        index_TK, weights_TK = inputs[1], inputs[2].double()
        counted_T = torch.ones(len(index_TK), dtype=torch.float64, device=index_TK.device)
        if isinstance(self._mask, Tensor) and self._mask.numel() == len(index_TK):
            counted_T = self._mask.reshape(-1).to(counted_T)
        tokens_E = torch.zeros(layer.num_experts, dtype=torch.float64, device=index_TK.device)
        add_tokens(tokens_E, index_TK, counted_T[:, None])
        shares_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        entropy_T = torch.special.entr(shares_TK).sum(-1).nan_to_num()  # a family may weigh all of them with zero
        self._batch[name] = torch.cat([tokens_E, torch.stack([(entropy_T * counted_T).sum(), counted_T.sum()])])

    def to_json(self, ranks: Ranks) -> dict[str, Any]:
        """The counts of all ranks as plain values; all ranks call this.

        Returns:
            `tokens` of the evaluation; `counts`, the tokens sent to each expert, and `entropy`, the mean entropy in
            nats of the weights of a token's experts, both by the layer's name.
        """
        widths = [layer.num_experts + 2 for layer in self._layers.values()]
        own = [
            self._total[name].cpu() if name in self._total else torch.zeros(width, dtype=torch.float64)
            for name, width in zip(self._layers, widths, strict=True)
        ]
        total = ranks.total(torch.cat(own).tolist() if own else [])
        layers = dict(zip(self._layers, torch.tensor(total, dtype=torch.float64).split(widths), strict=True))
        return {
            "tokens": max((int(seen[-1]) for seen in layers.values()), default=0),
            "counts": {name: [int(tokens) for tokens in seen[:-2]] for name, seen in layers.items()},
            "entropy": {name: float(seen[-2] / seen[-1].clamp(min=1)) for name, seen in layers.items()},
        }
