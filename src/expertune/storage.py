"""Files that are written whole or not at all; a failed write is one error that names the file and the reason.

Python raises OSError. safetensors' writer and torch's archive raise types of their own, with the system's reason in
their text or without one.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from expertune.errors import ExpertuneError, StorageError, option

BESIDE = ".tmp"
"""How the names of files end that are still being written."""

SCRATCH = ".scratch-"
"""How folders begin that are needed for a while; in the folder that is written, where the next export finds them."""

# Where huggingface_hub keeps a file of a repository.
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/([^/]+)/(.+)$")

_REMEDY = {
    errno.ENOSPC: "make room on this disk",
    errno.EDQUOT: "make room within your quota on this disk",
    errno.EROFS: "make this file system writable",
    errno.EACCES: "make the folder and what lies in it writable for you",
    errno.EPERM: "make the folder and what lies in it writable for you",
    errno.EIO: "check the disk, or take another one",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EFBIG: "take a file system, or a limit (`ulimit -f`), that allows larger files",
}

# torch's archive writer names neither file nor reason; Rust ends its messages with the system's number.
_OF_TORCH = re.compile(r"inline_container\.cc|PytorchStreamWriter|iostream error")
_OF_RUST = re.compile(r"\(os error (\d+)\)")

# Bytes of a file that are read at once; of a smaller file, or of what has no size, at least so many.
_PIECE, _SMALL_PIECE = 2**22, 2**16


@dataclass(frozen=True)
class FileRecord:
    """What a file is by its content.

    Attributes:
        sha256: of its content, as hexadecimal digits.
        nbytes: its size.
    """

    sha256: str
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """As the manifest of an NF4 folder has it."""
        return {"sha256": self.sha256, "bytes": self.nbytes}


def hash_file(path: Path, passed: Callable[[int], None] = lambda _: None) -> FileRecord:
    """sha256 and size of a file, read in pieces; after each, `passed` is called with the bytes so far.

    A piece is read while the one before is hashed: a core takes as long for the one as for the other. Where the system
    has no memory for a thread, as a run that saves its state may find, one follows the other.
    """
    digest, size = hashlib.sha256(), 0
    hashed: Future[None] | None = None
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        stored = os.fstat(file.fileno()).st_size
        beside = stored > _PIECE and _starts(hashing)
        # As large as the file where that is smaller; a pipe, or a file that grows meanwhile, is read in small pieces.
        buffer = memoryview(bytearray(min(max(stored, _SMALL_PIECE), _PIECE)))
        other = memoryview(bytearray(len(buffer))) if beside else buffer
        while count := file.readinto(buffer):
            size += count
            passed(size)
            if hashed is not None:
                hashed.result()
            if beside:
                hashed = hashing.submit(digest.update, buffer[:count])
                buffer, other = other, buffer
            else:
                digest.update(buffer[:count])
    return FileRecord(digest.hexdigest(), size)


def _starts(executor: ThreadPoolExecutor) -> bool:
    """Whether a thread can be started."""
    try:
        executor.submit(int).result()
    except RuntimeError:
        return False
    return True


def how_to_replace(path: Path) -> str:
    """What to do about a damaged file of a model, as the end of a message.

    The hub's client takes what lies in its cache as it is, so that giving the same command again would not help there.
    """
    cached = _IN_CACHE.search(path.as_posix())
    if cached is None:
        return "copy it again from where it came"
    repository, revision, name = cached[1].replace("--", "/", 1), cached[2], cached[3]
    return f"download it again: `hf download {repository} {name} --revision {revision} --force-download`"


@contextmanager
def storage_errors_named(folder: Path) -> Iterator[None]:
    """Turn what a failed read or write of a run raises into a StorageError.

    Args:
        folder: what is named where the error names no file.

    Raises:
        StorageError: in place of an OSError, or of torch's and safetensors' own errors about files.
    """
    try:
        yield
    except Exception as error:
        if (reason := _reason(error, folder)) is None:
            raise
        raise StorageError(f"{reason}, then give the same command again with {option('resume')}") from error


def failure(error: OSError, folder: Path | None = None) -> str | None:
    """File, reason and remedy of a failed read or write, in words.

    Args:
        error: what Python raised.
        folder: what is named where the error names no file.

    Returns:
        None where the error is a library's own words or about the network.
    """
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return None
    return _words(str(error.filename or folder or "a file"), error.errno)


def _reason(error: Exception, folder: Path) -> str | None:
    """As `failure`, of torch's and safetensors' errors too; None for any other error."""
    text = str(error)
    if isinstance(error, OSError):
        return failure(error, folder)
    if match := _OF_RUST.search(text):
        where, number = str(folder), int(match[1])
    elif isinstance(error, RuntimeError) and _OF_TORCH.search(text):
        # Neither file nor reason is in it: the last file that was started, and what a write there meets now.
        files = [path for path in folder.rglob("*") if path.is_file()]
        where = str(max(files, key=lambda path: path.stat().st_mtime_ns, default=folder))
        number = _error_of_a_write(folder)
        if not number:
            free = shutil.disk_usage(folder).free / 1e6
            return f"{where}: could not be written to its end, with {free:,.0f} MB free there; check the disk"
    else:
        return None
    return _words(where, number)


def _words(where: str, number: int) -> str:
    return f"{where}: {os.strerror(number)}; {_REMEDY.get(number, 'fix the cause')}"


def _error_of_a_write(folder: Path) -> int:
    """The system's error number of a small write into a folder; 0 where it succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def notify_if_it_fails(what: str, write: Callable[[], object], notify: Callable[[str], None]) -> None:
    """Write something that a run can do without; a failed write is notified and nothing more."""
    try:
        write()
    except (OSError, ExpertuneError) as error:
        notify(
            f"{what} could not be written ({getattr(error, 'strerror', None) or error}); the run continues without it"
        )


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that readers see either the old file or the new one, never a part."""
    write_text(path, json.dumps(_plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with write_whole(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside `path`, flush it to disk, then rename it into place: readers never see a part of it.

    Yields:
        the file beside; it is deleted where the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{BESIDE}")
    try:
        # The user's umask may take rights away; a group's is never given, as the cache refuses such files.
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(beside), beside):
            error.filename = str(path)  # a failed write or flush knows none, and nobody has named the file beside
        raise


def _plain(value: Any) -> Any:
    """JSON has no NaN: a loss that is not finite is kept as text, so that the file stays readable everywhere."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value
