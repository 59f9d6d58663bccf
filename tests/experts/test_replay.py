"""Experts under activation checkpointing are computed once in forward, and never again for the recomputation."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from expertune.experts import replay
from expertune.experts.lora import ExpertLoraConfig, ExpertsLora
from expertune.experts.module import Nf4Experts, keep_inner
from expertune.kernels.expert_mlp import operator
from tests.experts.families import build_experts, random_routing


@pytest.fixture
def layer() -> ExpertsLora:
    experts = Nf4Experts(build_experts("MixtralExperts"))
    for expert in range(experts.num_experts):
        for projection in experts.spec.projections:
            experts.write(expert, projection, torch.randn(experts.spec.shape(projection)))
    config = ExpertLoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["experts"])
    config.expert_ranks = {"experts": {"gate": (4, 8.0), "up": (4, 8.0), "down": (4, 8.0)}}
    adapted = ExpertsLora(experts, "default", config, target_name="experts")
    for factor in adapted.lora_B["default"].values():
        torch.nn.init.normal_(factor)
    return adapted


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that products of a forward are computed."""
    from expertune.kernels import expert_mlp

    computed: list[int] = []
    for route in (expert_mlp.fused, expert_mlp.dequant_gemm):
        forward = route.forward
        monkeypatch.setattr(route, "forward", lambda *args, f=forward: computed.append(1) or f(*args))
    return computed


def gradients(layer: ExpertsLora, twice: bool, **arguments: object) -> list[Tensor]:
    """Of a region that holds the experts once or twice, and code that changes their output in place."""
    torch.manual_seed(4)
    hidden = torch.randn(9, 64, requires_grad=True)
    index, weights = random_routing(9, 4)

    def region(x: Tensor) -> Tensor:
        out = layer(torch.tanh(x), index, weights)
        out = layer(torch.sin(out), index, weights) if twice else out
        return (out * 0.5).square()

    leaves = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    out = checkpoint(region, hidden, **arguments) if arguments else region(hidden)
    return list(torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("twice", [False, True])
def test_replayed_region_has_the_gradients_of_a_plain_one(
    layer: ExpertsLora, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    expected = gradients(layer, twice)
    computed = count_forwards(monkeypatch)
    replayed = gradients(layer, twice, **replay.with_replay(None))
    assert len(computed) == 1 + twice
    for one, other in zip(replayed, expected, strict=True):
        assert torch.equal(one, other)


def count_first_gemms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that gate and up are computed."""
    from expertune.kernels import expert_mlp

    computed: list[int] = []
    names = (expert_mlp.fused, "_multiply_gate_up"), (expert_mlp.dequant_gemm, "_gate_up")
    for module, name in (*names, (expert_mlp.dequant_gemm, "_add_inner")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=real, **named: computed.append(1) or f(*args, **named))
    return computed


@pytest.mark.parametrize("twice", [False, True])
def test_replayed_region_whose_experts_keep_gate_and_up_computes_them_once(
    layer: ExpertsLora, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    expected = gradients(layer, twice)
    computed = count_first_gemms(monkeypatch)
    gradients(layer, twice, **replay.with_replay(None))
    again = len(computed)
    keep_inner(layer, 1)
    computed.clear()
    replayed = gradients(layer, twice, **replay.with_replay(None))
    assert len(computed) == 1 + twice
    assert again == 2 * len(computed)
    for one, other in zip(replayed, expected, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_of_others_is_as_right_with_experts_that_keep_gate_and_up(layer: ExpertsLora) -> None:
    expected = gradients(layer, False)
    keep_inner(layer, 1)
    for one, other in zip(gradients(layer, False, use_reentrant=False), expected, strict=True):
        assert torch.equal(one, other)


def kept_region(layer: ExpertsLora, seen: list[int]) -> tuple[Tensor, Tensor]:
    """A checkpointed region's leaf and output; `seen` hears what is still kept after the experts' backward."""
    index, weights = random_routing(9, 4)

    def region(x: Tensor) -> Tensor:
        x = torch.tanh(x)
        x.register_hook(lambda _: seen.append(sum(not each.expired() for each in made)))
        return layer(x, index, weights).square()

    made: list[StorageWeakRef] = []
    ask = operator.ask_for_huge_pages

    def watched(tensor: Tensor) -> Tensor:
        if tensor.numel():
            made.append(StorageWeakRef(tensor.untyped_storage()))
        return ask(tensor)

    hidden = torch.randn(9, 64, requires_grad=True)
    with mock.patch.object(operator, "ask_for_huge_pages", watched):
        out = checkpoint(region, hidden, **replay.with_replay(None))
    assert [each.expired() for each in made] == [False]
    return hidden, out


def test_gate_and_up_are_free_when_the_experts_backward_has_used_them(layer: ExpertsLora) -> None:
    keep_inner(layer, 1)
    seen: list[int] = []
    _, out = kept_region(layer, seen)
    out.sum().backward()
    assert seen == [0]


def test_second_backward_of_a_region_computes_gate_and_up_again(
    layer: ExpertsLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_inner(layer, 1)
    hidden, out = kept_region(layer, [])
    computed = count_first_gemms(monkeypatch)
    (first,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)
    assert not computed
    (second,) = torch.autograd.grad(out.sum(), hidden)
    assert len(computed) == 1
    assert torch.equal(first, second)


def test_checkpointing_of_others_computes_twice_and_is_as_right(
    layer: ExpertsLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(layer, False)
    computed = count_forwards(monkeypatch)
    for one, other in zip(gradients(layer, False, use_reentrant=False), expected, strict=True):
        assert torch.equal(one, other)
    assert len(computed) == 2


def test_reentrant_variant_is_left_as_it_is() -> None:
    assert replay.with_replay({"use_reentrant": True}) == {"use_reentrant": True}
    assert replay.with_replay({})["context_fn"] is replay.checkpoint_contexts
