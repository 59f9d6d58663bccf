"""What a run is planned for: the device that is here, or a GPU by name, with its memory and how fast it is."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from expertune.config import RunConfig, parse_size
from expertune.distributed.processes import launched
from expertune.errors import ConfigError, naming, option
from expertune.gpus import (
    ETHERNET_100,
    ETHERNET_400,
    NETWORKS,
    PCIE,
    Device,
    Link,
    Rates,
    device_of_this_name,
    find_device,
)
from expertune.kernels.amounts import BFLOAT16, DTYPES, FLOAT32, Dtype
from expertune.kernels.cpu_rates import ProductRate, cpu_rates, integer_rate
from expertune.kernels.limits import available_memory
from expertune.kernels.processor import INTEGERS, processor
from expertune.placement.presence import may_have_gpu
from expertune.planning.communication import compared_links

if TYPE_CHECKING:
    import torch

# Read from a disk, where layers are offloaded there: an assumption, an NVMe drive by itself reads faster.
DISK_BYTES_PER_SECOND = 1.0e9

_DEVICES_OF_A_MACHINE = 8

# More than any machine has, and few enough to be counted.
_MOST_DEVICES = 65_536


@dataclass(frozen=True)
class Machine:
    """What is planned for.

    Attributes:
        device: `cpu`, or `cuda` with or without a number.
        gpu: the GPU that was asked for by name.
        is_here: whether it is this machine.
        compute_dtype: dtype of the GEMMs.
        budget_bytes: memory that a run may use.
        host_bytes: of the host's memory, what is free for each of the processes on it; infinite where it is not known.
        world_size: processes of the run, each with such a device.
        local_size: as many of them are on one machine.
        share_of_cpu: what each of them has of this machine's cores, where they are only planned for.
        integers: how fast all of this machine's cores multiply 4-bit weights in integers; None where products are in
            floats.
    """

    device: str
    gpu: Device | None
    is_here: bool
    compute_dtype: Dtype
    budget_bytes: int
    host_bytes: float = math.inf
    world_size: int = 1
    local_size: int = 1
    share_of_cpu: float = 1.0
    integers: ProductRate | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        device: "str | torch.device | None" = None,
        gpu: str | None = None,
        memory: str | int | None = None,
        devices: int | None = None,
        local_size: int | None = None,
    ) -> "Machine":
        """What a run is planned for.

        Args:
            config: the run.
            device: see `make_plan`.
            gpu: see `make_plan`.
            memory: see `make_plan`.
            devices: as many of it, each with a process; None means the processes that a launcher has started.
            local_size: as many of the processes are on this machine; None means all, up to eight.

        Raises:
            ConfigError: an unknown GPU, no device at all, or no way to know the memory.
        """
        if devices is not None and not 1 <= devices <= _MOST_DEVICES:
            raise ConfigError(f"devices is {devices}: a run can be planned for 1 to {_MOST_DEVICES:,}")
        named = find_device(gpu) if gpu is not None else None
        target = "cuda" if named else _own_device() if device is None else _name_of(device)
        on_cpu = target == "cpu"
        is_here = named is None and (on_cpu or _has_gpu())
        # A size that was asked for comes first, and that of the run file before this machine's, not before a GPU's.
        asked = memory if memory is not None or named else config.memory_budget
        budget = _memory_of(target, named) if asked is None else _memory_asked(asked)
        if asked is None and on_cpu:
            budget //= local_size or devices or 1  # processes on one machine share its memory
        dtype = config.quantization.compute_dtype
        if dtype == "auto" and not is_here:
            # Every NVIDIA generation since 2020 has bfloat16.
            dtype = "bfloat16" if named is None or named.has_bfloat16 else "float16"
        world_size = launched().world_size if devices is None else devices
        local_size = local_size or min(world_size, _DEVICES_OF_A_MACHINE)
        host = available_memory() // local_size if is_here else math.inf
        compute_dtype = DTYPES[dtype] if dtype != "auto" else _usual_dtype(target)
        share_of_cpu = 1 if devices is None else 1 / local_size  # a launcher has given each its threads
        in_integers = on_cpu and config.kernels.route != "dequant_gemm" and processor().may_take_integers(compute_dtype)
        rate = integer_rate(processor().threads) if in_integers else None
        return cls(target, named, is_here, compute_dtype, budget, host, world_size, local_size, share_of_cpu, rate)

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.partition(":")[0]

    @property
    def products_in(self) -> str:
        """What 4-bit weights are multiplied in, in the words of a run's `kernels:` line."""
        if self.kind != "cpu":
            return self.compute_dtype.name
        return processor().gemm_dtype(self.compute_dtype).name if self.integers is None else INTEGERS

    def rates(self, from_disk: bool) -> Rates | None:
        """What the device does in a second: by the table, or measured on a CPU; None where nothing is known."""
        if self.kind == "cpu":
            here, share = processor(), self.share_of_cpu
            measured, integers = cpu_rates(here.gemm_dtype(self.compute_dtype), here.threads), self.integers
            return Rates(
                "measured",
                share * measured.flops_per_second,
                share * measured.bytes_per_second,
                share * DISK_BYTES_PER_SECOND,
                measured.was_busy or (integers is not None and integers.was_busy),
                None if integers is None else share * integers.flops_per_second,
            )
        gpu = self._known_gpu
        if gpu is None or gpu.rates is None or self.compute_dtype == FLOAT32:
            return None  # the table has rates of 16-bit products alone, and those in float32 do not round to TF32
        if not from_disk:
            return gpu.rates
        link = min(gpu.rates.link_bytes_per_second, DISK_BYTES_PER_SECOND)
        return replace(gpu.rates, link_bytes_per_second=link)

    @property
    def link(self) -> Link:
        """What connects the processes, as is usual: a network where one machine has not all of them, and for CPUs."""
        if self.kind == "cpu":
            return ETHERNET_100
        gpu = self._known_gpu
        inside = gpu.link if gpu else PCIE
        if self.world_size > self.local_size:
            return ETHERNET_100 if inside == PCIE else ETHERNET_400
        return inside

    @property
    def compared_links(self) -> tuple[Link, ...]:
        """The links that times are shown for."""
        return NETWORKS if self.kind == "cpu" else compared_links(self.link)

    @property
    def _known_gpu(self) -> Device | None:
        """The GPU of the table that is planned for, or that is here."""
        if self.gpu is None and self.is_here and self.kind == "cuda":
            import torch

            return device_of_this_name(torch.cuda.get_device_name(torch.device(self.device)))
        return self.gpu


