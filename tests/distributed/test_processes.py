"""One process on one device: several are refused on every rank, before anything is written; of two GPUs one is used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import expertune
from expertune.cli import app
from expertune.config import check_training_arguments, parse_config
from expertune.distributed.processes import require_one_process
from expertune.errors import ConfigError
from expertune.placement.device import training_device
from expertune.train.arguments import training_arguments
from tests.train.conftest import nine_steps, rows_file, run_file, run_values, small_mixtral

__all__ = ["rows_file", "run_file", "run_values", "small_mixtral"]  # fixtures

TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SEVERAL = {
    "torchrun, rank 0": TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"},
    "torchrun, rank 1": TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "accelerate launch --use_deepspeed": {"WORLD_SIZE": "1", "ACCELERATE_USE_DEEPSPEED": "true"},
}
ONE = {
    "no launcher": {},
    "torchrun --nproc-per-node 1": TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"},
    "a job of four tasks that starts one": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "2"},
    "a variable that is no number": {"WORLD_SIZE": ""},
}


@pytest.mark.parametrize("launcher", SEVERAL)
@pytest.mark.parametrize("command", ["train", "quantize"])
def test_one_of_several_processes_is_refused_before_anything_is_written(
    command: str,
    launcher: str,
    run_values: dict[str, Any],
    run_file: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in SEVERAL[launcher].items():
        monkeypatch.setenv(name, value)
    path = run_file(run_values)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", str(path)] if command == "train" else ["quantize", run_values["model"], str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        app(arguments, prog_name="expertune")
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "in one process on one device" in told
    assert "Start the command by itself, without a launcher" in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("launcher", ONE)
def test_one_process_is_not_refused_whatever_started_it(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONE[launcher].items():
        monkeypatch.setenv(name, value)
    require_one_process()


def test_run_of_one_process_under_torchrun_trains(
    small_mixtral: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ONE["torchrun --nproc-per-node 1"] | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    values = nine_steps(small_mixtral, rows_file, tmp_path / "run")
    values["training"] |= {"max_steps": 1, "eval_strategy": "no"}
    try:
        assert expertune.finetune(parse_config(values)).record["train"]["steps"] == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_process_of_a_group_that_was_made_in_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="one of 2 processes"):
        require_one_process()


def test_of_two_gpus_that_a_process_sees_a_run_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args, _ = training_arguments({"per_device_train_batch_size": 3}, str(tmp_path), torch.device("cuda", 0))
    assert args.n_gpu == 1
    assert (args.train_batch_size, args.eval_batch_size) == (3, 8)


def test_current_gpu_that_is_not_the_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        training_device()


@pytest.mark.parametrize("key", ["fsdp", "deepspeed"])
def test_settings_for_several_devices_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{key} is for several devices"):
        check_training_arguments({key: "full_shard"})
    check_training_arguments({key: None})
