"""How fast this CPU is: measured once on a machine, and kept; again and again while other programs keep it busy."""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from expertune.kernels.amounts import Dtype
from expertune.kernels.cache import path_of, remember
from expertune.kernels.limits import cgroup_share, read
from expertune.kernels.processor import INTEGERS, SWITCH, cpu_name, processor

# Rows, depth and columns of the product, and bytes of the copy.
_PRODUCT = (512, 2048, 2048)
_COPIED_BYTES = 2**27

# Runs that are taken, how many of them must have been undisturbed, and seconds after which no other is begun.
_RUNS, _LEAST_RUNS, _MOST_SECONDS = 5, 3, 1.0

# Part of a run's time that its threads may have spent without a core: interrupts, and a turn of another program.
_LOST = 0.1

# For so long what was measured on a busy machine serves the next plans as well, which need not import torch then.
_BUSY_SECONDS = 600

_THREADS = Path("/proc/self/task")

# Not imported for its sources, which would import torch.
_NATIVE = Path(__file__).parent / "native"


@dataclass(frozen=True)
class ProductRate:
    """How fast this CPU multiplies 4-bit weights.

    Attributes:
        measured_at: see `CpuRates`.
        flops_per_second: of products and their input gradients, as many operations as floats would take.
        was_busy: see `CpuRates`.
    """

    measured_at: float
    flops_per_second: float
    was_busy: bool = False


@dataclass(frozen=True)
class CpuRates:
    """What this CPU does in a second.

    Attributes:
        measured_at: in seconds since 1970.
        flops_per_second: of a matrix product.
        bytes_per_second: read and written by a copy.
        was_busy: other programs took the cores meanwhile: alone it is faster, by how much nobody knows.
    """

    measured_at: float
    flops_per_second: float
    bytes_per_second: float
    was_busy: bool = False


T = TypeVar("T", ProductRate, CpuRates)


@cache
def cpu_rates(dtype: Dtype, threads: int) -> CpuRates:
    """Rates of this CPU: from the user's cache, or measured in a second."""
    return _kept(CpuRates, f"torch.{dtype.name}", threads, lambda: _measure(dtype, threads))


@cache
def integer_rate(threads: int) -> ProductRate | None:
    """The same of products with 4-bit weights in integers of 16 bits; None where the native library is not in use."""
    if os.environ.get(SWITCH) == "0":
        return None
    with suppress(_NoLibraryError):
        return _kept(ProductRate, f"{INTEGERS}, {_sources()}", threads, lambda: _measure_integers(threads))
    return None


def _sources() -> str:
    """Hash of the native library's sources: a faster release of it is measured anew."""
    digest = hashlib.sha256()
    for path in sorted(_NATIVE.glob("*.[ch]")):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


class _NoLibraryError(Exception):
    """The native library could not be built here."""


def _kept(of: type[T], product: str, threads: int, measure: Callable[[], T]) -> T:
    """What is kept of a product on this machine, or measured."""
    machine = [version("torch"), product, cpu_name(), *processor().instruction_sets, threads]

    def load(text: str) -> T:
        kept = of(**json.loads(text))
        if kept.was_busy and not 0 <= time.time() - kept.measured_at < _BUSY_SECONDS:
            raise ValueError("by now the machine may be free")
        return kept

    return remember(path_of("rates", machine), measure, lambda rates: json.dumps(asdict(rates)), load)


def _measure(dtype: Dtype, threads: int) -> CpuRates:
    import torch

    rows, depth, columns = _PRODUCT
    held = getattr(torch, dtype.name)
    generator = torch.Generator().manual_seed(0)  # the program's own draws stay as they would be
    x, w = (torch.randn(*shape, generator=generator).to(held) for shape in ((rows, depth), (depth, columns)))
    out = torch.empty(rows, columns, dtype=held)
    product, is_free = _seconds(lambda: torch.mm(x, w, out=out), threads)
    source, target = (torch.ones(_COPIED_BYTES // 4) for _ in range(2))
    copy, is_free_still = _seconds(lambda: target.copy_(source), threads)
    flops, num_bytes = 2 * rows * depth * columns, 2 * source.nbytes
    was_busy = not (is_free and is_free_still)
    return CpuRates(time.time(), flops / product, num_bytes / copy, was_busy)


def _measure_integers(threads: int) -> ProductRate:
    """Of a product and its input gradient, as large as that of floats.

    Raises:
        _NoLibraryError: there is nothing to measure.
    """
    import torch

    from expertune.kernels import native
    from expertune.kernels.expert_mlp.calibrate import random_bytes

    if not native.available():
        raise _NoLibraryError
    rows, depth, columns = _PRODUCT
    weight = random_bytes(1, columns, depth, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)  # the program's own draws stay as they would be
    x, ends = torch.randn(rows, depth, generator=generator), torch.tensor([rows])
    y, dx = torch.empty(rows, columns), torch.empty(rows, depth)

    def both_ways() -> None:
        native.grouped_gemm(x, weight, ends, y, transposed=True, dtype=torch.bfloat16)
        native.grouped_gemm(y, weight, ends, dx, transposed=False, dtype=torch.bfloat16)

    seconds, is_free = _seconds(both_ways, threads)
    return ProductRate(time.time(), 2 * 2 * rows * depth * columns / seconds, not is_free)


def _seconds(run: Callable[[], object], threads: int) -> tuple[float, bool]:
    """How long a run takes, and whether the machine was free for enough of them.

    The median of those that nothing disturbed; where these are too few, the fastest of all.
    """
    run()
    quota = min(1.0, (cgroup_share() or threads) / threads)  # a container waits for its own share as well
    undisturbed: list[float] = []
    every: list[float] = []
    begun = time.perf_counter()
    while len(undisturbed) < _RUNS and (not every or time.perf_counter() - begun < _MOST_SECONDS):
        seconds, lost = _timed(run)
        every.append(seconds)
        if lost <= 1 - quota * (1 - _LOST):
            undisturbed.append(seconds)
    is_free = len(undisturbed) >= _LEAST_RUNS
    return (statistics.median(undisturbed) if is_free else min(every)), is_free


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a run, and the part of them in which one of this process's threads had no core.

    That is what the system says of their waiting, and time that this thread did not compute in, which was stopped then
    or waited for another thread. Only Linux tells of the former; elsewhere nothing counts as lost.
    """
    waited, computed, started = _waited(), time.thread_time(), time.perf_counter()
    run()
    seconds, computed = time.perf_counter() - started, time.thread_time() - computed
    after = _waited()
    if not after:
        return seconds, 0.0
    return seconds, max(
        seconds - computed, *(until - waited.get(thread, 0.0) for thread, until in after.items())
    ) / seconds


def _waited() -> dict[str, float]:
    """Seconds for which each thread of this process could have run and had no core, by its number."""
    found = {}
    with suppress(OSError, ValueError, IndexError):  # another system, or one that does not count it
        for thread in _THREADS.iterdir():
            found[thread.name] = int(read(thread / "schedstat").split()[1]) / 1e9
    return found
