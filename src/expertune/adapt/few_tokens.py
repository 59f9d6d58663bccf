"""The tokens that offloaded experts compute in a preflight check: for each expert some, from all over the sequences.

Such a check spends its time on the experts' matrices, which are dequantized for one token as for many, and on products
that grow with the tokens. An expert that has computed a few has shown what the check asks of it. The other tokens are
given zeros, in all forwards alike.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertune.experts.module import Nf4Experts

# From the first token every so many, then from the second, and so on: the first few are from all over the sequences.
_STRIDE = 8


def choose_tokens(index_TK: Tensor, enough: int, matters_T: Tensor | None = None) -> Tensor:
    """Some tokens, in order, with which every expert that any of them reaches has so many, or all that reach it.

    Args:
        index_TK: [T, K] the experts of each token.
        enough: tokens for an expert.
        matters_T: bool [T]; others are taken only where these are not enough. None means that all matter.

    Returns:
        int64 [S], where `index_TK` is.
    """
    num_tokens, experts = len(index_TK), index_TK.tolist()
    order = [token for first in range(_STRIDE) for token in range(first, num_tokens, _STRIDE)]
    if matters_T is not None:
        matters = matters_T.tolist()
        order.sort(key=lambda token: not matters[token])
    have: Counter[int] = Counter()
    chosen = []
    for token in order:
        if any(have[expert] < enough for expert in experts[token]):
            have.update(experts[token])
            chosen.append(token)
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=index_TK.device)


@contextmanager
def few_tokens(
    model: nn.Module, enough: int | None, training: bool = False, matters_T: Tensor | None = None
) -> Iterator[None]:
    """While open, experts compute the tokens that are chosen for them, and give zeros for the others.

    Args:
        model: the model, with or without an adapter.
        enough: see `choose_tokens`; None leaves all tokens to them.
        training: in forwards in training mode, recomputations among them; otherwise in those in evaluation.
        matters_T: see `choose_tokens`.
    """
    chosen: dict[nn.Module, tuple[int, Tensor]] = {}

    def take(experts: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if enough is None or experts.training != training:
            return None
        tokens_S = choose_tokens(inputs[1], enough, matters_T)
        chosen[experts] = len(inputs[1]), tokens_S
        return *(each_TX[tokens_S] for each_TX in inputs[:3]), *inputs[3:]

    def spread(experts: nn.Module, inputs: Any, output_SD: Tensor) -> Tensor | None:
        if experts not in chosen:
            return None
        num_tokens, tokens_S = chosen.pop(experts)
        return output_SD.new_zeros(num_tokens, output_SD.shape[1]).index_copy(0, tokens_S, output_SD)

    handles: list[RemovableHandle] = []
    for module in model.modules():
        if isinstance(module, Nf4Experts):
            handles += module.register_forward_pre_hook(take), module.register_forward_hook(spread)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
