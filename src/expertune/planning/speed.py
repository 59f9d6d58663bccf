"""How long a step takes at the least: arithmetic over a rate, and bytes over another.

The floor counts what a step must do and nothing else: the frozen products of forward, their input gradients, the
recomputation of gate and up (once; of everything but the experts once more with checkpointing), attention, the output
head, the adapters, one pass over the frozen weights for each of forward and backward, and what has to be brought for
layers that wait elsewhere. A run takes longer; `EFFICIENCY` says what share of the floor's speed is expected.

Shape suffixes: T tokens of a micro-batch, S tokens of a row, D hidden size, F intermediate size, P parts of the first
product, K experts per token, V vocabulary, r rank.
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
from expertune.planning.inventory import FrozenWeights, Inventory, Layer, count_low_rank
from expertune.planning.settings import Settings
from expertune.storage import write_text

# Share of the floor's speed that a step reaches. CPU: the optimizer steps of docs/performance.md, 87.8 of 118 tokens a
# second by arithmetic, and less where products are thin. CUDA: an assumption, nothing has been measured.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}

# Read from a disk, where layers wait there: an assumption, an NVMe drive by itself reads faster.
DISK_BYTES_PER_SECOND = 1.0e9

_PROBE = (512, 2048, 2048)
_PROBE_BYTES = 2**28


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        source: `measured` here, or `tabled`.
        flops_per_second: dense products.
        bytes_per_second: of the memory that products read.
        link_bytes_per_second: from where layers wait: the host link, or a disk.
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
        seconds: what is expected: the floor by the efficiency, and what cannot be hidden of the bytes that are brought.
        tokens: of a step, by the bound that the plan counts with.
        efficiency: share of the floor's speed that is expected.
        flops: arithmetic of a step.
        brought_bytes: expert bytes that are brought to the device in a step.
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


def estimate_step(
    inventory: Inventory,
    targets: ResolvedTargets,
    frozen: FrozenWeights,
    settings: Settings,
    accumulation: int,
    brought_bytes: tuple[int, int],
    rates: Rates,
) -> StepTime:
    """Time of an optimizer step.

    Args:
        inventory: the model's shapes.
        targets: what the adapter changes.
        frozen: bytes of the base model.
        settings: what the run file says, with the micro-batch as it runs.
        accumulation: micro-batches of a step.
        brought_bytes: what one micro-batch brings in forward and in backward.
        rates: of the device.
    """
    forward, backward = flops_of(inventory, targets, settings)
    reading = frozen.quantized_bytes / rates.bytes_per_second
    passes = [max(flops / rates.flops_per_second, reading) for flops in (forward, backward)]
    efficiency = EFFICIENCY[settings.device]
    # Brought while another layer computes; what takes longer than that computation is waited for.
    link = [num_bytes / rates.link_bytes_per_second for num_bytes in brought_bytes]
    floor = sum(max(pair) for pair in zip(passes, link, strict=True))
    expected = [seconds / efficiency for seconds in passes]
    waiting = sum(max(carried - computed, 0.0) for carried, computed in zip(link, expected, strict=True))
    return StepTime(
        floor_seconds=accumulation * floor,
        seconds=accumulation * (sum(expected) + waiting),
        tokens=accumulation * settings.tokens,
        efficiency=efficiency,
        flops=accumulation * (forward + backward),
        brought_bytes=accumulation * sum(brought_bytes),
        waiting_seconds=accumulation * waiting,
        rates=rates,
    )


def flops_of(inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> tuple[float, float]:
    """Floating-point operations of a micro-batch in forward and in backward; a multiply-add is two."""
    T, D = settings.tokens, inventory.hidden_size
    forward = backward = 0.0
    for layer in inventory.layers:
        experts, gate_up = _expert_weights(layer, inventory.top_k)
        linears = sum(rows * columns for rows, columns in layer.linears.values())
        # Scores and values over the earlier half of a row; backward takes each product twice, and the scores again.
        attention = 2 * T * settings.row_length * (inventory.attention.query + inventory.attention.output) / 2
        again = 2 * T * linears + attention if settings.checkpointing else 0.0
        forward += 2 * T * (experts + linears) + attention
        backward += 2 * T * (experts + gate_up + linears) + 2.5 * attention + again
    head = 2 * T * inventory.vocab_size * D
    # Each factor is multiplied once forward; backward has its own gradient and its input's.
    low_rank = 2 * T * count_low_rank(inventory, targets, lambda _: inventory.top_k)
    # In chunks, the head's input gradient is taken in the forward; the total is the same either way.
    return forward + head + low_rank, backward + head + 2 * low_rank


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


def _expert_weights(layer: Layer, top_k: int) -> tuple[int, int]:
    """Weights that a token meets in a layer's experts: of all products, and of the first alone."""
    first = down = 0
    for spec in layer.experts.values():
        one = top_k * spec.hidden_size * spec.intermediate_size
        first += one * (len(spec.projections) - 1)
        down += one
    return first + down, first


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
    flops = 2 * rows * depth * columns / _median(lambda: torch.mm(x, w, out=out))
    source, target = (torch.ones(_PROBE_BYTES // 8) for _ in range(2))
    num_bytes = 2 * source.nbytes / _median(lambda: target.copy_(source))
    with suppress(OSError):  # measured anew next time
        write_text(path, json.dumps({"flops_per_second": flops, "bytes_per_second": num_bytes}))
    return flops, num_bytes


def _cache_path(dtype: torch.dtype, threads: int) -> Path:
    machine = [torch.__version__, str(dtype), cpu_name(), *cpu_instruction_sets(), str(threads)]
    digest = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    return cache_folder() / f"rates-{digest}.json"


def _median(run: Callable[[], object], repeats: int = 5) -> float:
    """The median of a few runs: other programs may be at work."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
