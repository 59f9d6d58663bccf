"""Rounds of several runs in one process, taken in turn, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[[], object]


def interleave(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one to warm up."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(other: list[float], ours: list[float]) -> float:
    """How many times as long the other takes: the median over paired rounds."""
    return statistics.median(there / here for there, here in zip(other, ours, strict=True))


def extra_bytes(run: Run) -> int | None:
    """Peak resident bytes of a run above what was resident before (Linux only)."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    before = memory_status("VmRSS")
    clear.write_text("5", encoding="ascii")
    run()
    return memory_status("VmHWM") - before


def memory_status(key: str) -> int:
    """Bytes of this process that Linux has under a key, such as `VmRSS`, `RssAnon` or `VmHWM` (the peak)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
