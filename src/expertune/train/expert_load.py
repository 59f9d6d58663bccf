"""How a step's tokens are spread over the experts, and those of the whole training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expertune.distributed.mesh import Ranks
from expertune.experts import load
from expertune.experts.module import Nf4Experts
from expertune.experts.replay import is_recomputing

_MOST_COUNTS = 2**17
_SILENT_STEPS, _MISSED_TOKENS, _LOOKS_EVERY = 20, 100, 10
_MOST_STRETCHES, _FEWEST_STRETCHES = 64, 8

LOAD_FIGURES = ("expert_imbalance", "experts_unused", "expert_tokens_most", "expert_tokens_least")
"""What is known of each step, and what trackers are given as means."""

Tokens = dict[str, list[int]]
"""Tokens of each expert, by the name of the layer."""


class ExpertLoad:
    """Counts the tokens that are routed to each expert in training.

    What activation checkpointing computes again is not counted again, except by its reentrant variant, which does not
    say that it does.
    """

    def __init__(self) -> None:
        self._layers: dict[Nf4Experts, str] = {}
        self._counts: dict[nn.Module, Tensor] = {}
        self._ignores = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, a model's 4-bit expert layers are counted."""
        named = getattr(model, "get_base_model", lambda: model)().named_modules()
        self._layers = {module: name for name, module in named if isinstance(module, Nf4Experts)}
        hooks = [layer.register_forward_pre_hook(self._count) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, layer: Any, inputs: tuple[Any, ...]) -> None:
        if not layer.training or self._ignores or is_recomputing():
            return
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(layer.num_experts, dtype=torch.int64, device=inputs[1].device)
        load.add_tokens(self._counts[layer], inputs[1])

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
        total = torch.tensor(ranks.total(torch.cat(own).tolist() if own else []), dtype=torch.int64)
        sizes = [layer.num_experts for layer in self._layers]
        self._counts = dict(zip(self._layers, total.split(sizes), strict=True))

    def take(self) -> tuple[dict[str, float], Tokens]:
        """The step's figures by name and its tokens, both empty without layers; counting starts again.

        Returns:
            Figures: `expert_imbalance`, tokens of the busiest expert over the mean of all, averaged over layers (1 is
            even); `experts_unused`, percent of the experts of all layers that saw no token; `expert_tokens_most` and
            `expert_tokens_least`, tokens of the busiest expert of any layer and of the least busy. And the tokens of
            each expert.
        """
        if not self._counts:
            return {}, {}
        imbalances = [counts.max() * counts.numel() / counts.sum() for counts in self._counts.values()]
        unused = torch.cat([counts == 0 for counts in self._counts.values()]).float().mean()
        imbalance, share = torch.stack([torch.stack(imbalances).mean(), unused]).tolist()
        counted = torch.cat(list(self._counts.values())).cpu()
        least, most = counted.aminmax()
        figures = {
            "expert_imbalance": imbalance,
            "experts_unused": 100 * share,
            "expert_tokens_most": int(most),
            "expert_tokens_least": int(least),
        }
        sizes = [counts.numel() for counts in self._counts.values()]
        of_layers = dict(zip(self._counts, counted.split(sizes), strict=True))
        self._counts.clear()
        return figures, {
            name: of_layers[layer].tolist() if layer in of_layers else [0] * layer.num_experts
            for layer, name in self._layers.items()
        }


def add_tokens(series: dict[str, Any], step: int, tokens: Mapping[str, Sequence[int]]) -> None:
    """Add a step's tokens by expert to those of the steps before.

    They are kept by stretches of steps, all equally long except for the last. When there are too many, neighbors are
    joined, so that a long run of many experts has a series that stays small, and has all its tokens in it.

    Args:
        series: `steps`, the first and the last of each stretch; `every`, how many a stretch has; `counts`, by layer the
            tokens of each expert in each stretch. Empty before the first step; it is changed in place.
        step: the step.
        tokens: of each expert, by layer.
    """
    if not tokens:
        return
    series.setdefault("every", 1)
    steps, counts = series.setdefault("steps", []), series.setdefault("counts", {name: [] for name in tokens})
    if steps and steps[-1][1] - steps[-1][0] + 1 < series["every"]:
        steps[-1][1] = step
        for name, of_layer in tokens.items():
            counts[name][-1] = _sum(counts[name][-1], of_layer)
        return
    num_experts = sum(map(len, tokens.values()))
    if len(steps) >= min(_MOST_STRETCHES, max(_FEWEST_STRETCHES, _MOST_COUNTS // num_experts // 2 * 2)):
        series["every"] *= 2
        steps[:] = [[first, last] for (first, _), (_, last) in _pairs(steps)]
        for name, of_layer in counts.items():
            counts[name] = [_sum(*pair) for pair in _pairs(of_layer)]
    steps.append([step, step])
    for name, of_layer in tokens.items():
        counts[name].append(list(of_layer))


def died(series: Mapping[str, Any]) -> dict[str, list[int]]:
    """Experts that had tokens and get none any more, by layer; layers without one are left out.

    An expert counts as dead after 20 steps without a token in which it would have had 100 by its share until then:
    without a change that does not happen by chance.

    Args:
        series: see `add_tokens`.
    """
    found = {name: [*_died(of_layer, series["steps"])] for name, of_layer in series.get("counts", {}).items()}
    return {name: experts for name, experts in found.items() if experts}


def _died(counts: list[list[int]], steps: list[list[int]]) -> Iterator[int]:
    totals = [sum(of_stretch) for of_stretch in counts]
    for expert in (expert for expert, tokens in enumerate(counts[-1]) if not tokens):
        last = next((place for place in reversed(range(len(counts))) if counts[place][expert]), None)
        if last is None or steps[-1][1] - steps[last][1] < _SILENT_STEPS:
            continue
        share = sum(of_stretch[expert] for of_stretch in counts[: last + 1]) / sum(totals[: last + 1])
        if share * sum(totals[last + 1 :]) >= _MISSED_TOKENS:
            yield expert


class DeadExperts(TrainerCallback):
    """Tells of experts that die, once for each.

    Args:
        series: gives the tokens of each expert as `add_tokens` keeps them.
        known: those that have been told of, by layer.
        tell: called with all that have died, by layer, when there are more.
    """

    def __init__(
        self,
        series: Callable[[], Mapping[str, Any]],
        known: Mapping[str, list[int]],
        tell: Callable[[dict[str, list[int]]], None],
    ) -> None:
        self._series, self._tell = series, tell
        self._known = {name: list(experts) for name, experts in known.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look every ten steps."""
        if state.global_step % _LOOKS_EVERY:
            return
        found = died(self._series())
        if all(set(experts) <= set(self._known.get(name, [])) for name, experts in found.items()):
            return
        for name, experts in found.items():
            self._known[name] = sorted({*experts, *self._known.get(name, [])})
        self._tell(self._known)


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(values[::2], values[1::2], strict=True)


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [sum(pair) for pair in zip(left, right, strict=True)]
