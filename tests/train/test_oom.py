"""A step that runs out of memory is run again with smaller micro-batches; the run ends as if it had begun with them."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from expertune.errors import DoesNotFitError
from expertune.experts import module
from expertune.kernels import workspace
from expertune.run import training
from expertune.run.record import RunRecord
from expertune.train.callbacks import RandomState
from expertune.train.trainer import ExpertTrainer
from tests.processes import run_program
from tests.train.scarce import ONE_SEQUENCE, SMALL, Reference, Scarce, adapter_bytes, out_of_memory, run


@pytest.mark.parametrize(
    ("layer", "backward"),
    [
        pytest.param(1, False, id="first forward", marks=pytest.mark.slow),
        pytest.param(2, True, id="first backward"),
        pytest.param(3, True, id="second backward", marks=pytest.mark.slow),
        pytest.param(4, False, id="second forward"),
    ],
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


# All other runs here are padding-free, and so is a step of packed examples.
@pytest.mark.parametrize(
    "packing", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("padding-free", "packed")), "padded"]
)
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

    class Watched(training.ExpertTrainer):  # type: ignore[name-defined, misc]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            output = super().train(*args, **kwargs)
            kept["train_loss"] = output.training_loss
            return output

    monkeypatch.setattr(training, "ExpertTrainer", Watched)
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
                assert "held over" not in workspace.of_this_thread()
        return real(hidden, *arguments, **kwargs)

    monkeypatch.setattr(module, "expert_mlp", watched)
    run(values, tmp_path / "run")
    assert scarce.num_failures == 1
    assert len(of_failed_attempt) >= 1
    assert left == [0]


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
from expertune import finetune
from expertune.run import training
from expertune.config import parse_config

class Trainer(training.ExpertTrainer):
    def train(self, *args, **kwargs):
        with open("/proc/self/status") as file:
            held = int(next(line for line in file if line.startswith("VmData")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
        return super().train(*args, **kwargs)

if __name__ == "__main__":
    training.ExpertTrainer = Trainer
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


def test_random_state_draws_again_what_was_drawn() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    state = RandomState()
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first
