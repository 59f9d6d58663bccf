"""What is changed where smaller micro-batches do not help or may not be made: activations, experts, allocations."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from expertune.errors import DoesNotFitError
from expertune.placement import experts as placement
from expertune.run.record import RunRecord
from expertune.train import offload, oom
from expertune.train.trainer import ExpertTrainer
from tests.train.scarce import NO_SEQUENCE, ONE_SEQUENCE, Reference, Scarce, adapter_bytes, out_of_memory, run

ADAM = importlib.import_module("torch.optim.adam")


def offloads(monkeypatch: pytest.MonkeyPatch, *moved: str) -> None:
    """A placement that has these left to offload."""
    left = iter(moved)
    monkeypatch.setattr(placement.Placement, "offload_more", lambda _: next(left, None))


def test_fallbacks_are_used_in_order_and_the_last_error_names_all(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_DEVICE_TYPE", "cpu")
    offloads(monkeypatch, "experts of layer 1 are offloaded", "experts of layer 0 are offloaded")
    Scarce(NO_SEQUENCE, first_layer=4 * 2 + 1).install(monkeypatch)  # in step 3
    with pytest.raises(DoesNotFitError) as raised:
        run(values, tmp_path / "run")
    record = RunRecord.load(tmp_path / "run")
    settings = [next(iter(change["setting"])) for change in record["train"]["recoveries"]]
    assert settings == ["micro_batch_tokens", "offload_activations", "demoted", "demoted"]
    message = str(raised.value)
    assert message.startswith("step 3 ran out of memory in forward or backward, and no fallback is left: ")
    assert "Tried to allocate 2.00 GiB" in message
    for change in record["train"]["recoveries"]:
        assert change["change"] in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}" in message
    assert record["run"]["status"] == "stopped"
    assert len(record["train"]["loss"]) == 2
    assert not (tmp_path / "run" / "adapter").exists()


def test_micro_batches_whose_parts_are_another_step_are_not_split(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertTrainer, "why_indivisible", lambda *_: "its parts are another step")
    Scarce(ONE_SEQUENCE).install(monkeypatch)
    with pytest.raises(DoesNotFitError, match="micro-batches are not split: its parts are another step"):
        run(values, tmp_path / "run")
    changes = RunRecord.load(tmp_path / "run")["train"]["recoveries"]
    assert all("micro_batch_tokens" not in change["setting"] for change in changes)


def test_activations_are_offloaded_where_micro_batches_are_not_split(
    values: dict[str, Any],
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values["training"] |= {"max_steps": 4}
    _, adapter = reference("four")
    monkeypatch.setattr(offload, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(offload, "_LEAST_BYTES", 1)
    monkeypatch.setattr(ExpertTrainer, "why_indivisible", lambda *_: "the bytes are to be compared")
    scarce = Scarce(NO_SEQUENCE, first_layer=4 + 3).install(monkeypatch)  # in the second micro-batch of step 2
    monkeypatch.setattr(scarce, "too_large", lambda tokens: not scarce.trainer.oom.offload_activations)
    recovered = run(values, tmp_path / "recovered")
    assert scarce.num_failures == 1
    assert [(change["step"], change["setting"]) for change in recovered["train"]["recoveries"]] == [
        (2, {"offload_activations": True})
    ]
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_experts_offloaded_during_a_run_change_nothing_but_their_location(
    values: dict[str, Any],
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values["training"] |= {"max_steps": 4}
    undisturbed, adapter = reference("four")
    # The CPU stands for a device whose memory is another than the host's.
    monkeypatch.setattr(placement, "Placement", partial(placement.Placement, separate_host=True))
    monkeypatch.setattr(ExpertTrainer, "why_indivisible", lambda *_: "the bytes are to be compared")
    scarce = Scarce(NO_SEQUENCE, backward=True, first_layer=4 + 1).install(monkeypatch)  # in step 2
    moved: list[str] = []

    def too_large(tokens: int) -> bool:
        held = placement.placement_of(scarce.trainer.model)
        assert held is not None
        moved[:] = [place for place in held.locations.values() if place == "host"]
        return len(moved) < 2

    monkeypatch.setattr(scarce, "too_large", too_large)
    recovered = run(values, tmp_path / "recovered")
    assert len(moved) == 2
    assert [(change["step"], change["setting"]) for change in recovered["train"]["recoveries"]] == [
        (2, {"demoted": 1}),
        (2, {"demoted": 1}),
    ]
    assert recovered["train"]["loss"] == undisturbed["train"]["loss"]
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_optimizer_states_are_allocated_before_the_first_step_and_again_once_experts_are_offloaded(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 2}
    _, adapter = reference("two whole")
    offloads(monkeypatch, "experts of layer 0 are offloaded")
    steps, real = [], oom.allocate_states

    def allocate(optimizer: Any) -> None:
        steps.append(len(optimizer.state))
        if len(steps) < 3:
            raise out_of_memory()
        real(optimizer)
        steps.append(len(optimizer.state))

    monkeypatch.setattr(oom, "allocate_states", allocate)
    record = run(values, tmp_path / "run")
    changes = record["train"]["recoveries"]
    assert [(change["step"], change["during"], change["setting"]) for change in changes] == [
        (1, "optimizer", {}),
        (1, "optimizer", {"demoted": 1}),
    ]
    assert steps[:3] == [0, 0, 0]
    assert steps[3] > 0
    assert adapter_bytes(tmp_path / "run") == adapter


class FailingUpdate:
    """AdamW's arithmetic, which fails once after half of a group's parameters; it is called for two groups a step."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0
        self.real = ADAM.adam

    def __call__(self, parameters: list[Any], *lists: Any, **settings: Any) -> None:
        self.calls += 1
        if self.calls != self.at:
            return self.real(parameters, *lists, **settings)
        half = len(parameters) // 2
        halved = [entry[:half] if isinstance(entry, list) else entry for entry in lists]
        self.real(parameters[:half], *halved, **settings)
        raise out_of_memory()


def test_update_out_of_memory_stops_the_run_which_resumes_to_the_adapter_of_the_undisturbed_one(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4}
    _, adapter = reference("four")
    monkeypatch.setattr(ADAM, "adam", FailingUpdate(at=6))
    with pytest.raises(DoesNotFitError, match=r"step 3 .*the adapter is not saved: .*checkpoint-2\. "):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    run(values, tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter
