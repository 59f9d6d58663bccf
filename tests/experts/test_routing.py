"""Rows reach their experts and come back as a plain loop over tokens would send them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertune.experts.routing import combine, dispatch, sort_by_expert


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Experts of each token [T, K], no expert twice for one token, and E."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=12))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.tensor([token[:top_k] for token in tokens], dtype=dtype), num_experts


@given(choices())
def test_sorted_rows_are_grouped_by_expert_and_keep_their_order_inside(case: tuple[Tensor, int]) -> None:
    index, num_experts = case
    routing = sort_by_expert(index, num_experts)
    flat = index.flatten().tolist()
    by_expert = [row for expert in range(num_experts) for row in range(len(flat)) if flat[row] == expert]
    assert routing.order_R.tolist() == by_expert
    assert routing.offsets_E.tolist() == [sum(chosen <= expert for chosen in flat) for expert in range(num_experts)]
    assert routing.offsets_E.dtype == torch.int64


@given(choices())
def test_inverse_undoes_the_order(case: tuple[Tensor, int]) -> None:
    routing = sort_by_expert(*case)
    assert torch.equal(routing.order_R[routing.inverse_R], torch.arange(len(routing.order_R)))
    assert torch.equal(routing.inverse_R[routing.order_R], torch.arange(len(routing.order_R)))


def loop(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each token times the number of its expert plus one, weighted and summed, one at a time."""
    return torch.stack(
        [
            sum(
                (weights[t, k] * hidden[t] * (int(index[t, k]) + 1) for k in range(index.shape[1])),
                start=torch.zeros(()),
            )
            for t in range(index.shape[0])
        ]
    )


def routed(hidden: Tensor, index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """The same through dispatch and combine, with experts that multiply by their number plus one."""
    routing = sort_by_expert(index, num_experts)
    rows = dispatch(hidden, routing)
    counts = routing.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int64))
    factors = torch.arange(1, num_experts + 1).repeat_interleave(counts)
    return combine(rows * factors[:, None], weights, routing)


@given(choices(), st.integers(1, 5))
def test_dispatch_and_combine_equal_a_loop_over_tokens_with_gradients(case: tuple[Tensor, int], width: int) -> None:
    index, num_experts = case
    hidden = torch.randn(index.shape[0], width, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    expected, actual = loop(hidden, index, weights), routed(hidden, index, weights, num_experts)
    torch.testing.assert_close(actual, expected)
    towards = torch.randn_like(expected)
    for gradient, plain in zip(
        torch.autograd.grad(actual, (hidden, weights), towards),
        torch.autograd.grad(expected, (hidden, weights), towards),
        strict=True,
    ):
        torch.testing.assert_close(gradient, plain)


def test_gradients_pass_a_numerical_check() -> None:
    index = torch.tensor([[1, 0], [2, 1], [0, 2]])
    hidden = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: routed(h, index, w, 3), (hidden, weights))


def test_a_token_may_choose_one_expert_twice() -> None:
    index = torch.tensor([[1, 1], [0, 1]])
    hidden, weights = torch.randn(2, 3), torch.rand(2, 2)
    torch.testing.assert_close(routed(hidden, index, weights, 2), loop(hidden, index, weights))


def test_no_tokens_give_no_rows() -> None:
    routing = sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 4)
    hidden = torch.empty(0, 8, requires_grad=True)
    rows = dispatch(hidden, routing)
    assert rows.shape == (0, 8)
    assert routing.offsets_E.tolist() == [0, 0, 0, 0]
    out = combine(rows, torch.empty(0, 2), routing)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_sum_is_rounded_once_to_the_dtype_of_the_rows(weights_dtype: torch.dtype) -> None:
    index = torch.tensor([[0, 1, 2, 3]])
    rows = torch.tensor([[1.0], [2**-9], [2**-9], [2**-9]], dtype=torch.bfloat16)
    weights = torch.ones(1, 4, dtype=weights_dtype)
    out = combine(rows, weights, sort_by_expert(index, 4))
    # Added one by one in bfloat16, none of the small ones would ever move the 1.
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 2**-7


def test_router_scores_keep_their_dtype_in_the_backward_pass() -> None:
    index = torch.tensor([[0, 1], [1, 0]])
    weights = torch.rand(2, 2, requires_grad=True)
    rows = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    combine(rows, weights, sort_by_expert(index, 2)).float().sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
