"""Cross entropy in chunks as an operator of torch: its contract, graphs through it, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.output_heads import make_case


@pytest.mark.parametrize("gradients", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("own_x", [False, True])
def test_operator_fulfils_torchs_contract_for_custom_operators(own_x: bool, gradients: tuple[bool, bool]) -> None:
    case = make_case(ranks=(3, 5), own_x=own_x, bias=True, softcap=3.0)
    for leaf in case.leaves:
        # Flags and inputs agree, as `linear_cross_entropy` makes them.
        leaf.requires_grad_(gradients[0] if leaf is case.hidden else gradients[1])
    torch.library.opcheck(
        torch.ops.expertune.linear_cross_entropy.default,
        (
            case.hidden,
            case.weight,
            case.bias,
            case.labels,
            case.scale,
            case.softcap,
            [update.scaling for update in case.updates],
            [own_x] * 2,
            [update.a_rD for update in case.updates],
            [update.b_Vr for update in case.updates],
            [update.x_TD for update in case.updates if update.x_TD is not None],
            *gradients,
        ),
    )


def test_compiled_graph_goes_through_it_unbroken() -> None:
    case = make_case(own_x=True)

    def through(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(**case._replace(hidden=torch.tanh(hidden)).arguments) / 7

    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(through(case.hidden), case.leaves)
    for one, other in zip(torch.autograd.grad(compiled(case.hidden), case.leaves), plain, strict=True):
        torch.testing.assert_close(one, other)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of another width": ({"hidden": torch.randn(5, 32)}, r"hidden must be \[rows, 33\], got \(5, 32\)"),
    "hidden of three dimensions": ({"hidden": torch.randn(1, 5, 33)}, r"hidden must be .*got \(1, 5, 33\)"),
    "hidden of another dtype": ({"hidden": torch.randn(5, 33).double()}, "hidden must be .*got torch.float64"),
    "weight of one dimension": ({"weight": torch.randn(33)}, r"weight must be .*got \(33,\)"),
    "weight without words": ({"weight": torch.randn(0, 33)}, r"weight must be .*got \(0, 33\)"),
    "weight of another dtype": ({"weight": torch.ones(157, 33).int()}, "weight must be .*got torch.int32"),
    "weight that is trained": ({"weight": torch.randn(157, 33, requires_grad=True)}, "weight must be frozen"),
    "labels of another length": (
        {"labels": torch.tensor([1, 2])},
        r"labels must be int64 \[5\], got torch.int64 \(2,\)",
    ),
    "labels of another dtype": ({"labels": torch.ones(5)}, r"labels must be int64 \[5\], got torch.float32"),
    "a label beyond the vocabulary": ({"labels": torch.full((5,), 157)}, r"within \[0, 157\), got 157"),
    "a negative label": ({"labels": torch.full((5,), -1)}, r"within \[0, 157\), got -1"),
    "a bias of another length": ({"bias": torch.randn(156)}, r"bias must be \[157\], got \(156,\)"),
    "a cap of zero": ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
    "weight elsewhere": ({"weight": torch.empty(157, 33, device="meta")}, "weight is on meta, hidden is on cpu"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    changes, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**make_case(rows=5)._replace(**changes).arguments)


WRONG_UPDATES: dict[str, tuple[dict[str, Any], str]] = {
    "A of another width": ({"a_rD": torch.randn(4, 32)}, r"A must be \[r, 33\], got \(4, 32\)"),
    "A of three dimensions": ({"a_rD": torch.randn(1, 4, 33)}, r"A must be \[r, 33\], got \(1, 4, 33\)"),
    "B of another rank": ({"b_Vr": torch.randn(157, 5)}, r"B must be \[157, 4\], got \(157, 5\)"),
    "B transposed": ({"b_Vr": torch.randn(4, 157)}, r"B must be \[157, 4\], got \(4, 157\)"),
    "B of another dtype": ({"b_Vr": torch.randn(157, 4).half()}, "B is torch.float16, A is torch.float32"),
    "factors elsewhere": ({"a_rD": torch.empty(4, 33, device="meta")}, "A is on meta, hidden is on cpu"),
    "an input of another shape": ({"x_TD": torch.randn(4, 33)}, r"x must be \(5, 33\), got \(4, 33\)"),
}


@pytest.mark.parametrize("wrong", WRONG_UPDATES)
def test_updates_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    case = make_case(rows=5)
    changes, message = WRONG_UPDATES[wrong]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**case._replace(updates=[replace(case.updates[0], **changes)]).arguments)
