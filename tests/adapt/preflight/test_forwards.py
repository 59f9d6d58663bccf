"""The forwards of the preflight check beside the one that gradients are taken of."""

import threading
import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertune.checkpoint.load import LoadedModel
from tests.adapt.preflight.conftest import (
    batch_of,
    check,
    expect_failure,
    prepared,
)
from tests.tiny_models import changed


@pytest.mark.parametrize("where", ["at a layer", "between two layers"])
def test_what_a_compared_forward_raises_is_raised_and_leaves_nothing_behind(where: str, loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    model.train()
    threads = threading.active_count()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = count_hooks(model)

    def fail(module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            raise torch.OutOfMemoryError("none left")

    name = "model.layers.1" if where == "at a layer" else "model.norm"
    handle = loaded.model.get_submodule(name).register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        check(model, batch, base)
    handle.remove()
    assert threading.active_count() == threads
    assert count_hooks(model) == hooks
    assert changed(before, dict(model.state_dict())) == []
    assert all(module.training for module in model.modules())
    assert check(model, batch, base)["passed"]


def test_forward_with_gradients_that_fails_ends_the_others(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    threads, hooks = threading.active_count(), count_hooks(model)

    def fail(module: nn.Module, inputs: Any) -> None:
        if module.training:
            raise KeyboardInterrupt

    handle = loaded.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        check(model, batch, base)
    handle.remove()
    assert threading.active_count() == threads
    assert count_hooks(model) == hooks


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_adapter_and_training_flags_are_as_before_between_the_turns(loaded: LoadedModel) -> None:
    """Also where they are not what PEFT leaves behind: one factor that is not trained stays so."""
    batch = batch_of()
    model, base = prepared(loaded, batch)
    factor = loaded.model.get_submodule("model.layers.0.self_attn.q_proj").lora_A["default"].weight
    factor.requires_grad_(False)
    expect_failure(model, batch, base, r"q_proj\.lora_A: the gradient is missing")
    assert not factor.requires_grad


def test_gradients_do_not_depend_on_the_forwards_beside(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under activation checkpointing a layer is computed again with the random numbers that it drew."""
    batch = batch_of()
    model, base = prepared(loaded, batch, dropout=0.1)
    model.activation_checkpointing_enable()
    found: dict[str, dict[str, Tensor]] = {}
    zero_grad = model.zero_grad

    def keep(**arguments: Any) -> None:
        way = "each alone" if found else "in turns"
        found[way] = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        zero_grad(**arguments)

    def draw(module: nn.Module, inputs: Any) -> None:
        if not module.training:
            torch.rand(3)

    monkeypatch.setattr(model, "zero_grad", keep)
    loaded.model.get_submodule("model.layers.0.input_layernorm").register_forward_pre_hook(draw)
    for placement in (types.SimpleNamespace(is_prefetched=True, in_turns=nullcontext), None):
        monkeypatch.setattr("expertune.adapt.comparison.placement_of", lambda model, found=placement: found)
        torch.manual_seed(0)
        check(model, batch, base)
    assert len(found["in turns"]) > 20
    assert changed(found["in turns"], found["each alone"]) == []
