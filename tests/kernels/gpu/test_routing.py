"""Routed tokens between the GEMMs on a GPU: the stable sort, the gate's gradient, the sum over a token's experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertune.kernels.expert_mlp import plan
from expertune.kernels.gpu import routing

from .conftest import assert_near, nan


@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    num_experts=st.sampled_from([1, 2, 5, 64]),
    first=st.sampled_from([0, 12345]),
    skewed=st.booleans(),
)
def test_sort_is_torchs_stable_sort(tokens, top_k, num_experts, first, skewed):
    index = torch.randint(num_experts, (tokens, top_k))
    if skewed:
        index = index.div(2, rounding_mode="floor")
    router = torch.rand(tokens, top_k)
    found = routing.sort_by_expert(index, router, num_experts, first)
    expected = plan.sort_by_expert(plan.Chunk(router, index, router, first), num_experts)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (512, 10)])
def test_sort_of_more_tokens_than_a_program_takes_at_once(monkeypatch, num_experts, top_k):
    monkeypatch.setattr(routing, "_BLOCKS", 3)
    index, router = torch.randint(num_experts, (90, top_k)), torch.rand(90, top_k).half()
    found = routing.sort_by_expert(index, router, num_experts, 0)
    expected = plan.sort_by_expert(plan.Chunk(router, index, router), num_experts)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [24, 2600])
def test_gates_gradient_is_autograds(dtype, size):
    gate_up, dinter, router = torch.randn(6, 2 * size).to(dtype), torch.randn(6, size).to(dtype), torch.rand(6)
    gate_up[0, 0], gate_up[1, 1] = 0.0, 60.0  # where silu is 0, and where exp would leave float16
    leaf = gate_up.float().requires_grad_()
    expected = torch.nn.functional.silu(leaf[:, :size]) * leaf[:, size:]
    (gradient,) = torch.autograd.grad(expected, leaf, dinter.float() * router[:, None])
    inter, drouter = nan(6, size, dtype=dtype), nan(6)
    routing.gate_backward(gate_up, dinter, router, inter, drouter, torch.tensor([2, 2, 6]))
    relative = 1e-6 if dtype == torch.float32 else 1e-3
    assert_near(gate_up, gradient, relative)
    assert_near(inter, expected.detach(), relative)
    assert_near(drouter, (expected * dinter.float()).sum(1).detach(), 1e-5)


def test_gates_gradient_of_some_experts_leaves_the_others_rows_alone():
    gate_up, dinter = torch.randn(6, 32), torch.randn(6, 16)
    before, inter, drouter = gate_up.clone(), nan(6, 16), nan(6)
    routing.gate_backward(gate_up, dinter, torch.rand(6), inter, drouter, torch.tensor([1, 4, 6]), slice(1, 2))
    assert torch.equal(gate_up[[0, 4, 5]], before[[0, 4, 5]])
    assert inter[[0, 4, 5]].isnan().all()
    assert drouter[[0, 4, 5]].isnan().all()
    assert torch.isfinite(inter[1:4]).all()
    assert not torch.equal(gate_up[1:4], before[1:4])


@pytest.mark.parametrize("top_k", [1, 3])
def test_combine_sums_a_tokens_rows_in_the_order_of_its_choices(top_k):
    values, inverse = torch.randn(7 * top_k, 1100), torch.randperm(7 * top_k)
    drouter = torch.rand(7 * top_k)
    out, chosen = nan(7, 1100), nan(7, top_k)
    routing.combine(values, inverse, out, drouter, chosen)
    assert torch.equal(out, plan.combine(values, inverse, 7))
    assert torch.equal(chosen, drouter[inverse].view(7, top_k))
