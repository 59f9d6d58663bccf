"""Devices that a run can be planned for without having them, and the one that is here: memory, and how fast it is.

Of a GPU's table, memory is what a process finds there, a few percent less than the name says. Rates are the vendors'
for dense products without sparsity, bfloat16 with sums in float32. The host link is PCI Express x16 in one direction at
what copies from pinned memory reach, about 0.8 of its nominal rate.
"""

import math
from dataclasses import dataclass, replace

import torch

from expertune.config import RunConfig, parse_size
from expertune.distributed.processes import launched
from expertune.errors import ConfigError, nearest, option
from expertune.kernels.cpu import gemm_dtype
from expertune.kernels.cpu_rates import cpu_rates
from expertune.kernels.limits import available_memory
from expertune.placement.device import default_device, resolve_compute_dtype
from expertune.planning.communication import (
    ETHERNET_100,
    ETHERNET_400,
    INFINITY_FABRIC,
    NETWORKS,
    NVLINK,
    NVLINK_3,
    NVLINK_5,
    PCIE,
    Link,
    compared_links,
)

# Name under which a GPU that is not in the table can be planned for, with a size of memory.
ANY_GPU = "cuda"

# Read from a disk, where layers are offloaded there: an assumption, an NVMe drive by itself reads faster.
DISK_BYTES_PER_SECOND = 1.0e9

_DEVICES_OF_A_MACHINE = 8

# More than any machine has, and few enough to be counted.
_MOST_DEVICES = 65_536
_WITHOUT_BFLOAT16 = ("t4",)
_LINKS = {
    "b200": NVLINK_5,
    "h200": NVLINK,
    "h100": NVLINK,
    "a100-80gb": NVLINK_3,
    "a100-40gb": NVLINK_3,
    "mi300x": INFINITY_FABRIC,
}

