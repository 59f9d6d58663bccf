"""Clocks and counters of a device, and what stands in for them on a CPU.

What only a GPU can tell is `unmeasured(reason)` on a CPU: null, with the reason beside it.
"""

import gc
import statistics
import subprocess
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.campaign.record import Item, Record

Run = Callable[[], object]

# Calls of the CUDA runtime that wait for the device.
_WAITING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "hipStreamSynchronize",
)
_ON_CPU = "needs a GPU"
_TOP = 25


def unmeasured(reason: str = _ON_CPU) -> dict[str, Any]:
    """Null, and why."""
    return {"value": None, "reason": reason}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> float:
    """Seconds of one run: between two events of the device, or by the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleave(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run in each round, all in turn, after two to warm up."""
    if device.type != "cuda":
        return timing.interleave(runs, rounds)
    for run in runs.values():
        run()
        run()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def profiled(run: Run, device: torch.device) -> dict[str, Any]:
    """Device events of one run: how many of each kind, the longest by name, and how long the device had nothing to do.

    On a CPU the operators that torch was asked for are counted instead.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as found:
        started = time.perf_counter()
        run()
        before_wait = time.perf_counter()
        synchronize(device)
        wall = time.perf_counter() - started
    events = found.events() or []
    if device.type != "cuda":
        operators = sum(event.name.startswith("aten::") for event in events)
        return {"launches": unmeasured(), "operators": operators, "wall_s": wall}
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            by_name[event.name].append(event.time_range.elapsed_us() / 1e6)
    kinds = {"memcpy": 0, "memset": 0, "kernel": 0}
    for name, times in by_name.items():
        kinds[next((kind for kind in ("memcpy", "memset") if name.lower().startswith(kind)), "kernel")] += len(times)
    busy = sum(sum(times) for times in by_name.values())
    # The profiler and this function wait once themselves.
    waits = sum(event.name in _WAITING for event in events) - 1
    longest = sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[:_TOP]
    return {
        "launches": sum(kinds.values()),
        "kinds": kinds,
        "waits": max(waits, 0),
        "wall_s": wall,
        "host_s": before_wait - started,
        "busy_s": busy,
        "idle_share": max(1 - busy / wall, 0.0),
        "top": [
            {"name": name[:160], "seconds": sum(times), "count": len(times), "share": sum(times) / max(busy, 1e-12)}
            for name, times in longest
        ],
    }


def synchronisations(run: Run, device: torch.device) -> dict[str, Any]:
    """How often a run waits for the device, by torch's own watch; the first place where it does."""
    if device.type != "cuda":
        return unmeasured()
    synchronize(device)
    first = None
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            first = str(error)[:500]
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    synchronize(device)
    found = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    return {"value": len(found), "first": first}


def captured(run: Run, device: torch.device) -> Run:
    """A run as one CUDA graph; what it returns when it is captured holds the results of every replay.

    Raises:
        RuntimeError: it cannot be captured; says why.
    """
    if device.type != "cuda":
        raise RuntimeError(f"a CUDA graph {_ON_CPU}")
    synchronize(device)
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(aside)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except Exception as error:
        raise RuntimeError(f"cannot be captured: {error}") from error

    def replay() -> object:
        graph.replay()
        return results

    return replay


def matmul_rate(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    """FLOP/s of torch's own product of large matrices."""
    M, N, K = (256, 256, 256) if small else (8192, 14336, 4096)
    x, w = (torch.randn(rows, K, device=device, dtype=dtype) for rows in (M, N))
    y = torch.empty(M, N, device=device, dtype=dtype)
    times = [seconds(lambda: torch.mm(x, w.t(), out=y), device) for _ in range(30)][10:]
    return {"shape": [M, N, K], "flops_per_second": 2 * M * N * K / statistics.median(times)}


def copy_rate(device: torch.device, small: bool) -> dict[str, Any]:
    """Bytes per second, read and written, of a copy on the device."""
    size = 2**22 if small else 2**31
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = [seconds(lambda: target.copy_(source), device) for _ in range(20)][5:]
    return {"bytes": size, "bytes_per_second": 2 * size / statistics.median(times)}


def rates(out: Record) -> Item:
    """What floors are taken from, measured here."""
    found: Item = {
        "matmul": matmul_rate(out.device, torch.bfloat16, out.small),
        "copy": copy_rate(out.device, out.small),
    }
    out.keep("rates", found)
    return found


def reset_peak(device: torch.device) -> None:
    """Start the peak of allocated memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, Any]:
    """Allocated, its peak, reserved, and what the device has in use in all."""
    if device.type != "cuda":
        return {"peak_allocated": unmeasured()}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
        "device_used": total - free,
        "nvidia_smi_mib": _nvidia_smi(),
    }


def _nvidia_smi() -> list[int] | None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return [int(line) for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
