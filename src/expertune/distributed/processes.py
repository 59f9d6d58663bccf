"""A run is one process on one device: what was started as several is refused before anything is written."""

import os
import sys

from expertune.errors import ConfigError

# Where launchers say how many processes they have started: torchrun and accelerate, MPICH and Intel MPI, Open MPI,
# MVAPICH. The same that accelerate reads. What a batch system has allocated (SLURM_NTASKS) says nothing of it: a job
# script of four tasks may start one process. Processes that it does start on one folder meet the folder's lock.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def require_one_process() -> None:
    """Refuse to be one of several processes. Imports no heavy library.

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


def _refuse(found: str) -> None:
    raise ConfigError(
        f"{found}, but Expertune works in one process on one device: several would all write the same folder. Start "
        "the command by itself, without a launcher (expertune train RUN.yaml); CUDA_VISIBLE_DEVICES chooses its GPU"
    )
