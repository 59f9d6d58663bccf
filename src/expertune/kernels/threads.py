"""How many threads GEMMs take on a CPU, and how they wait for each other: said to OpenMP before torch is imported.

OpenMP's threads spin at the end of each parallel part, in libgomp for about ten milliseconds, before they sleep. Where
anything else wants the cores that is time taken from it, and from the threads that are waited for: a step takes up to
twelve times what it must. And libgomp knows of a process's affinity, but not of a container's share of the cores
(cgroup): on a host of 64 cores it starts 64 threads in a container that may use two.

The runtime reads its variables once, when torch loads it. What the user has set stays.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# libgomp's (pip's torch) and Intel's and LLVM's runtime (conda's).
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_COUNTING = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")
# Of the numbers 128 and 1024, a step of the demo took 0.98 and 1.00 s, at 1.30 and 1.41 GB.
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_ROOT = Path("/")


def prepare_threads() -> None:
    """Let threads wait asleep, and take no more of them than this process may use cores; too late once torch is there.

    For a command line's start: it sets environment variables, which processes that are started later inherit. oneDNN's
    two caches are bounded with them: they would keep the scratch memory of a thousand matrix products, one for each
    number of tokens, and every expert has its own.
    """
    if "torch" in sys.modules:
        return
    for name in _CACHES:
        os.environ.setdefault(name, "128")
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["KMP_BLOCKTIME"] = "0"
    cores = usable_cores()
    # Without a share, torch's own count is right: of physical cores, and by affinity.
    if cores < cores_by_affinity() and not any(name in os.environ for name in _COUNTING):
        os.environ["OMP_NUM_THREADS"] = str(cores)


def usable_cores(root: Path = _ROOT) -> int:
    """Physical cores that this process may run on, by affinity and by its container's share, rounded up."""
    cores, share = cores_by_affinity(root), cgroup_share(root)
    return cores if share is None else max(1, min(cores, math.ceil(share)))


def cores_by_affinity(root: Path = _ROOT) -> int:
    """Physical cores behind the CPUs of this process's affinity."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return len({_siblings(root, cpu) for cpu in cpus}) or 1


def cgroup_share(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that the process's control groups allow, the least of all levels; None where none limits it.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us` over `cpu.cfs_period_us`).
    """
    shares = [share for folder in _cpu_groups(root) if (share := _share_of(folder)) is not None]
    return min(shares, default=None)


def waits_passively() -> bool:
    """Whether the variables of this process ask OpenMP's threads to sleep while they wait."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").strip().lower()
    return policy == "passive" or os.environ.get("GOMP_SPINCOUNT") == "0" or os.environ.get("KMP_BLOCKTIME") == "0"


def _siblings(root: Path, cpu: int) -> str:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if text := _read(topology / name):
            return text
    return str(cpu)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """Folders of the process's control groups that may limit CPU time, each with those above it."""
    paths: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, described = line.partition(" - ")
        fields, (kind, _, options) = mount.split(), described.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # Inside a container the group's folder is often the mount itself, and its path is the host's.
        top = root / _unescaped(fields[4]).lstrip("/")
        inside = os.path.relpath(paths[kind], _unescaped(fields[3]))
        at = top / inside if not inside.startswith("..") else top
        yield from (folder for folder in (at, *at.parents) if folder.is_relative_to(top))


def _share_of(folder: Path) -> float | None:
    limit = _read(folder / "cpu.max").split()
    if not limit:
        limit = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
    try:
        quota, period = map(int, limit)
    except ValueError:  # `max`, or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _unescaped(text: str) -> str:
    """A path of mountinfo, where white space is written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