_PCIE = {3: 12e9, 4: 25e9, 5: 50e9}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        source: `measured` here, or `tabled`.
        flops_per_second: dense GEMMs.
        bytes_per_second: of the memory that GEMMs read.
        link_bytes_per_second: from where layers are offloaded to: the host link, or a disk.
    """

    source: str
    flops_per_second: float
    bytes_per_second: float
    link_bytes_per_second: float


@dataclass(frozen=True)
class Device:
    """A GPU by name.

    Attributes:
        name: as `--gpu` takes it.
        memory_bytes: what a process finds; 0 where nothing is known.
        rates: how fast it is, with its host link; None where nothing is known.
        has_bfloat16: whether it multiplies bfloat16; otherwise float16.
        link: what connects those of one machine in the usual server.
    """

    name: str
    memory_bytes: int = 0
    rates: Rates | None = None
    has_bfloat16: bool = True
    link: Link = PCIE


def _gpu(name: str, gib: float, gigabytes_per_second: float, teraflops: float, pcie: int) -> Device:
    rates = Rates("tabled", teraflops * 1e12, gigabytes_per_second * 1e9, _PCIE[pcie])
    return Device(name, int(gib * 2**30), rates, name not in _WITHOUT_BFLOAT16, _LINKS.get(name, PCIE))


# GiB that torch reports, GB/s, TFLOP/s, generation of PCI Express.
_TABLE = (
    # NVIDIA data sheets: H100 (2023), H200 (2024), Blackwell B200 (2025).
    _gpu("b200", 178.3, 8000, 2250, 5),
    _gpu("h200", 139.8, 4800, 989, 5),
    _gpu("h100", 79.1, 3350, 989, 5),
    _gpu("h100-pcie", 79.1, 2000, 756, 5),
    # NVIDIA A100 data sheet (2021).
    _gpu("a100-80gb", 79.1, 2039, 312, 4),
    _gpu("a100-40gb", 39.4, 1555, 312, 4),
    # NVIDIA data sheets: L40S (2023), L4 (2023), A10 (2021; the A10G of clouds has 70 TFLOP/s), T4 (2019, float16).
    _gpu("l40s", 44.3, 864, 362, 4),
    _gpu("l4", 22.0, 300, 121, 4),
    _gpu("a10g", 22.0, 600, 70, 4),
    _gpu("t4", 14.6, 320, 65, 3),
    # NVIDIA RTX Blackwell architecture (2025), appendices: GeForce, and RTX PRO 6000.
    _gpu("rtx-pro-6000", 94.9, 1792, 503, 5),
    _gpu("rtx-5090", 31.4, 1792, 209, 5),
    _gpu("rtx-5080", 15.5, 960, 112, 5),
    # NVIDIA Ada architecture, version 2.02 (2023), appendix; RTX 6000 Ada data sheet.
    _gpu("rtx-6000-ada", 47.4, 960, 364, 4),
    _gpu("rtx-4090", 23.6, 1008, 165, 4),
    _gpu("rtx-4080", 15.7, 717, 97, 4),
    # NVIDIA Ampere GA102 architecture, version 2.1 (2021), appendix; RTX A6000 data sheet.
    _gpu("rtx-a6000", 47.4, 768, 155, 4),
    _gpu("rtx-3090", 23.7, 936, 71, 4),
    _gpu("rtx-3060-12gb", 11.8, 360, 26, 4),
    # AMD Instinct MI300X data sheet (2023).
    _gpu("mi300x", 191.9, 5300, 1307, 5),
)
DEVICES = {device.name: device for device in _TABLE}


def find_device(name: str) -> Device:
    """A device of the table; case and separators do not matter.

    Raises:
        ConfigError: there is none of this name; says which is nearest.
    """
    plain = {_plain(known): device for known, device in DEVICES.items()}
    asked = _plain(name)
    if asked == ANY_GPU:
        return Device(ANY_GPU)
    if asked in plain:
        return plain[asked]
    meant = nearest(asked, plain, cutoff=0.5)
    hint = f"; did you mean {plain[meant].name}?" if meant else "."
    raise ConfigError(
        f"gpu {name}: not in the table{hint} Known: {', '.join(DEVICES)}; for any other say "
        f"{option('gpu', ANY_GPU)} and {option('memory', '24GB')}"
    )


def device_of_this_name(name: str) -> Device | None:
    """The device of the table that a driver calls so, e.g. `NVIDIA GeForce RTX 4090`; None where there is none."""
    reported = _plain(name)
    found = [device for device in _TABLE if _plain(device.name) in reported]
    return max(found, key=lambda device: len(device.name), default=None)


def _plain(name: str) -> str:
    text = "".join(letter for letter in name.lower() if letter.isalnum())
    for brand in ("nvidia", "geforce", "amd", "instinct"):
        text = text.removeprefix(brand)
    return text


@dataclass(frozen=True)
class Machine:
    """What is planned for.

    Attributes:
        device: `cpu` or `cuda`.
        gpu: the GPU that was asked for by name.
        is_here: whether it is this machine.
        compute_dtype: dtype of the GEMMs.
        budget_bytes: memory that a run may use.
        host_bytes: of the host's memory, what is free for each of the processes on it; infinite where it is not known.
        world_size: processes of the run, each with such a device.
        local_size: as many of them are on one machine.
        share_of_cpu: what each of them has of this machine's cores, where they are only planned for.
    """

    device: torch.device
    gpu: Device | None
    is_here: bool
    compute_dtype: torch.dtype
    budget_bytes: int
    host_bytes: float = math.inf
    world_size: int = 1
    local_size: int = 1
    share_of_cpu: float = 1.0

    @classmethod
    def of(
        cls,
        config: RunConfig,
        device: str | torch.device | None = None,
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
        target = torch.device("cuda") if named else default_device() if device is None else torch.device(device)
        is_here = named is None and (target.type == "cpu" or torch.cuda.is_available())
        # A size that was asked for comes first, and that of the run file before this machine's, not before a GPU's.
        asked = memory if memory is not None or named else config.memory_budget
        budget = parse_size(asked) if asked is not None else _memory_of(target, named)
        if asked is None and target.type == "cpu":
            budget //= local_size or devices or 1  # processes on one machine share its memory
        dtype = config.quantization.compute_dtype
        if dtype == "auto" and not is_here:
            # Every NVIDIA generation since 2020 has bfloat16.
            dtype = "bfloat16" if named is None or named.has_bfloat16 else "float16"
        world_size = launched().world_size if devices is None else devices
        local_size = local_size or min(world_size, _DEVICES_OF_A_MACHINE)
        host = available_memory() // local_size if is_here else math.inf
        compute_dtype = resolve_compute_dtype(dtype, target)
        share_of_cpu = 1 if devices is None else 1 / local_size  # a launcher has given each its threads
        return cls(target, named, is_here, compute_dtype, budget, host, world_size, local_size, share_of_cpu)

    def rates(self, from_disk: bool) -> Rates | None:
        """What the device does in a second: by the table, or measured on a CPU; None where nothing is known."""
        if self.device.type == "cpu":
            measured = cpu_rates(gemm_dtype(self.compute_dtype, self.device), torch.get_num_threads())
            flops, num_bytes = (rate * self.share_of_cpu for rate in measured)
            return Rates("measured", flops, num_bytes, DISK_BYTES_PER_SECOND * self.share_of_cpu)
        gpu = self._known_gpu
        if gpu is None or gpu.rates is None or self.compute_dtype == torch.float32:
            return None  # the table has rates of 16-bit products alone, and those in float32 do not round to TF32
        if not from_disk:
            return gpu.rates
        link = min(gpu.rates.link_bytes_per_second, DISK_BYTES_PER_SECOND)
        return replace(gpu.rates, link_bytes_per_second=link)

    @property
    def link(self) -> Link:
        """What connects the processes, as is usual: a network where one machine has not all of them, and for CPUs."""
        if self.device.type == "cpu":
            return ETHERNET_100
        gpu = self._known_gpu
        inside = gpu.link if gpu else PCIE
        if self.world_size > self.local_size:
            return ETHERNET_100 if inside == PCIE else ETHERNET_400
        return inside

    @property
    def compared_links(self) -> tuple[Link, ...]:
        """The links that times are shown for."""
        return NETWORKS if self.device.type == "cpu" else compared_links(self.link)

    @property
    def _known_gpu(self) -> Device | None:
        """The GPU of the table that is planned for, or that is here."""
        if self.gpu is None and self.is_here and self.device.type == "cuda":
            return device_of_this_name(torch.cuda.get_device_name(self.device))
        return self.gpu


def _memory_of(device: torch.device, gpu: Device | None) -> int:
    """What a GPU of the table has, or what this machine's device does."""
    if gpu is not None:
        if not gpu.memory_bytes:
            raise ConfigError(f"gpu {gpu.name}: say how much memory it has, e.g. {option('memory', '24GB')}")
        return gpu.memory_bytes
    if device.type == "cpu":
        return available_memory()
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here to take the memory of; set memory_budget, e.g. 24GB")
    # What others hold is not there for a run; what this process has allocated once and uses no more is.
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
