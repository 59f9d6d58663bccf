"""How long a step takes at the least, which is arithmetic over a rate or bytes over another, and how long is expected.

Shape suffixes: T tokens of a micro-batch, D hidden size.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from expertune.checkpoint.targets import ResolvedTargets
from expertune.kernels.cache import cache_folder, read_kept
from expertune.kernels.cpu import cpu_instruction_sets, cpu_name, gemm_dtype
from expertune.planning.devices import Device
from expertune.planning.inventory import FrozenWeights, Inventory, count_low_rank
from expertune.planning.placement import Offloading
from expertune.planning.settings import Settings
from expertune.storage import write_text

# Share of the floor's speed that a step reaches. CPU: the optimizer steps of docs/performance.md, 87.8 of 118 tokens a
# second by arithmetic, and less where GEMMs are thin. CUDA: an assumption, nothing has been measured.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}

# Read from a disk, where layers are offloaded there: an assumption, an NVMe drive by itself reads faster.
DISK_BYTES_PER_SECOND = 1.0e9

_PROBE = (512, 2048, 2048)
_PROBE_BYTES = 2**28


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
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        floor_seconds: least time, by `rates`.
        seconds: what is expected: the floor by the efficiency, and the transfers that it cannot hide.
        tokens: of a step, by the bound that the plan counts with.
        efficiency: share of the floor's speed that is expected.
        flops: arithmetic of a step.
        brought_bytes: expert bytes that are transferred to the device in a step.
        waiting_seconds: of `seconds`, how long the device waits for these.
        rates: what was divided by.
    """

    floor_seconds: float
    seconds: float
    tokens: int
    efficiency: float
    flops: float
    brought_bytes: int
    waiting_seconds: float
    rates: Rates

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a step over the expected seconds."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Work:
    """What one micro-batch computes and reads, in forward and in backward.

    Attributes:
        flops: floating-point operations; a multiply-add is two.
        read_bytes: of frozen 4-bit weights, each way.
        transferred_bytes: of offloaded experts.
        tokens: T.
    """

    flops: tuple[float, float]
    read_bytes: int
    transferred_bytes: tuple[int, int]
    tokens: int


def count_work(
    inventory: Inventory, targets: ResolvedTargets, weights: FrozenWeights, settings: Settings, offloading: Offloading
) -> Work:
    """What a micro-batch must do and nothing else.

    Counted are the frozen GEMMs of forward, their input gradients, gate and up once more in backward (with
    checkpointing everything but the experts), attention, the output head and the adapter.
    """
    T, attention = settings.tokens, inventory.attention
    forward = backward = 0.0
    for layer in inventory.layers:
        # Weights that a token meets in the experts: of gate and up, and of down.
        down = inventory.top_k * sum(spec.hidden_size * spec.intermediate_size for spec in layer.experts.values())
        gate_up = down * max((len(spec.projections) - 1 for spec in layer.experts.values()), default=0)
        linears = sum(out_features * in_features for out_features, in_features in layer.linears.values())
        # Scores and values over the earlier half of a sequence; backward computes each twice, and the scores again.
        scores = T * settings.sequence_length * (attention.query + attention.output)
        recomputed = 2 * T * linears + scores if settings.checkpointing else 0.0
        forward += 2 * T * (gate_up + down + linears) + scores
        backward += 2 * T * (2 * gate_up + down + linears) + 2.5 * scores + recomputed
    head = 2 * T * inventory.vocab_size * inventory.hidden_size
    # Each factor is multiplied once forward; backward has its own gradient and its input's.
    low_rank = 2 * T * count_low_rank(inventory, targets, lambda _: inventory.top_k)
    flops = forward + head + low_rank, backward + head + 2 * low_rank
    return Work(flops, weights.quantized_bytes, offloading.transferred_bytes, T)


def step_time(work: Work, accumulation: int, rates: Rates, efficiency: float) -> StepTime:
    """Time of an optimizer step of so many micro-batches."""
    reading = work.read_bytes / rates.bytes_per_second
    passes = [max(flops / rates.flops_per_second, reading) for flops in work.flops]
    # Transferred while another layer computes; the device waits for what takes longer than that computation.
    link = [num_bytes / rates.link_bytes_per_second for num_bytes in work.transferred_bytes]
    expected = [seconds / efficiency for seconds in passes]
    waiting = sum(max(transfer - computed, 0.0) for transfer, computed in zip(link, expected, strict=True))
    return StepTime(
        floor_seconds=accumulation * sum(max(pair) for pair in zip(passes, link, strict=True)),
        seconds=accumulation * (sum(expected) + waiting),
        tokens=accumulation * work.tokens,
        efficiency=efficiency,
        flops=accumulation * sum(work.flops),
        brought_bytes=accumulation * sum(work.transferred_bytes),
        waiting_seconds=accumulation * waiting,
        rates=rates,
    )


def measured_rates(dtype: torch.dtype) -> Rates:
    """What this CPU does, measured in a second and kept in the user's cache."""
    flops, num_bytes = _probe(gemm_dtype(dtype, torch.device("cpu")), torch.get_num_threads())
    return Rates("measured", flops, num_bytes, DISK_BYTES_PER_SECOND)


def tabled_rates(device: Device, from_disk: bool = False) -> Rates | None:
    """What a device does by the table; None where that is not known."""
    if not device.flops_per_second:
        return None
    link = min(device.link_bytes_per_second, DISK_BYTES_PER_SECOND) if from_disk else device.link_bytes_per_second
    return Rates("tabled", device.flops_per_second, device.bytes_per_second, link)


@cache
def _probe(dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """FLOP/s of a product and bytes/s of a copy: from the cache, or measured."""
    path = _cache_path(dtype, threads)
    with suppress(OSError, ValueError, KeyError, TypeError):
        found: Mapping[str, float] = read_kept(path)
        return float(found["flops_per_second"]), float(found["bytes_per_second"])
    rows, depth, columns = _PROBE
    x, w = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    flops = 2 * rows * depth * columns / _median_seconds(lambda: torch.mm(x, w, out=out))
    source, target = (torch.ones(_PROBE_BYTES // 8) for _ in range(2))
    num_bytes = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))
    with suppress(OSError):  # measured again next time
        write_text(path, json.dumps({"flops_per_second": flops, "bytes_per_second": num_bytes}))
    return flops, num_bytes


def _cache_path(dtype: torch.dtype, threads: int) -> Path:
    machine = [torch.__version__, str(dtype), cpu_name(), *cpu_instruction_sets(), str(threads)]
    digest = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    return cache_folder() / f"rates-{digest}.json"


def _median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median of a few runs: other programs may be at work."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
