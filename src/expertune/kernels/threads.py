"""How many threads GEMMs take on a CPU, and how they wait for each other: said to OpenMP before torch is imported.

OpenMP's threads spin at the end of each parallel part, in libgomp for milliseconds, before they sleep. Where anything
else wants the cores that is time taken from it, and from the threads that are waited for: a step takes up to twelve
times what it must. Where nothing else does, sleeping at once costs a step up to a third, as a virtual machine wakes a
core slowly. So they spin for about a millisecond: the next part has mostly begun by then. And libgomp knows of
a process's affinity, but not of a container's share of the cores (cgroup): on a host of 64 cores it starts 64 threads
in a container that may use two.

The runtime reads its variables once, when torch loads it. What the user has set stays.
"""

import math
import os
import sys
from pathlib import Path

from expertune.kernels.limits import cgroup_share, read

# libgomp's (pip's torch) and Intel's and LLVM's runtime (conda's).
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Turns of libgomp's loop, of 40 to 140 cycles each by CPU: with 10,000 to 100,000 the demo was about as fast, alone and
# beside spinning processes. The other runtimes count in milliseconds.
_SHORT_SPIN, _SHORT_BLOCKTIME = 30_000, 1
_COUNTING = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")
# Of the numbers 128 and 1024, a step of the demo took 0.98 and 1.00 s, at 1.30 and 1.41 GB.
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_ROOT = Path("/")


def prepare_threads() -> None:
    """Let waiting threads sleep after a short spin, and take no more of them than this process may use cores.

    Too late once torch is there. For a command line's start: it sets environment variables, which processes that are
    started later inherit. oneDNN's two caches are bounded with them: they would keep the scratch memory of a thousand
    matrix products, one for each number of tokens, and every expert has its own.
    """
    if "torch" in sys.modules:
        return
    for name in _CACHES:
        os.environ.setdefault(name, "128")
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(_SHORT_SPIN)
        os.environ["KMP_BLOCKTIME"] = str(_SHORT_BLOCKTIME)
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


def spins_long() -> bool:
    """Whether, by the variables of this process, OpenMP's threads may spin for long before they sleep.

    Each runtime has a variable of its own, and which of them torch comes with is not looked at.
    """
    passive = os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
    limits = {"GOMP_SPINCOUNT": _SHORT_SPIN, "KMP_BLOCKTIME": _SHORT_BLOCKTIME}
    return not all(_at_most(os.environ[name], most) if name in os.environ else passive for name, most in limits.items())


def _at_most(value: str, most: int) -> bool:
    return value.strip().isdecimal() and int(value) <= most


def _siblings(root: Path, cpu: int) -> str:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if text := read(topology / name):
            return text
    return str(cpu)
