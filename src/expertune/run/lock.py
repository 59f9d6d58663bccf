"""One process per run directory: who holds it, and that it is held no longer when that process is gone.

The kernel keeps the lock (`flock`), so that it ends with the process however that ends. The file beside it says who has
it, for the message of a second run. Both disappear with the run; a file without a lock is what a kill left behind.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertune.errors import ConfigError, option

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock.json"

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has none

# Descriptors of locks that this process holds. A copy of the process (a data loader's worker) closes its own, or it
# would keep the lock of a process that was killed.
_held: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextlib.contextmanager
def hold_run_directory(run_dir: Path) -> Iterator[None]:
    """Hold a run directory while the body runs; one that it made, and the body left empty, is removed again.

    Args:
        run_dir: the run's `output_dir`.

    Raises:
        ConfigError: another process holds it (named by host and id), or it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        try:
            made = make_folder(run_dir)
            descriptor = lock_file(
                run_dir / LOCK_NAME,
                "a run",
                f"or end it and give the same command again with {option('resume')}, or choose another output_dir",
            )
        except OSError as error:
            raise ConfigError(
                f"output_dir {run_dir}: a run cannot be written here ({error.strerror or error}); choose another "
                "output_dir, or make this one writable"
            ) from None
        try:
            yield
        finally:
            # First the name, then the lock: who opens the file in between finds that it is not the one at this name.
            with contextlib.suppress(OSError):
                (run_dir / LOCK_NAME).unlink()
            unlock(descriptor)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_folder(wanted: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were missing, the outermost first."""
    missing = [folder for folder in (wanted, *wanted.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
        if not wanted.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
    except OSError:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return made


def lock_file(path: Path, what: str, advice: str) -> int:
    """Make a file that says who holds it, and lock it for this process.

    Args:
        path: the file, in a folder that exists.
        what: what its holder writes in that folder.
        advice: what to do where another process holds it, besides waiting.

    Returns:
        A descriptor for `unlock`.

    Raises:
        ConfigError: another process holds it, or a link is in its place.
        OSError: it cannot be made.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o644)
        except OSError as error:
            if not path.is_symlink():
                raise
            raise ConfigError(f"{path}: a link, and what it leads to would be written over; remove the link") from error
        try:
            holder = _read(descriptor)
            if not _take(descriptor, holder):
                raise ConfigError(f"{path.parent}: {_refusal(holder, what)}, {advice}")
            try:
                is_current = os.stat(path).st_ino == os.fstat(descriptor).st_ino  # noqa: PTH116 - beside fstat
            except FileNotFoundError:
                is_current = False
            if is_current:
                mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(mine).encode(), 0)
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended, and removed it, after it was opened here


def unlock(descriptor: int) -> None:
    """Let another process have it."""
    _held.discard(descriptor)
    os.close(descriptor)


def _take(descriptor: int, holder: dict[str, Any]) -> bool:
    """Lock the file if nobody else has; where the file system has no locks, by what the file says."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise
    return not _is_alive(holder)


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that a file names runs, as far as this machine can tell."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if holder.get("host") != socket.gethostname():
        return True  # not to be seen from here, so it is believed
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _read(descriptor: int) -> dict[str, Any]:
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _refusal(holder: dict[str, Any], what: str) -> str:
    host = holder.get("host", "an unknown host")
    who = f"process {holder['pid']} on {host}" if "pid" in holder else "another process"
    since = holder.get("started")
    when = (
        f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if isinstance(since, int | float) else ""
    )
    return f"{who} is writing {what} here{when}; wait for it to end"
