"""The shards of a source, opened when first needed and dropped when no tensor of them is needed any more."""

import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from pathlib import Path
from typing import Protocol

from expertune.checkpoint.hub import hub_reason
from expertune.checkpoint.reader import TensorEntry, open_checkpoint, read_header, read_weight_map
from expertune.errors import CheckpointError
from expertune.storage import FileRecord, hash_file

SINGLE_SHARD = "model.safetensors"


class Shards(Protocol):
    """Where a source's tensors lie.

    Attributes:
        weight_map: name on disk -> name of the shard.
        are_deleted: whether a shard is gone once it has been dropped.
    """

    weight_map: dict[str, str]
    are_deleted: bool

    def open(self, shard: str) -> Path:
        """The shard as a file on this machine."""

    def drop(self, shard: str) -> None:
        """The shard will not be asked for again."""

    def close(self) -> None:
        """No shard will be asked for again: remove what was kept for that."""


class LocalShards:
    """The shards of a folder on this machine, which stay where they are.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """

    are_deleted = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight_map = {key: entry.shard.name for key, entry in open_checkpoint(folder).tensors.items()}

    def open(self, shard: str) -> Path:
        """The file in the folder."""
        return self.folder / shard

    def drop(self, shard: str) -> None:
        """Nothing: the folder is the user's."""

    def close(self) -> None:
        """Nothing."""


class HubShards:
    """The shards of a hub repository, one download each, deleted after use: the whole model never lies on the disk.

    A shard that is in the hub's cache already is read from there, and stays.

    Args:
        repository: hub id.
        revision: commit.
        files: folder with the repository's index, where it has one.
        folder: where shards lie while they are needed.
        download: `huggingface_hub.hf_hub_download`, or what stands for it.
        cached: finds a file in the hub's cache; None where it is not there.

    Raises:
        CheckpointError: the index is damaged.
    """

    are_deleted = True

    def __init__(
        self,
        repository: str,
        revision: str | None,
        files: Path,
        folder: Path,
        download: Callable[..., str] | None = None,
        cached: Callable[[str], Path | None] | None = None,
    ) -> None:
        self.repository, self.revision, self.folder = repository, revision, folder
        self._download = download
        self._cached = cached or self._in_cache
        self._open: dict[str, Path] = {}
        self.weight_map = read_weight_map(files)
        if not self.weight_map:
            # Small models are one file without an index: its own header says what is in it.
            self.weight_map = dict.fromkeys(read_header(self.open(SINGLE_SHARD)), SINGLE_SHARD)

    def open(self, shard: str) -> Path:
        """The shard, downloaded now if it is not here.

        Raises:
            CheckpointError: the hub did not give it.
        """
        if shard not in self._open:
            kept = self._cached(shard)
            self._open[shard] = kept if kept is not None else self._fetch(shard)
        return self._open[shard]

    def drop(self, shard: str) -> None:
        """Delete the download; a file of the hub's cache stays."""
        path = self._open.pop(shard, None)
        if path is not None and path.is_relative_to(self.folder):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the folder of downloads."""
        self._open.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _fetch(self, shard: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        download = self._download or hf_hub_download
        try:
            return Path(download(self.repository, shard, revision=self.revision, local_dir=self.folder))
        except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
            raise CheckpointError(
                f"{self.repository}: the hub did not give {shard} ({hub_reason(error)}); the same command resumes from "
                "here"
            ) from None

    def _in_cache(self, shard: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, shard, revision=self.revision)
        return Path(found) if isinstance(found, str) else None


def stamp_of(path: Path) -> list[int]:
    """Size and time of change of a file, by which it is known again without being read; [0, 0] where there is none."""
    try:
        found = path.stat()
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]


class HashedShard:
    """A shard that a thread reads and hashes, from its start to its end, and that others read behind it.

    So a disk is read once, in order and without a pause, whatever is done with the tensors meanwhile.

    Args:
        path: the shard.
        hashing: runs the thread.

    Attributes:
        path: the shard.
        stamp: what it was known by before it was read.
        record: its hash and size, when it has been read.
    """

    def __init__(self, path: Path, hashing: Executor) -> None:
        self.path, self.stamp = path, stamp_of(path)
        self._is_stopped = False
        self._passed, self._moved = 0, threading.Condition()
        self.record: Future[FileRecord] = hashing.submit(self._hash, path)

    @property
    def is_hashed(self) -> bool:
        """Whether it has been read to its end, or cannot be, which `record` then raises."""
        return self.record.done() and not isinstance(self.record.exception(), CancelledError)

    def follow(self, end: int) -> None:
        """Wait until the first `end` bytes have been read, or cannot be."""
        with self._moved:
            self._moved.wait_for(lambda: self._passed >= end)

    def stop(self) -> None:
        """Leave the rest of the shard unread: its hash will not be known."""
        self._is_stopped = True

    def _hash(self, path: Path) -> FileRecord:
        try:
            return hash_file(path, self._move_on)
        finally:
            self._move(sys.maxsize)

    def _move_on(self, passed: int) -> None:
        if self._is_stopped:
            raise CancelledError
        self._move(passed)

    def _move(self, passed: int) -> None:
        with self._moved:
            self._passed = passed
            self._moved.notify_all()


class OpenShards:
    """Headers of shards as they come to be needed, and when each of them can go.

    Args:
        shards: the source.
        opened: called with a shard's name and file the first time it is here.
    """

    def __init__(self, shards: Shards, opened: Callable[[str, Path], None]) -> None:
        self.shards = shards
        self._opened = opened
        self._headers: dict[str, dict[str, TensorEntry]] = {}

    def entry(self, key: str) -> TensorEntry:
        """The tensor of this name; its shard is opened if it is not.

        Raises:
            CheckpointError: the shard is damaged, or does not hold what the index says.
        """
        shard = self.shards.weight_map[key]
        if shard not in self._headers:
            path = self.shards.open(shard)
            self._headers[shard] = read_header(path)
            self._opened(shard, path)
        if key not in self._headers[shard]:
            raise CheckpointError(
                f"{shard}: tensor {key} is missing, though the index names it; copy or download it again"
            )
        return self._headers[shard][key]

    def keep_only(self, shards: set[str]) -> None:
        """Drop every open shard that is not among these."""
        for shard in self._headers.keys() - shards:
            del self._headers[shard]
            self.shards.drop(shard)