def _own_device() -> str:
    """What a run here takes; torch is asked only where there may be a GPU."""
    if not may_have_gpu():
        return "cpu"
    from expertune.placement.device import default_device

    return str(default_device())


def _name_of(device: "str | torch.device") -> str:
    import torch

    given = torch.device(device)
    return "cpu" if given.type == "cpu" else str(given)


def _has_gpu() -> bool:
    if not may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


def _usual_dtype(device: str) -> Dtype:
    """What `auto` means on a device of this machine; see `resolve_compute_dtype`."""
    if device == "cpu":
        return processor().gemm_dtype(BFLOAT16)
    import torch

    from expertune.placement.device import resolve_compute_dtype

    return DTYPES[str(resolve_compute_dtype("auto", torch.device(device))).removeprefix("torch.")]


def _memory_asked(size: str | int) -> int:
    """Bytes of the argument `memory`; the run file has read its `memory_budget` already."""
    with naming("memory"):
        return parse_size(size)


def _memory_of(device: str, gpu: Device | None) -> int:
    """What a GPU of the table has, or what this machine's device does."""
    if gpu is not None:
        if not gpu.memory_bytes:
            raise ConfigError(f"gpu {gpu.name}: say how much memory it has, e.g. {option('memory', '24GB')}")
        return gpu.memory_bytes
    if device == "cpu":
        return available_memory()
    if not _has_gpu():
        raise ConfigError("there is no CUDA device here to take the memory of; set memory_budget, e.g. 24GB")
    import torch

    # What others hold is not there for a run; what this process has allocated once and uses no more is.
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return free + torch.cuda.memory_reserved(torch.device(device)) - torch.cuda.memory_allocated(torch.device(device))
