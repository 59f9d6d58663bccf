"""Which tokens offloaded experts compute in a preflight check, and what they give the others."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from expertune.adapt.few_tokens import choose_tokens, few_tokens
from expertune.experts.module import Nf4Experts
from tests.tiny_models import load_tiny, save_tiny_model


def routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    # Some experts are chosen far more often than others.
    return (scores * torch.linspace(1, 1.6, experts)).topk(top_k).indices


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(128, 8, 2), (512, 64, 8), (128, 4, 1), (3, 8, 2), (1, 8, 8)])
@pytest.mark.parametrize("enough", [1, 4])
def test_every_expert_computes_enough_tokens_or_all_that_reach_it(
    tokens: int, experts: int, top_k: int, enough: int
) -> None:
    index_TK = routing(tokens, experts, top_k)
    chosen_S = choose_tokens(index_TK, enough)
    assert chosen_S.tolist() == sorted(set(chosen_S.tolist()))
    of_all, of_chosen = Counter(index_TK.flatten().tolist()), Counter(index_TK[chosen_S].flatten().tolist())
    assert all(of_chosen[expert] >= min(enough, count) for expert, count in of_all.items())
    assert len(chosen_S) <= min(tokens, enough * experts)


def test_tokens_are_from_all_over_the_sequence() -> None:
    chosen_S = choose_tokens(routing(128, 8, 2), enough=4)
    assert len(chosen_S) < 48
    assert {token // 32 for token in chosen_S.tolist()} == {0, 1, 2, 3}


def test_tokens_that_do_not_matter_are_taken_where_others_are_not_enough() -> None:
    matters_T = torch.arange(128) % 2 == 1
    index_TK = routing(128, 8, 2)
    assert matters_T[choose_tokens(index_TK, enough=4, matters_T=matters_T)].all()
    index_TK[matters_T] = index_TK[matters_T].remainder(7)  # the last expert serves the others alone
    chosen_S = choose_tokens(index_TK, enough=4, matters_T=matters_T)
    assert (index_TK[chosen_S[~matters_T[chosen_S]]] == 7).any(dim=1).all()


def test_gradients_reach_the_experts_input_and_scores_at_the_chosen_tokens_alone(tmp_path: Path) -> None:
    model = load_tiny(save_tiny_model(tmp_path)).model.train()
    experts = next(module for module in model.modules() if isinstance(module, Nf4Experts))
    index_TK = routing(40, experts.num_experts, 2)
    x_TD = torch.randn(40, experts.spec.hidden_size, requires_grad=True)
    weights_TK = torch.full((40, 2), 0.5, requires_grad=True)
    with few_tokens(model, 2, training=True):
        y_TD = experts(x_TD, index_TK, weights_TK)
        y_TD.square().sum().backward()
    chosen = set(choose_tokens(index_TK, 2).tolist())
    assert 0 < len(chosen) < 40
    for tensor in (y_TD, x_TD.grad, weights_TK.grad):
        assert {token for token in range(40) if tensor[token].any()} == chosen
    with few_tokens(model, 2):  # of forwards in evaluation
        assert experts(x_TD, index_TK, weights_TK).any(dim=1).all()
