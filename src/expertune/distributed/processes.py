"""The processes of a run, as a launcher's environment has them. Imports no heavy library."""

import os
import sys
from dataclasses import dataclass

from expertune.errors import ConfigError

# What torchrun sets for each process, and `accelerate launch`, which is torchrun. What a batch system has allocated
# (SLURM_NTASKS) is no such number: a job script of four tasks may start one process.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# The variables in which other launchers give the number of processes: MPICH and Intel MPI, Open MPI, MVAPICH.
_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Launch:
    """Which of a run's processes this is, and how many there are.

    Attributes:
        rank: its number in the run.
        world_size: how many there are.
        local_rank: its number on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def launched() -> Launch:
    """What a launcher has started; rank 0 of 1 without one.

    Raises:
        ConfigError: torchrun's variables are half set or no numbers, or a launcher asks for what a run does not do;
            names the variable, and says what to do.
    """
    for name in _PLUGINS:
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"{name} is set: a launcher asks for a model that is spread over processes, and Expertune replicates "
                "it. Start the command by torchrun, or by `accelerate launch` without FSDP, DeepSpeed and Megatron"
            )
    held = {name: os.environ[name] for name in _TORCHRUN if os.environ.get(name)}
    if "WORLD_SIZE" not in held and "RANK" not in held:
        _refuse_other_launchers()
        return Launch()
    if held.get("WORLD_SIZE") == "1":
        return Launch()
    if missing := [name for name in _TORCHRUN if name not in held]:
        raise ConfigError(
            f"{', '.join(f'{name}={value}' for name, value in held.items())}: one of several processes, but without "
            f"{' and '.join(missing)}. Start the command by torchrun, which sets all of {', '.join(_TORCHRUN)}; or set "
            "none of them to run in one process"
        )
    rank, world_size, local_rank = (_number(name, held[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= world_size:
        raise ConfigError(f"RANK={rank}: ranks count from 0, and WORLD_SIZE={world_size} processes have none so high")
    return Launch(rank, world_size, local_rank)


def require_one_process() -> None:
    """Refuse to be one of several processes.

    Raises:
        ConfigError: a launcher has started several, or they have found each other through torch.distributed.
    """
    count = launched().world_size
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        count = max(count, distributed.get_world_size())
    if count > 1:
        raise ConfigError(
            f"this is one of {count} processes, and this command works in one: several would all do the same. Start it "
            "by itself, without a launcher"
        )


def _refuse_other_launchers() -> None:
    for name in _COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{name}={count}: a launcher has started {count} processes that do not know of each other: several "
                f"would all write the same folder. Start them by torchrun, or set {', '.join(_TORCHRUN)} for each"
            )


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} is no number; start the command by torchrun, which sets it")
    return int(value)
