"""Micro-batches that run as one give the steps that accumulating them gives."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertune import finetune, make_plan
from expertune.config import parse_config
from expertune.run.record import RunRecord

ROUNDING = 1e-6  # of float32 sums over a step, taken in another order
# What AdamW makes of it where a gradient is nearly zero: a hundredth of one of its steps, which are the learning rate.
ADAMW_ROUNDING = 1e-5


def two_epochs(run_values: dict[str, Any], data: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """Eighteen rows by four: five steps an epoch, the last of two rows; no dropout, whose masks differ by chance."""
    section = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    data = run_values["data"] | {"train": run_values["data"]["train"].replace("[0:20]", "[0:18]")} | (data or {})
    lora = run_values["lora"] | {"dropout": 0.0}
    return run_values | {"training": section | training, "lora": lora, "data": data}


def run_both(values: dict[str, Any], tmp_path: Path) -> dict[str, RunRecord]:
    """The same run with merged micro-batches and with separate ones."""
    records = {}
    for name, merge in (("merged", True), ("apart", False)):
        data = values["data"] | {"merge_accumulation": merge}
        config = parse_config(values | {"data": data, "output_dir": str(tmp_path / name)})
        records[name] = finetune(config).record
    assert records["merged"]["train"]["micro_batch"]["merged"] > 1, "otherwise nothing is compared"
    assert records["apart"]["train"]["micro_batch"]["merged"] == 1
    return records


def adapter(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def logs(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, gradient norm and learning rate of every log of the run."""
    last = max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [(log["step"], log["grad_norm"], log["learning_rate"]) for log in history if "grad_norm" in log]


def assert_same_run(records: dict[str, RunRecord], tmp_path: Path, atol: float = ADAMW_ROUNDING) -> None:
    merged, apart = records["merged"], records["apart"]
    for part in ("train", "eval"):
        assert len(merged[part]["loss"]) == len(apart[part]["loss"])
        for (step, loss), (expected_step, expected) in zip(merged[part]["loss"], apart[part]["loss"], strict=True):
            assert step == expected_step
            assert loss == pytest.approx(expected, rel=ROUNDING)
    assert merged["throughput"]["tokens"] == apart["throughput"]["tokens"]
    assert merged["train"]["steps"] == apart["train"]["steps"]
    ours, theirs = adapter(tmp_path / "merged"), adapter(tmp_path / "apart")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=lambda text, at=name: f"{at}: {text}")


def test_merged_micro_batches_give_the_steps_logs_checkpoints_and_adapter_of_separate_ones(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = two_epochs(run_values, max_grad_norm=0.5, weight_decay=0.1, eval_strategy="epoch", save_strategy="epoch")
    records = run_both(values, tmp_path)
    assert_same_run(records, tmp_path)
    assert records["merged"]["train"]["steps"] == 10
    assert records["merged"]["train"]["notes"] == ["4 examples a step, run as 1 x 4 in place of 4 x 1"]
    for name in ("merged", "apart"):
        assert {path.name for path in (tmp_path / name).glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10"}
    ours, theirs = logs(tmp_path / "merged"), logs(tmp_path / "apart")
    assert [log[0] for log in ours] == [2, 4, 6, 8, 10]
    for log, expected in zip(ours, theirs, strict=True):
        assert log == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("data", "training"),
    [
        # Plain descent moves the adapter by the gradients themselves.
        ({}, {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}),
        ({"packing": "packed"}, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
    ],
    ids=["gradients", "packed-and-smoothed"],
)
def test_merged_micro_batches_give_the_adapter_of_separate_ones(
    data: dict[str, Any], training: dict[str, Any], run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = two_epochs(run_values, {"eval": None} | data, save_strategy="no", **training | {"num_train_epochs": 1})
    assert_same_run(run_both(values, tmp_path), tmp_path, ROUNDING if "optim" in training else ADAMW_ROUNDING)


def test_resumed_run_merges_as_many_as_before_though_less_memory_is_left(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = run_values | {"data": run_values["data"] | {"eval": None}}
    values["training"] = values["training"] | {"max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    whole = finetune(parse_config(values | {"output_dir": str(tmp_path / "whole")})).record
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "adapter")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")

    # A run that begins would leave a tenth of this free, and merge none.
    scarce = {"output_dir": str(tmp_path / "resumed"), "memory_budget": whole["plan"]["memory"]["peak_bytes"] + 1}
    assert make_plan(parse_config(values | scarce)).micro_batch.merged == 1
    resumed = finetune(parse_config(values | scarce), resume=True).record

    assert resumed["train"]["micro_batch"] == whole["train"]["micro_batch"]
    assert resumed["train"]["micro_batch"]["merged"] == 2
    assert resumed["train"]["loss"] == whole["train"]["loss"]
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
