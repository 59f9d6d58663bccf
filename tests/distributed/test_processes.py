"""What a launcher has started: one process, several, or what is refused before anything is written."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import expertune
from expertune.cli import app
from expertune.config import check_training_arguments, parse_config
from expertune.distributed.mesh import Ranks, open_ranks
from expertune.distributed.output import is_of_a_connection
from expertune.distributed.processes import Launch, launched, require_one_process
from expertune.errors import ConfigError
from expertune.placement.device import training_device
from expertune.train.arguments import training_arguments
from tests.train.conftest import nine_steps, rows_file, run_file, run_values, small_mixtral

__all__ = ["rows_file", "run_file", "run_values", "small_mixtral"]  # fixtures

TORCHRUN = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1", "LOCAL_RANK": "1"}
REFUSED = {
    "RANK alone": ({"RANK": "0"}, "without WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, "without RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT"),
    "an empty address": (TORCHRUN | {"MASTER_ADDR": ""}, "without MASTER_ADDR. Start the command by torchrun"),
    "no number": (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
    "a rank too high": (TORCHRUN | {"RANK": "2"}, "RANK=2: ranks count from 0"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2: a launcher"),
    "accelerate launch --use_deepspeed": (TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
    "accelerate launch --use_fsdp": ({"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP is set"),
}
REFUSED |= {
    f"no {name}": ({key: value for key, value in TORCHRUN.items() if key != name}, f"without {name}. Start the command")
    for name in TORCHRUN
}
ONE = {
    "no launcher": {},
    "torchrun --nproc-per-node 1": TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    "a job of four tasks that starts one": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "2"},
    "a variable that is empty": {"WORLD_SIZE": ""},
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def use(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize("launcher", REFUSED)
def test_launcher_that_is_half_set_or_asks_for_something_else_is_refused_before_anything_is_written(
    launcher: str,
    run_values: dict[str, Any],
    run_file: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    environment: Callable[[dict[str, str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables, words = REFUSED[launcher]
    environment(variables)
    path = run_file(run_values)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        app(["train", str(path)], prog_name="expertune")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("error:") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_quantize_is_refused_to_be_one_of_several(
    small_mixtral: Path,
    tmp_path: Path,
    environment: Callable[[dict[str, str]], None],
) -> None:
    environment(TORCHRUN)
    with pytest.raises(ConfigError, match="one of 2 processes"):
        expertune.quantize(small_mixtral, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "why"), [(0, "EADDRINUSE"), (1, "no answer after 0.1 seconds")])
def test_port_at_which_another_program_listens_is_refused(
    rank: int, why: str, environment: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertune.distributed.output._LOOK_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        environment(TORCHRUN | {"RANK": str(rank), "MASTER_PORT": str(other.getsockname()[1])})
        with pytest.raises(ConfigError, match=f"MASTER_ADDR and MASTER_PORT: .*{why}"), open_ranks(0.1):
            pass
    for thread in threading.enumerate():
        if thread.name == "rendezvous":  # torch says something when the other program has ended
            thread.join()


@pytest.mark.parametrize(
    "words",
    [
        "[pair.cc:553] Connection closed by peer [127.0.0.1]:7902",
        "[unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "NCCL communicator was aborted on rank 1",
    ],
)
def test_error_of_a_collective_is_told_from_others(words: str) -> None:
    assert is_of_a_connection(RuntimeError(words))
    assert not is_of_a_connection(ConfigError(words))
    assert not is_of_a_connection(RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"))


@pytest.mark.parametrize("launcher", ONE)
def test_one_process_is_one_whatever_started_it(launcher: str, environment: Callable[[dict[str, str]], None]) -> None:
    environment(ONE[launcher])
    require_one_process()
    assert launched() == Launch()
    with open_ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.writes) == (0, 1, True)
        assert not torch.distributed.is_initialized()


def test_of_one_process_every_exchange_is_the_identity() -> None:
    ranks, tensor = Ranks(), torch.arange(3.0)
    ranks.average([tensor])
    ranks.copy([tensor])
    ranks.wait()
    ranks.require_same({"anything": object()})
    assert tensor.tolist() == [0, 1, 2]
    assert ranks.gather("own") == ["own"]
    assert ranks.total([1, 2.5]) == [1, 2.5]
    assert (ranks.any(True), ranks.any(False)) == (True, False)
    assert ranks.spread([1, 2, 3], lambda items: [str(item) for item in items]) == ["1", "2", "3"]


def test_run_of_one_process_under_torchrun_trains(
    small_mixtral: Path, rows_file: Path, tmp_path: Path, environment: Callable[[dict[str, str]], None]
) -> None:
    environment(ONE["torchrun --nproc-per-node 1"])
    values = nine_steps(small_mixtral, rows_file, tmp_path / "run")
    values["training"] |= {"max_steps": 1, "eval_strategy": "no"}
    try:
        assert expertune.finetune(parse_config(values)).record["train"]["steps"] == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_group_that_the_environment_does_not_know_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="one of 2 processes"):
        require_one_process()
    with pytest.raises(ConfigError, match="one of 2 processes"), open_ranks():
        pass


def test_without_a_launcher_the_key_has_no_effect_and_unknown_modes_are_refused() -> None:
    values = {"model": "m", "data": {"train": "t"}, "output_dir": "o"}
    for mode in ("auto", "replicate", "shard", "parallel"):
        assert parse_config(values | {"distributed": {"experts": mode}}).distributed.experts == mode
    with pytest.raises(ConfigError, match=r"distributed\.experts: has to be auto, replicate, shard or parallel"):
        parse_config(values | {"distributed": {"experts": "scatter"}})


def test_of_two_gpus_that_a_process_sees_a_run_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args, _ = training_arguments({"per_device_train_batch_size": 3}, str(tmp_path), torch.device("cuda", 0))
    assert args.n_gpu == 1
    assert (args.train_batch_size, args.eval_batch_size) == (3, 8)


def test_current_gpu_that_is_not_the_first_is_refused_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        training_device()
    assert training_device(several=True) == torch.device("cuda", 1)


def test_gpus_that_do_not_reach_each_other_are_refused_until_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with pytest.raises(ConfigError, match="set NCCL_IB_DISABLE=1 in the environment"):
        training_device(several=True)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert training_device(several=True).type == "cuda"


@pytest.mark.parametrize("key", ["fsdp", "deepspeed"])
def test_settings_for_a_model_that_is_spread_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{key} is for a model that is spread"):
        check_training_arguments({key: "full_shard"})
    check_training_arguments({key: None})
