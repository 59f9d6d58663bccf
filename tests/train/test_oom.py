"""A step that runs out of memory is run again with the next fallback; the run ends as if it had started with it."""

import copy
import importlib
import json
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from expertune import api
from expertune.errors import DoesNotFitError
from expertune.experts import module
from expertune.kernels import workspace
from expertune.kernels.routes import KernelSettings, settings_of
from expertune.placement import experts as placement
from expertune.run.record import RunRecord
from expertune.train import offload, oom
from expertune.train.oom import RandomState
from expertune.train.trainer import ExpertTrainer
from tests.processes import run_program
from tests.train.scarce import NO_SEQUENCE, ONE_SEQUENCE, SMALL, Reference, Scarce, adapter_bytes, out_of_memory, run

ADAM = importlib.import_module("torch.optim.adam")


@pytest.mark.parametrize(
    ("layer", "backward"),
    [(1, False), (2, True), (3, True), (4, False)],
    ids=["first forward", "first backward", "second backward", "second forward"],
)
def test_step_out_of_memory_ends_as_if_micro_batches_had_been_smaller_from_the_start(
    layer: int,
    backward: bool,
    values: dict[str, Any],
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values["training"] |= {"max_steps": 2}
    small, adapter = reference("two small", **SMALL)
    scarce = Scarce(ONE_SEQUENCE, backward, first_layer=layer).install(monkeypatch)
    recovered = run(values, tmp_path / "recovered")

    # Dropout included: the random state of the step's start was restored.
    assert scarce.num_failures == 1
    assert scarce.most_seen <= 2 * ONE_SEQUENCE
    assert adapter_bytes(tmp_path / "recovered") == adapter
    assert recovered["train"]["loss"] == small["train"]["loss"]
    assert recovered["eval"]["loss"] == small["eval"]["loss"]
    assert recovered["throughput"]["tokens"] == small["throughput"]["tokens"]
    (change,) = recovered["train"]["recoveries"]
    assert (change["step"], change["during"]) == (1, "training")
    assert change["error"] == "Tried to allocate 2.00 GiB"
    assert change["change"].startswith("micro-batches of at most ")
    assert small["train"]["recoveries"] == []


@pytest.mark.parametrize("packing", ["padding-free", "packed", "padded"])
def test_run_that_recovers_midway_gives_the_adapter_of_the_undisturbed_one_to_rounding(
    packing: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["lora"]["dropout"] = 0.0
    values["data"]["packing"] = packing
    values["training"] |= {"max_steps": 3, "eval_strategy": "no"}
    undisturbed = run(values, tmp_path / "undisturbed")
    # Step 1 goes through whole; step 2 fails in its second micro-batch.
    scarce = Scarce(32 if packing == "packed" else 64 if packing == "padded" else ONE_SEQUENCE, first_layer=7)
    scarce.install(monkeypatch)
    recovered = run(values, tmp_path / "recovered")

    assert scarce.num_failures >= 1
    assert {change["step"] for change in recovered["train"]["recoveries"]} == {2}
    assert recovered["train"]["steps"] == 3
    assert [step for step, _ in recovered["train"]["loss"]] == [1, 2, 3]
    assert recovered["train"]["loss"][:1] == undisturbed["train"]["loss"][:1]
    for (_, loss), (_, expected) in zip(recovered["train"]["loss"], undisturbed["train"]["loss"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
    assert recovered["throughput"]["tokens"] == undisturbed["throughput"]["tokens"]
    ours, theirs = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("recovered", "undisturbed")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-6)


def test_running_loss_of_transformers_counts_a_step_that_was_run_again_once(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 3, "eval_strategy": "no"}
    kept: dict[str, Any] = {}
    scarce = Scarce(ONE_SEQUENCE, first_layer=3).install(monkeypatch)

    class Watched(api.ExpertTrainer):  # type: ignore[name-defined, misc]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            output = super().train(*args, **kwargs)
            kept["train_loss"] = output.training_loss
            return output

    monkeypatch.setattr(api, "ExpertTrainer", Watched)
    record = run(values, tmp_path / "run")
    assert scarce.num_failures == 1
    losses = [loss for _, loss in record["train"]["loss"]]
    assert kept["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_micro_batches_are_halved_again_until_they_fit(
    values: dict[str, Any],
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values["training"] |= {"max_steps": 2, "save_steps": 2, "eval_strategy": "no"}
    wide = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    _, adapter = reference("two small", **SMALL)
    scarce = Scarce(ONE_SEQUENCE).install(monkeypatch)
    recovered = run(values, tmp_path / "recovered", training=wide)
    assert scarce.num_failures == 2
    first, second = (change["setting"]["micro_batch_tokens"] for change in recovered["train"]["recoveries"])
    assert first > ONE_SEQUENCE >= second
    assert adapter_bytes(tmp_path / "recovered") == adapter


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_failed_attempt_has_left_nothing_when_the_step_is_run_again(
    backward: bool, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 1, "save_steps": 1, "eval_strategy": "no"}
    scarce = Scarce(ONE_SEQUENCE, backward).install(monkeypatch)
    of_failed_attempt: list[StorageWeakRef] = []
    left: list[int] = []
    real = module.expert_mlp

    def watched(hidden: torch.Tensor, *arguments: Any, **kwargs: Any) -> Any:
        if scarce.trainer is not None and torch.is_grad_enabled():
            if not scarce.num_failures:
                workspace.take("held over", 2**16)
                cycle: list[Any] = [hidden]
                cycle.append(cycle)
                of_failed_attempt.append(StorageWeakRef(hidden.untyped_storage()))
            elif not left:
                left.append(sum(not storage.expired() for storage in of_failed_attempt))
                assert "held over" not in vars(workspace._local)
        return real(hidden, *arguments, **kwargs)

    monkeypatch.setattr(module, "expert_mlp", watched)
    run(values, tmp_path / "run")
    assert scarce.num_failures == 1
    assert len(of_failed_attempt) >= 1
    assert left == [0]


@pytest.fixture
def changed_in_step_4(
    values: dict[str, Any], references: dict[str, tuple[RunRecord, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunRecord, bytes, Path]:
    """A whole run whose micro-batches become smaller in step 4; run once."""
    if "changed" not in references:
        folder = tmp_path_factory.mktemp("changed") / "run"
        with pytest.MonkeyPatch.context() as patch:
            Scarce(ONE_SEQUENCE, first_layer=4 * 3 + 1).install(patch)
            references["changed"] = (run(copy.deepcopy(values), folder), adapter_bytes(folder))
    record, adapter = references["changed"]
    assert [change["step"] for change in record["train"]["recoveries"]] == [4]
    return record, adapter, Path(record["config"]["output_dir"])


@pytest.mark.parametrize(
    ("checkpoint", "layers_before", "scarce_again"),
    [(2, 4, True), (2, 4, False), (4, 0, False)],
    ids=["a step before, as scarce", "a step before, plenty", "at that step, plenty"],
)
def test_resumed_run_changes_at_the_step_where_the_interrupted_one_did(
    checkpoint: int,
    layers_before: int,
    scarce_again: bool,
    values: dict[str, Any],
    changed_in_step_4: tuple[RunRecord, bytes, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, adapter, folder = changed_in_step_4
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for later in range(checkpoint + 2, 7, 2):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    scarce = Scarce(ONE_SEQUENCE, first_layer=layers_before + 1)
    if scarce_again:
        scarce.install(monkeypatch)
    resumed = run(values, tmp_path / "run", resume=True)
    assert scarce.num_failures == 0
    assert adapter_bytes(tmp_path / "run") == adapter
    assert resumed["train"]["loss"] == whole["train"]["loss"]
    assert resumed["train"]["recoveries"] == whole["train"]["recoveries"]


def test_run_killed_after_a_change_has_printed_it_and_resumes_to_the_identical_adapter(
    values: dict[str, Any], changed_in_step_4: tuple[RunRecord, bytes, Path], tmp_path: Path
) -> None:
    _, adapter, _ = changed_in_step_4
    program = f"""
import os, pytest, signal
from expertune import finetune
from expertune.config import parse_config
from expertune.train.callbacks import History
from tests.train.scarce import Scarce

def die(self, args, state, control, **kwargs):
    if state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    Scarce({ONE_SEQUENCE}, first_layer={4 * 3 + 1}).install(pytest.MonkeyPatch())
    History.on_pre_optimizer_step = die
    finetune(parse_config({values | {"output_dir": str(tmp_path / "killed")}!r}))
"""
    ended = run_program(program)
    assert ended.status == -signal.SIGKILL, ended.err
    assert [change["step"] for change in RunRecord.load(tmp_path / "killed")["train"]["recoveries"]] == [4]
    assert "step 4 ran out of memory (Tried to allocate 2.00 GiB); from here on micro-batches of at most" in ended.err
    run(values, tmp_path / "killed", resume=True)
    assert adapter_bytes(tmp_path / "killed") == adapter


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


def test_run_stopped_for_memory_resumes_where_there_is_more(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        Scarce(NO_SEQUENCE, first_layer=4 * 2 + 1).install(patch)  # in step 3
        with pytest.raises(DoesNotFitError):
            run(values, tmp_path / "run")
    resumed = run(values, tmp_path / "run", resume=True)
    assert [step for step, _ in resumed["train"]["loss"]] == [1, 2, 3, 4]
    assert resumed["run"]["status"] == "finished"
    assert adapter_bytes(tmp_path / "run")


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


def test_memory_that_runs_out_where_nothing_is_run_again_ends_in_one_clear_error(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clip(trainer: ExpertTrainer, model: Any) -> float:
        if trainer.state.global_step == 2:
            raise out_of_memory()
        return 1.0

    monkeypatch.setattr(ExpertTrainer, "_clip_grad_norm", clip)
    with pytest.raises(DoesNotFitError, match=r"step 3 ran out of memory where nothing is run again.*checkpoint-2\. "):
        run(values, tmp_path / "run")
    assert RunRecord.load(tmp_path / "run")["run"]["status"] == "stopped"


def test_other_errors_of_a_step_are_not_taken_for_memory(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(ONE_SEQUENCE, error=lambda: RuntimeError("a bug")).install(monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        run(values, tmp_path / "run")


LIMITED = """
import json, resource, sys
from expertune import api, finetune
from expertune.config import parse_config

class Trainer(api.ExpertTrainer):
    def train(self, *args, **kwargs):
        with open("/proc/self/status") as file:
            held = int(next(line for line in file if line.startswith("VmData")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
        return super().train(*args, **kwargs)

if __name__ == "__main__":
    api.ExpertTrainer = Trainer
    finetune(parse_config(json.loads(sys.argv[1])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds anonymous memory on Linux only")
def test_run_under_a_limit_of_the_system_finishes(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{row}:", "completion": " ".join(f"word{(7 * row + word) % 50}" for word in range(400))}
        for row in range(16)
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    values["lora"]["dropout"] = 0.0
    values["data"] = {"train": str(tmp_path / "long.jsonl"), "max_length": 512}
    # Eight rows of 512 tokens take 130 MB in a step, two take a third of it.
    training = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "save_steps": 2}
    limited = values | {"training": training, "output_dir": str(tmp_path / "limited")}
    ended = run_program(LIMITED, json.dumps(limited), str(70 * 10**6))
    assert ended.status == 0, ended.err
    record = RunRecord.load(tmp_path / "limited")
    changes = record["train"]["recoveries"]
    assert changes
    assert "can't allocate memory" in changes[0]["error"]
    assert "micro_batch_tokens" in changes[0]["setting"]

    plenty = run(limited, tmp_path / "plenty")
    assert [step for step, _ in record["train"]["loss"]] == [1, 2]
    for (_, loss), (_, expected) in zip(record["train"]["loss"], plenty["train"]["loss"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


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


def test_resumed_run_repeats_the_changes_of_a_record_of_an_earlier_release(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4, "eval_strategy": "no"}
    run(values, tmp_path / "run")
    before = adapter_bytes(tmp_path / "run")
    record = RunRecord.load(tmp_path / "run")
    earlier: list[dict[str, Any]] = [
        {"step": 0, "during": "proof", "error": "e", "change": "less", "setting": {"proof_tokens": 16}},
        {"step": 2, "during": "clipping", "error": "e", "change": "memory that nothing uses has been given back"},
        {"step": 3, "during": "training", "error": "e", "change": "less", "setting": {"working_set_bytes": 2**27}},
    ]
    record.update("train", recoveries=earlier)
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    changed: list[KernelSettings] = []
    monkeypatch.setattr(oom, "settings_of", lambda model: changed.append(settings_of(model)) or changed[-1])
    resumed = run(values, tmp_path / "run", resume=True)
    assert [settings.working_set_bytes for settings in changed] == [2**27]
    earlier[0] |= {"during": "preflight", "setting": {"preflight_tokens": 16}}
    assert resumed["train"]["recoveries"] == earlier
    assert adapter_bytes(tmp_path / "run") == before


def test_random_state_draws_again_what_was_drawn() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    state = RandomState()
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first
