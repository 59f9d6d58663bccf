"""What the control groups of this process (cgroup, versions 1 and 2) leave it: a container's cores and memory.

The system's own counts are the host's: on a machine with 512 GB a container that may use 16 is told of 512.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")

# Limit and use in version 2 and in version 1, and what of the use is pages of files, which the kernel takes back.
_MEMORY = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))


def cgroup_share(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that the process's control groups allow, the least of all levels; None where none limits it.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us` over `cpu.cfs_period_us`).
    """
    shares = [share for folder in _groups("cpu", root) if (share := _share_of(folder)) is not None]
    return min(shares, default=None)


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process may still take of the host's memory: what is available, within its control groups."""
    import psutil

    left = [free for folder in _groups("memory", root) if (free := _left_in(folder)) is not None]
    return min([int(psutil.virtual_memory().available), *left])


def read(path: Path) -> str:
    """What a small file of the system holds, stripped; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the process's control groups that may have this limit, each with those above it."""
    paths: dict[str, str] = {}
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif controller in controllers.split(","):
            paths["cgroup"] = path
    for line in read(root / "proc/self/mountinfo").splitlines():
        mount, _, described = line.partition(" - ")
        fields, (kind, _, options) = mount.split(), described.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        # Inside a container the group's folder is often the mount itself, and its path is the host's.
        top = root / _unescaped(fields[4]).lstrip("/")
        inside = os.path.relpath(paths[kind], _unescaped(fields[3]))
        at = top / inside if not inside.startswith("..") else top
        yield from (folder for folder in (at, *at.parents) if folder.is_relative_to(top))


def _share_of(folder: Path) -> float | None:
    limit = read(folder / "cpu.max").split()
    if not limit:
        limit = [read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]
    try:
        quota, period = map(int, limit)
    except ValueError:  # `max`, or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _left_in(folder: Path) -> int | None:
    for limit, use, prefix in _MEMORY:
        try:
            left = int(read(folder / limit)) - int(read(folder / use))
        except ValueError:  # `max`, or no such file
            continue
        counts = dict(line.split() for line in read(folder / "memory.stat").splitlines())
        files = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return max(left + files, 0)
    return None


def _unescaped(text: str) -> str:
    """A path of mountinfo, where white space is written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
