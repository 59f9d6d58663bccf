"""What forward saves for backward leaves the device, and comes back the same."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from expertune import finetune
from expertune.config import parse_config
from expertune.experts import replay
from expertune.run.record import RunRecord
from expertune.train import promises
from expertune.train.offload import Offloaded, activations_on_host, has_separate_host
from tests.train.scarce import adapter_bytes


class Layer(nn.Module):
    """A frozen linear with a trained one beside it, as an adapted layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.trained = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(x) + self.trained(x))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(4)))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def forward(model: nn.Sequential, x: Tensor, checkpointed: bool) -> Tensor:
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    return x.square().mean()


def on_host(model: nn.Module) -> Any:
    """The CPU stands for the device; copies are made all the same."""
    return activations_on_host(model, _device_type="cpu", _least_bytes=1024)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_identical_and_every_saved_tensor_was_copied_once(checkpointed: bool) -> None:
    model, x = make_model(), torch.randn(64, 32)
    forward(model, x, checkpointed).backward()
    expected = gradients(model)
    model.zero_grad()

    with on_host(model) as offloaded:
        loss = forward(model, x, checkpointed)
    copied = offloaded.num_packed
    loss.backward()

    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    # Checkpointed, each layer's input; else what tanh gave as well. The last square saves its own input.
    assert copied == 5 if checkpointed else copied == 9
    assert offloaded.num_unpacked >= copied
    assert offloaded.num_packed == copied, "a recomputation is used at once, and copies nothing"


def test_inputs_of_checkpointed_layers_are_freed_between_forward_and_backward() -> None:
    model = make_model()
    inputs: list[StorageWeakRef] = []
    for layer in model[1:]:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    with on_host(model):
        loss = forward(model, torch.randn(64, 32), checkpointed=True)
    assert len(inputs) == 3
    assert all(storage.expired() for storage in inputs)
    loss.backward()


def test_inputs_of_checkpointed_layers_stay_without_offload() -> None:
    model = make_model()
    inputs: list[StorageWeakRef] = []
    for layer in model[1:]:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    loss = forward(model, torch.randn(64, 32), checkpointed=True)
    assert not any(storage.expired() for storage in inputs)
    loss.backward()


def test_parameters_buffers_small_and_integer_tensors_stay() -> None:
    model = make_model()
    model.register_buffer("scale", torch.randn(32, 32))
    offloaded = Offloaded(model, "cpu", least_bytes=1024)
    assert isinstance(model[0], Layer)
    for stays in (
        model[0].frozen.weight,
        model[0].frozen.weight.t(),
        model[0].trained.weight,
        model.scale,
        torch.randn(255),
        torch.ones(64, 64, dtype=torch.int64),
        torch.randn(16).expand(64, 16),
    ):
        assert offloaded.pack(stays) is stays
    assert offloaded.num_packed == 0
    moved = torch.randn(256)
    packed = offloaded.pack(moved)
    assert not isinstance(packed, Tensor)
    brought = offloaded.unpack(packed)
    assert torch.equal(brought, moved)
    assert brought.data_ptr() != moved.data_ptr()


def test_copy_keeps_the_layout() -> None:
    offloaded = Offloaded(nn.Identity(), "cpu", least_bytes=1)
    moved = torch.randn(8, 4, 6).transpose(0, 2)
    assert offloaded.unpack(offloaded.pack(moved)).stride() == moved.stride()


def test_tensor_saved_by_several_operators_is_copied_once() -> None:
    model = nn.Identity()
    with on_host(model) as offloaded:
        x = torch.randn(64, 64, requires_grad=True) * 1.0
        loss = x.sin().sum() + x.cos().sum()
        assert (offloaded.num_packed, offloaded.num_shared) == (1, 1)
    loss.backward()


def test_tensor_at_the_address_of_one_that_is_gone_is_copied_again() -> None:
    offloaded = Offloaded(nn.Identity(), "cpu", least_bytes=1)
    addresses, packed = [], []
    # The allocator first fills the holes that earlier work has left, and then uses an address again.
    while len(set(addresses)) == len(addresses) < 2000:
        tensor = torch.full((64, 64), float(len(packed)))
        addresses.append(tensor.data_ptr())
        packed.append(offloaded.pack(tensor))
        del tensor
    assert len(set(addresses)) < len(addresses), "otherwise nothing is tested"
    assert [offloaded.unpack(one)[0, 0].item() for one in packed] == list(range(len(packed)))


def test_nothing_is_copied_without_gradients() -> None:
    model = make_model()
    with torch.no_grad(), on_host(model) as offloaded:
        forward(model, torch.randn(64, 32), checkpointed=False)
    assert offloaded.num_packed == 0


def test_tape_of_the_experts_is_put_away_too() -> None:
    offloaded = Offloaded(nn.Identity(), "cpu", least_bytes=1)
    tape = replay.Tape()
    with replay.held_by(offloaded.hold), tape.recording():
        output, low_rank = replay.run(lambda recorded: (torch.randn(16, 8), [torch.randn(32, 2)]))
    assert offloaded.num_packed == 2
    kept = [output.clone(), low_rank[0].clone()]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (output, low_rank[0])]
    del output, low_rank
    assert all(storage.expired() for storage in storages)
    seen: list[Tensor] = []
    with tape.replaying():
        replay.run(lambda recorded: (seen.extend(recorded) or recorded[0], recorded[1:]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, kept, strict=True))


def test_cpu_has_no_separate_host() -> None:
    assert not has_separate_host(torch.device("cpu"))
    assert has_separate_host(torch.device("cuda"))


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "plain"])
def test_finetune_with_activations_on_the_host_gives_identical_bytes(
    checkpointed: bool,
    run_values: dict[str, Any],
    three_steps: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_values["training"]["gradient_checkpointing"]
    run_values["training"] |= {"max_steps": 3, "gradient_checkpointing": checkpointed}

    def run(name: str, offload: bool) -> RunRecord:
        values = run_values | {"output_dir": str(tmp_path / name), "offload_activations": offload}
        return finetune(parse_config(values), console=Console(file=io.StringIO())).record

    expected = RunRecord.load(three_steps) if checkpointed else run("plain", False)
    monkeypatch.setattr("expertune.train.offload._DEVICE_TYPE", "cpu")
    monkeypatch.setattr("expertune.train.offload._LEAST_BYTES", 1024)
    made: list[Offloaded] = []

    class Watched(Offloaded):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("expertune.train.offload.Offloaded", Watched)
    offloaded = run("offloaded", True)

    assert len(made) == 3, "one for each forward of a step"
    # Checkpointed: the inputs of two layers, their experts' output and five factors' x @ A of 1 KiB and more.
    assert all(one.num_packed >= 4 for one in made)
    assert all(one.num_unpacked >= one.num_packed for one in made)
    plain = three_steps if checkpointed else tmp_path / "plain"
    assert adapter_bytes(tmp_path / "offloaded") == adapter_bytes(plain)
    assert offloaded["train"]["loss"] == expected["train"]["loss"]
    assert offloaded["eval"]["loss"] == expected["eval"]["loss"]


def test_finetune_on_a_cpu_says_that_there_is_nothing_to_offload(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_values["training"] |= {"max_steps": 1, "eval_strategy": "no"}
    monkeypatch.setattr(promises, "activations_on_host", lambda model: pytest.fail("nothing to move"))
    record = finetune(parse_config(run_values | {"offload_activations": True})).record
    assert "offload_activations: on this cpu memory is the host's, and nothing is moved" in record["train"]["notes"]
