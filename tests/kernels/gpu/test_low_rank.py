"""The thin GEMMs of adapters on a GPU: x @ A, its gradients and the input's, with the counter's dropout."""

import pytest
import torch
from torch import Tensor

from expertune.kernels.dropout import dropout
from expertune.kernels.gpu.low_rank import Expand, Outer, Shrink, expand, outer, shrink

from .conftest import assert_near, nan, routing

COUNTS = [0, 21, 1, 6, 0]
ROWS, EXPERTS, TOKENS = sum(COUNTS), len(COUNTS), 11
SEED = 2**61 + 5


def dropped(x: Tensor, number_R: Tensor, probability: float) -> Tensor:
    return dropout(x.float(), number_R, SEED, probability) if probability else x.float()


@pytest.mark.parametrize("probabilities", [(0.0,), (0.0, 0.3), (0.2, 0.2)], ids=str)
@pytest.mark.parametrize("width", [96, 200])
def test_shrink_is_the_dropped_input_times_a(dtype, probabilities, width):
    routed, x = routing(COUNTS, TOKENS), torch.randn(TOKENS, width).to(dtype)
    items = [
        Shrink(torch.randn(EXPERTS, 3 + 5 * i, width), nan(ROWS, 3 + 5 * i), False, 0.5 + i, 0, p, torch.tensor(SEED))
        for i, p in enumerate(probabilities)
    ]
    shrink(x, routed.offsets_E, items, routed.token_R, routed.number_R)
    for item in items:
        inputs = dropped(x[routed.token_R], routed.number_R, item.dropout)
        expected = item.scaling * torch.einsum("rk,rpk->rp", inputs, item.factor[routed.expert_R])
        assert_near(item.out_Rr, expected, 2e-6)


def test_shrink_through_b_takes_the_columns_of_its_part(dtype):
    routed, dy = routing(COUNTS, TOKENS), torch.randn(ROWS, 80).to(dtype)
    items = [Shrink(torch.randn(EXPERTS, 40, 4), nan(ROWS, 4), transposed=True, scaling=2.0, column=c) for c in (0, 40)]
    shrink(dy, routed.offsets_E, items)
    for item in items:
        columns = dy[:, item.column : item.column + 40].float()
        expected = 2.0 * torch.einsum("rk,rkp->rp", columns, item.factor[routed.expert_R])
        assert_near(item.out_Rr, expected, 2e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["gradient of A", "gradient of B"])
@pytest.mark.parametrize("probabilities", [(0.0,), (0.0, 0.3)], ids=str)
def test_outer_sums_each_experts_rows_and_clears_experts_without_rows(dtype, transposed, probabilities):
    width = 70
    routed, v, router_R = routing(COUNTS, TOKENS), torch.randn(TOKENS, width).to(dtype), torch.rand(ROWS)
    items = []
    for i, p in enumerate(probabilities):
        rank = 3 + 5 * i
        total = nan(EXPERTS, width, rank) if transposed else nan(EXPERTS, rank, width)
        items.append(Outer(torch.randn(ROWS, rank), total, transposed, 0.5, 0, p, torch.tensor(SEED)))
    outer(v, routed.offsets_E, items, routed.token_R, routed.number_R, router_R, add=False)
    once = [item.total.clone() for item in items]
    outer(v, routed.offsets_E, items, routed.token_R, routed.number_R, router_R, add=True)
    for item, first in zip(items, once, strict=True):
        inputs = dropped(v[routed.token_R], routed.number_R, item.dropout)
        expected = torch.zeros(EXPERTS, item.low_Rr.shape[1], width)
        for row, expert in enumerate(routed.expert_R.tolist()):
            expected[expert] += 0.5 * torch.outer(item.low_Rr[row] * router_R[row], inputs[row])
        expected = expected.transpose(1, 2) if transposed else expected
        assert_near(first, expected, 2e-6)
        assert_near(item.total, 2 * expected, 2e-6)


@pytest.mark.parametrize("probabilities", [(0.0,), (0.3,), (0.3, 0.0)], ids=str)
def test_expand_is_the_inputs_gradient_where_it_was_kept(dtype, probabilities):
    width = 136
    routed = routing(COUNTS, TOKENS)
    items = [
        Expand(torch.randn(ROWS, 3 + 5 * i), torch.randn(EXPERTS, 3 + 5 * i, width), p, torch.tensor(SEED))
        for i, p in enumerate(probabilities)
    ]
    out = nan(ROWS, width)
    assert expand(out, routed.offsets_E, items, dtype, routed.number_R)
    expected = sum(
        dropped(torch.einsum("rp,rpk->rk", item.low_Rr, item.factor[routed.expert_R]), routed.number_R, item.dropout)
        for item in items
    )
    assert_near(out, expected, 2e-6 if dtype == torch.float32 else 2e-5)


def test_without_adapters_nothing_is_written():
    out = nan(4, 8)
    assert not expand(out, torch.tensor([4]), [], torch.float32)
    assert out.isnan().all()
