"""The processes of a run. A run is one process on one device today: several are refused before anything is written."""

import os
import sys
from dataclasses import dataclass

from expertune.errors import ConfigError

# The variables in which launchers give the number of processes: torchrun and accelerate, MPICH and Intel MPI, Open MPI,
# MVAPICH. accelerate reads the same. What a batch system has allocated (SLURM_NTASKS) is no such number: a job script
# of four tasks may start one process. Processes that do start on one run directory meet its lock.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Ranks:
    """Which of a run's processes this is, and how many there are."""

    rank: int = 0
    world_size: int = 1


def require_one_process() -> Ranks:
    """Refuse to be one of several processes. Imports no heavy library.

    Returns:
        Rank 0 of 1.

    Raises:
        ConfigError: a launcher has started several, or they have found each other through torch.distributed; names the
            variable, and says what to do.
    """
    for name in _COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            _refuse(f"{name}={count}: a launcher (torchrun, accelerate launch, mpirun) has started {count} processes")
    for name in _PLUGINS:
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            _refuse(f"{name} is set: a launcher asks for a model that is spread over processes")
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        if count > 1:
            _refuse(f"this is one of {count} processes of a torch.distributed group")
    return Ranks()


def _refuse(found: str) -> None:
    raise ConfigError(
        f"{found}, but Expertune works in one process on one device: several would all write the same folder. Start "
        "the command by itself, without a launcher (expertune train RUN.yaml); CUDA_VISIBLE_DEVICES chooses its GPU"
    )
