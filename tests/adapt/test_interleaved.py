"""Forwards that pass the layers in turns: one transfer of each layer serves them all, and each is what it is alone."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertune.adapt.attach import attach
from expertune.adapt.comparison import BaseForward, probe_logits
from expertune.adapt.interleaved import PausingForward, in_turns
from expertune.adapt.preflight import preflight
from expertune.config import LoraSection
from expertune.kernels import workspace
from expertune.placement import Location
from tests.placement.test_experts import LAYERS, everywhere, placed
from tests.tiny_models import random_rows, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
@pytest.mark.parametrize(
    ("location", "separate_host"),
    [("disk", False), ("disk", True), ("host", True)],
    ids=["mapped", "disk to slots", "host to slots"],
)
def test_preflight_check_takes_as_many_transfers_of_each_layer_as_a_step_and_finds_the_same(
    folder: Path, tmp_path: Path, location: Location, separate_host: bool, checkpointing: bool
) -> None:
    loaded, placement = placed(folder, tmp_path)
    batch = {"input_ids": random_rows(4, 24)}
    sample = {"input_ids": batch["input_ids"][:2, :16]}
    base = BaseForward(sample, probe_logits(loaded.model, sample))
    lora = LoraSection(r=2, dropout=0.1, targets=["attention", "experts"])
    model = attach(loaded, lora, "owner/tiny")
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(0)
    resident = preflight(model, batch, base)
    placement.separate_host = separate_host
    placement.move(everywhere(placement, location))
    assert torch.equal(_without(model, sample), base.logits)
    before = placement.describe()["transfers"]
    torch.manual_seed(0)
    seen: list[tuple[int, int]] = []
    offloaded = preflight(model, batch, base, lambda *passed: seen.append(passed))
    # Of the first layer the base model's forward has started the transfer; the last one serves forward and backward.
    assert placement.describe()["transfers"] - before == 2 * LAYERS - 2
    assert {**offloaded, "seconds": 0} == {**resident, "seconds": 0}
    assert resident["learning"]["tokens"] == 96
    assert resident["effective"]["tokens"] == 32
    assert 0 < resident["effective"]["experts_compared"] <= resident["effective"]["experts"] == LAYERS * 4
    assert seen[0] == (0, 5 * LAYERS)
    assert seen[-1] == (5 * LAYERS, 5 * LAYERS)
    assert seen == sorted(seen)


def _without(model: Any, sample: dict[str, Tensor]) -> Tensor:
    with model.disable_adapter():
        return probe_logits(model, sample)


class Layers(nn.Module):
    """A model whose layers write down who passes them; between them it keeps something of its own."""

    def __init__(self, seen: list[tuple[str, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.seen = seen

    def forward(self, name: str) -> int:
        own = 0
        for number, layer in enumerate(self.layers):
            layer(name)
            self.seen.append((name, number))
            own += 10**number
        return own


def pausing(model: Layers, *names: str) -> list[PausingForward[int]]:
    return [PausingForward(lambda name=name: model(name)) for name in names]


def advance(forwards: list[PausingForward[int]]) -> Callable[[], None]:
    def turn() -> None:
        for forward in forwards:
            forward.advance()

    return turn


def test_forwards_pass_each_layer_before_the_next_in_one_order() -> None:
    model = Layers([])
    forwards = pausing(model, "a", "b")
    with in_turns(model.layers, forwards, advance(forwards)):
        assert model("main") == 111
    assert model.seen == [(name, number) for number in range(3) for name in ("a", "b", "main")]
    assert [forward.take() for forward in forwards] == [111, 111]


def test_forward_that_skips_layers_leaves_the_others_to_their_end() -> None:
    model = Layers([])
    forwards = pausing(model, "a", "b")
    with in_turns(model.layers, forwards, advance(forwards)):
        model.layers[0]("main")
    assert all(forward.has_ended for forward in forwards)
    assert [number for name, number in model.seen if name == "b"] == [0, 1, 2]


def test_forward_that_was_never_begun_is_computed_on_the_callers_thread() -> None:
    here: list[threading.Thread] = []
    forward = PausingForward(lambda: here.append(threading.current_thread()))
    forward.finish()
    assert here == [threading.current_thread()]
    forward.finish()
    assert len(here) == 1


def test_forwards_take_turns_in_the_memory_of_the_thread_that_waits_for_them() -> None:
    workspace.clear()
    own = workspace.take("shared", 8)

    def compute() -> tuple[int, int]:
        return workspace.take("shared", 8).data_ptr(), torch.get_num_threads()

    forward = PausingForward(compute)
    forward.advance()
    assert forward.take() == (own.data_ptr(), torch.get_num_threads())
    workspace.clear()


def test_what_a_forward_raises_is_raised_where_it_was_let_on_and_ends_the_others() -> None:
    model = Layers([])
    threads = threading.active_count()
    forwards = pausing(model, "a", "b")
    model.layers[1].register_forward_pre_hook(lambda _, inputs: 1 / 0 if inputs[0] == "b" else None)
    with pytest.raises(ZeroDivisionError), in_turns(model.layers, forwards, advance(forwards)):
        model("main")
    assert threading.active_count() == threads
    assert [len(layer._forward_pre_hooks) for layer in model.layers] == [0, 1, 0]
