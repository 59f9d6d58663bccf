"""The expert layer as an operator of torch: recomputed, compiled, copied, and given what does not fit."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.kernels.expert_mlp import ExpertLayer, expert_mlp
from expertune.kernels.lora import pack
from expertune.kernels.nf4 import Nf4Stack
from tests.kernels.expert_layers import SWIGLU, F, make_case


def test_replay_returns_what_was_computed_and_gives_the_same_gradients(route: str) -> None:
    case = make_case(12, dropout=0.1)
    torch.manual_seed(7)
    out, low_rank = expert_mlp(*case)
    expected = torch.autograd.grad(out.square().sum(), case.leaves)
    torch.manual_seed(7)
    replayed, again = expert_mlp(*case._replace(replay=[out.detach(), *(tensor.detach() for tensor in low_rank)]))
    assert torch.equal(replayed, out)
    for one, other in zip(again, low_rank, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(torch.autograd.grad(replayed.square().sum(), case.leaves), expected, strict=True):
        assert torch.equal(one, other)


def test_activation_checkpointing_gives_the_same_gradients(route: str) -> None:
    case = make_case(12, dropout=0.2)

    def block(hidden: Tensor) -> Tensor:
        return expert_mlp(torch.tanh(hidden), *case[1:])[0].square()

    torch.manual_seed(1)
    plain = torch.autograd.grad(block(case.hidden).sum(), case.leaves)
    torch.manual_seed(1)
    recomputed = torch.autograd.grad(checkpoint(block, case.hidden, use_reentrant=False).sum(), case.leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_compiled_layer_is_one_graph_with_the_same_gradients(route: str) -> None:
    case = make_case(7, dropout=0.2)

    def block(hidden: Tensor) -> Tensor:
        return expert_mlp(torch.tanh(hidden), *case[1:])[0].square()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for run in (block, compiled):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(run(case.hidden).sum(), case.leaves))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keep", [0, 2 * F], ids=["recomputed", "kept"])
def test_operator_fulfils_torchs_contract_for_custom_operators(route: str, keep: int) -> None:
    case = make_case(5, ranks=((0, 4), (2, 3)))
    torch.library.opcheck(
        torch.ops.expertune.expert_mlp.default,
        (
            case.hidden,
            case.index,
            case.weights,
            [*case.gate_up.bytes, *case.down.bytes],
            case.layer.name,
            *pack(case.updates, torch.zeros(2, dtype=torch.int64)),
            [],
            keep,
            True,
        ),
    )


def test_copy_of_a_layer_is_found_under_its_own_name() -> None:
    case = make_case(5)
    copied = copy.deepcopy(case.layer)
    assert copied.name != case.layer.name
    assert torch.equal(expert_mlp(*case)[0], expert_mlp(*case._replace(layer=copied))[0])


def test_name_of_a_layer_is_free_again_when_the_layer_is_gone() -> None:
    first = ExpertLayer(SWIGLU, "a layer")
    second = ExpertLayer(SWIGLU, "a layer")
    assert (first.name, second.name) == ("a layer", "a layer#2")
    del first
    assert ExpertLayer(SWIGLU, "a layer").name == "a layer"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of another width": ({"hidden": torch.randn(6, 64)}, r"hidden must be \[tokens, 128\], got \(6, 64\)"),
    "hidden of another dtype": ({"hidden": torch.randn(6, 128).double()}, "got torch.float64"),
    "index of another dtype": ({"index": torch.zeros(6, 2).int()}, r"top_k_index must be int64 \[6, k\]"),
    "index of other tokens": ({"index": torch.zeros(5, 2).long()}, r"got torch.int64 \(5, 2\)"),
    "weights of another shape": ({"weights": torch.rand(6, 3)}, r"top_k_weights must be floating point \(6, 2\)"),
    "down of another shape": ({"down": Nf4Stack(4, 64, 192)}, r"down must be matrices \(128, 192\), got \(64, 192\)"),
    "experts that do not share out": ({"down": Nf4Stack(3, 128, 192)}, "8 matrices cannot be shared out to 3 experts"),
    "a bias of another width": (
        {"biases": (torch.randn(4, 192), torch.randn(4, 128))},
        r"the bias of gate_up must be floating point \(4, 384\)",
    ),
    "weights elsewhere": ({"gate_up": Nf4Stack(8, 192, 128, device="meta")}, "gate_up is on meta, hidden is on cpu"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    changes, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        expert_mlp(*make_case(6)._replace(**changes))


WRONG_UPDATES: dict[str, tuple[dict[str, Any], str]] = {
    "a part too many": ({"part": 3}, "part must be from 0 to 2, got 3"),
    "A of down's width on gate": ({"a": torch.randn(4, 8, 192)}, r"A must be \[4, r, 128\], got \(4, 8, 192\)"),
    "B transposed": ({"b": torch.randn(4, 8, 192)}, r"B must be \[4, 192, 8\], got \(4, 8, 192\)"),
    "factors of two dtypes": ({"b": torch.randn(4, 192, 8).half()}, "B is torch.float16, A is torch.float32"),
    "everything dropped": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "factors elsewhere": ({"a": torch.empty(4, 8, 128, device="meta")}, "A is on meta, hidden is on cpu"),
}


@pytest.mark.parametrize("wrong", WRONG_UPDATES)
def test_updates_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    case = make_case(6)
    changes, message = WRONG_UPDATES[wrong]
    with pytest.raises(ValueError, match=message):
        expert_mlp(*case._replace(updates=[replace(case.updates[0], **changes)]))


@pytest.mark.parametrize("others", [None, (1, 3), (0, 1)])
def test_gain_beside_another_update_of_the_same_experts_is_refused(others: tuple[int, ...] | None) -> None:
    case = make_case(6, ranks=((0, 8), (0, 4)), experts=((1, 2), others))
    first = replace(case.updates[0], gain=torch.ones(2, 192))
    with pytest.raises(ValueError, match="must be the only one of its part and experts"):
        expert_mlp(*case._replace(updates=[case.updates[1], first]))
