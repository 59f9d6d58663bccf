"""Tokens sorted by expert, and what their experts gave summed by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertune.kernels.expert_mlp.plan import Chunk, combine, sort_by_expert


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Experts of each token [T, K], no expert twice for one token, and E."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=12))
    return torch.tensor([token[:top_k] for token in tokens]), num_experts


@given(choices(), st.integers(0, 100))
def test_sorted_tokens_are_grouped_by_expert_and_keep_their_order_inside(case: tuple[Tensor, int], first: int) -> None:
    index, num_experts = case
    weights = torch.rand(index.shape)
    routed = sort_by_expert(Chunk(weights, index, weights, first), num_experts)
    flat = index.flatten().tolist()
    by_expert = [row for expert in range(num_experts) for row in range(len(flat)) if flat[row] == expert]
    assert routed.number_R.tolist() == [first + row for row in by_expert]
    assert routed.token_R.tolist() == [row // index.shape[1] for row in by_expert]
    assert torch.equal(routed.weight_R, weights.flatten()[by_expert])
    assert routed.offsets_E.tolist() == [sum(chosen <= expert for chosen in flat) for expert in range(num_experts)]


@given(choices())
def test_combine_sums_what_each_tokens_experts_gave(case: tuple[Tensor, int]) -> None:
    index, num_experts = case
    weights = torch.ones(index.shape)
    routed = sort_by_expert(Chunk(weights, index, weights), num_experts)
    values = torch.randn(index.shape[0], index.shape[1], 3)
    combined = combine(values.flatten(0, 1)[routed.number_R], routed.inverse_R, index.shape[0])
    torch.testing.assert_close(combined, values.sum(dim=1))
