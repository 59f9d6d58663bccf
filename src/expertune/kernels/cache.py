"""What is built or measured once on a machine is kept in one folder, which nobody else can write to.

A library that is loaded, and measurements that decide how GEMMs run, must not come from somebody else. So the
folder is used only where it belongs to the user and is not writable by others, `XDG_CACHE_HOME` included. Else what is
kept goes to a private folder among temporary files, and that is reported once.
"""

import atexit
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from expertune.storage import BESIDE, write_text

T = TypeVar("T")

# Files of each kind that stay in a folder: every other CPU, set of variables, model or dataset leaves one more.
_MOST_KEPT = 64

# What is kept here is made within minutes: what is still unfinished was left by a killed process.
_UNFINISHED_SECONDS = 3600

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder: `$XDG_CACHE_HOME/expertune` (`~/.cache/expertune`), or a private one; exists on return."""
    return find_cache()[0]


def find_cache() -> tuple[Path, str]:
    """The folder, and why it is not the usual one; nothing where it is."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        usual = Path(base) / "expertune"
        reason = _prepare(usual)
    except RuntimeError as error:  # no home
        reason = str(error)
    if not reason:
        return usual, ""
    private = Path(tempfile.gettempdir()) / f"expertune-{_user()}"
    if other := _prepare(private):
        reason = f"{reason}; {other}"
        private = _own_folder()
    _tell_once(f"cache: {reason}; using {private}")
    return private, reason


def path_of(kind: str, decided_by: Any, within: str = "") -> Path:
    """The file for what is decided by such plain values.

    Args:
        kind: what it is, as the file's name begins; without a hyphen.
        decided_by: all that decides it.
        within: a folder of the folder.
    """
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / within / f"{kind}-{digest}.json"


def remember(
    path: Path,
    make: Callable[[], T],
    dump: Callable[[T], str],
    load: Callable[[str], T],
    may_keep: Callable[[T], bool] = lambda _: True,
) -> T:
    """What an earlier process has kept in a file, or what `make` returns, which is then kept there.

    A file is used only if the hash of its content is the one that stands in it, and nobody else can have written it.

    Args:
        path: from `path_of`.
        make: makes it anew; what it raises is raised.
        dump: the value as text.
        load: the value of such a text; raises one of Python's own errors where the text is none.
        may_keep: whether what was made is good for another time.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        held = read_kept(path)
        if held["sha256"] == _hash(held["content"]):
            return load(held["content"])
    made = make()
    if may_keep(made):
        with suppress(OSError, ValueError, TypeError):  # made again next time
            content = dump(made)
            if load(content) == made:  # else a value of a type that nobody expects
                keep(path, json.dumps({"sha256": _hash(content), "content": content}))
    return made


def keep(path: Path, text: str) -> None:
    """Write a file of the folder, and tidy up.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_text(path, text)
    tidy(path)


def tidy(path: Path) -> None:
    """Remove the oldest of a new file's kind, and what killed processes have left unfinished beside it.

    A process that has loaded one of them, or has it open, goes on with it.
    """
    folder, kind = path.parent, path.name.partition("-")[0]
    with suppress(OSError):  # another process may be at it
        held = sorted(folder.glob(f"{kind}-*{path.suffix}"), key=_written)
        unfinished = (each for each in folder.glob(f".*{BESIDE}") if time.time() - _written(each) > _UNFINISHED_SECONDS)
        for each in (*held[:-_MOST_KEPT], *unfinished):
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            else:
                each.unlink(missing_ok=True)


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def read_kept(path: Path) -> Any:
    """What a JSON file of the folder holds.

    Raises:
        OSError: no such file, or one that others may have written.
        ValueError: damaged.
    """
    if reason := why_not_private(path):
        raise PermissionError(reason)
    return json.loads(path.read_text(encoding="utf-8"))


def why_not_private(path: Path) -> str:
    """Why others may have put there what lies at a path; nothing where only the user (or root) can have.

    Raises:
        OSError: nothing is there.
    """
    path = path.resolve(strict=True)
    if sys.platform == "win32":  # what lies in a user's profile is the user's
        return ""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user (uid {status.st_uid})"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"{path} can be written by others (chmod go-w {path} ends that; look at what is in it first)"
    if path.parent.stat().st_uid not in (0, os.geteuid()):
        return f"{path} lies in a folder of another user (uid {path.parent.stat().st_uid})"
    return _why_reachable(path.parent)


def _why_reachable(folder: Path) -> str:
    """Which folder on the way to a path others could exchange it in; in a sticky one they cannot."""
    if sys.platform != "win32":
        for each in (folder, *folder.parents):
            mode = each.stat().st_mode
            if mode & _WRITABLE_BY_OTHERS and not mode & stat.S_ISVTX:
                return f"{each} can be written by others"
    return ""


def _prepare(folder: Path) -> str:
    """Make a folder unless it is there; why it cannot be used, or nothing."""
    try:
        missing = []
        at = folder.absolute()
        while not at.exists():
            missing.append(at)
            at = at.parent
        if missing and (reason := _why_reachable(at.resolve())):
            return reason
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
        if reason := why_not_private(folder):
            return reason
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror or error})"


def _user() -> str:
    return str(os.geteuid()) if sys.platform != "win32" else "cache"


@cache
def _own_folder() -> Path:
    """A folder of this process alone, gone when it ends."""
    folder = tempfile.mkdtemp(prefix="expertune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _tell_once(message: str) -> None:
    _logger.warning(message)
