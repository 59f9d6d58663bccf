"""Which experts of a layer get an adapter: scored by a pass over training examples (ESFT, Wang et al. 2024).

An expert's score is its share of the tokens that a layer sends to its experts (`load`, ESFT-Token), or of the weights
that the router gives them (`gate`, ESFT-Gate). Of each layer as few experts are taken as have the share together.

Shape suffixes: T tokens, K experts per token, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expertune.config import ExpertsSection, LoraSection
from expertune.errors import ConfigError
from expertune.experts.load import add_tokens
from expertune.experts.module import Nf4Experts

SAMPLE_TOKENS = 16384
"""Tokens of training examples that the experts are scored by; fewer where there are not as many."""

_FEWEST_ROUTED = 8
"""Tokens that an expert must have been sent on the average: of fewer nothing follows."""


@dataclass(frozen=True)
class Scores:
    """What a pass has counted.

    Attributes:
        tokens: that went through the layers.
        load: by the layer's name, the tokens of each expert.
        gate: by the layer's name, the sum of each expert's part of its tokens' weights.
    """

    tokens: int
    load: dict[str, list[int]]
    gate: dict[str, list[float]]

    def select(self, lora: LoraSection) -> "Selection":
        """The experts that a run file's section asks for.

        Raises:
            ConfigError: there are too few tokens to score them by.
        """
        asked = lora.experts or ExpertsSection(share=1.0)
        layers = {}
        for layer, load in self.load.items():
            if sum(load) < _FEWEST_ROUTED * len(load):
                raise ConfigError(
                    f"lora.experts, lora.expert_rank: load: the {len(load)} experts of {layer} were sent {sum(load)} "
                    f"tokens of the training examples, and {_FEWEST_ROUTED * len(load)} are needed to choose among "
                    "them; give more training examples, or name the experts in lora.experts.layers"
                )
            scores: list[int] | list[float] = load if asked.select == "load" else self.gate[layer]
            # Every expert has a rank where none is to be left out.
            least = asked.share * sum(scores) if lora.experts and asked.share else None
            layers[layer] = _highest(scores, least)
        return Selection(asked.model_copy(update={"layers": layers}), self)


@dataclass(frozen=True)
class Selection:
    """Experts that were selected, and what of.

    Attributes:
        section: the run file's section with the experts of each layer.
        scores: what they were selected by.
    """

    section: ExpertsSection
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """Plain values; `load` is the share of a layer's tokens that its selected experts have."""
        shares = {
            name: sum(self.scores.load[name][expert] for expert in chosen) / sum(self.scores.load[name])
            for name, chosen in self.section.layers.items()
        }
        return {
            **self.section.model_dump(),
            "experts": {name: len(load) for name, load in self.scores.load.items()},
            "load": shares,
            "tokens": self.scores.tokens,
        }


def _highest(scores: list[int] | list[float], least: float | None) -> list[int]:
    """Experts by falling score, as few as have `least` together, or all."""
    order = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
    if least is None:
        return order
    total: float = 0
    for count, expert in enumerate(order, 1):
        total += scores[expert]
        if total >= least * (1 - 1e-12):
            return order[:count]
    return order


@torch.no_grad()
def score_experts(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Scores:
    """Send batches through a language model, all but its output head, and count what its experts are sent.

    Args:
        model: before an adapter is attached; its mode is restored.
        batches: what it is called with, `labels` apart; padding is told by `attention_mask`.
    """
    was_training, tokens = model.training, 0
    model.eval()
    backbone = model.base_model
    try:
        with _counting(model) as found:
            for batch in batches:
                found.mask = batch.get("attention_mask")
                tokens += int(batch["input_ids"].numel() if found.mask is None else found.mask.sum())
                backbone(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)  # type: ignore[operator]
    finally:
        model.train(was_training)
    load = {name: [int(each) for each in counts.tolist()] for name, counts in found.load.items()}
    return Scores(tokens, load, {name: weights.tolist() for name, weights in found.gate.items()})


class _Counts:
    """Tokens and weights of each expert by the layer's name, float64 [E] on the model's device."""

    def __init__(self) -> None:
        self.load: dict[str, Tensor] = {}
        self.gate: dict[str, Tensor] = {}
        self.mask: Tensor | None = None

    def see(self, name: str, layer: Nf4Experts, inputs: tuple[Tensor, ...]) -> None:
        """Add what a layer is called with."""
        index_TK, weights_TK = inputs[1], inputs[2].double()
        counted_T1 = torch.ones(len(index_TK), 1, dtype=torch.float64, device=index_TK.device)
        if self.mask is not None and self.mask.numel() == len(index_TK):
            counted_T1 = self.mask.reshape(-1, 1).to(counted_T1)
        parts_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).nan_to_num()  # all may be zero
        for totals, values in ((self.load, counted_T1), (self.gate, parts_TK * counted_T1)):
            add_tokens(totals.setdefault(name, parts_TK.new_zeros(layer.num_experts)), index_TK, values)


@contextmanager
def _counting(model: nn.Module) -> Iterator[_Counts]:
    found = _Counts()
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, Nf4Experts)]
    hooks = [each.register_forward_pre_hook(partial(found.see, name)) for name, each in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
