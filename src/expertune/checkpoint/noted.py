"""What of an NF4 folder is finished: the note on the disk by which an interrupted `quantize` resumes."""

import json
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

from expertune.checkpoint.formats.nf4_folder import (
    ABSMAX,
    FORMAT_VERSION,
    damaged_progress,
    is_file_record,
    read_progress,
    write_progress,
)
from expertune.checkpoint.model_folder import PROGRESS_MARK
from expertune.checkpoint.shards import HashedShard, Shards, stamp_of
from expertune.errors import CheckpointError
from expertune.storage import hash_file

# Of a finished file, shards that it was made of and whose hash was not known yet: name -> size and time of change.
_UNHASHED = "unhashed"
# Of a shard whose hash is known: its time of change. One that has another is hashed again.
_CHANGED = "mtime_ns"
# What settings that nobody asked for, and that are not written, stand for.
_UNSAID: dict[str, Any] = {"fit": ABSMAX, "layers": {}}


class Notes:
    """The note of one folder; what it says is finished has been checked.

    A file is noted when it is on the disk. The manifest needs the hashes of its shards too, and reading a large shard
    to its end takes minutes, for which Ctrl-C does not wait. Until they are known, the note has the shards' sizes and
    times of change: where these are the same later, the file is kept, and the hashes are taken then. A shard whose hash
    is known, and that has changed since, is an error: a part of the folder is made of what is no longer there.

    The folder may come from anywhere: of what it holds, only files of this work are looked at.

    Args:
        out: the folder.
        plan: what identifies the work: all that decides its bytes.
        shards: the source's.
        made_of: the files of the work -> names of the shards that each is made of.

    Raises:
        CheckpointError: the note is damaged, or of other work, or a shard has changed.
        OSError: a file or a shard cannot be read.
    """

    def __init__(
        self, out: Path, plan: Mapping[str, Any], shards: Shards, made_of: Mapping[str, Collection[str]]
    ) -> None:
        self._out, self._source = out, shards
        fresh: dict[str, Any] = {"format_version": FORMAT_VERSION, "plan": dict(plan), "shards": {}, "files": {}}
        found = read_progress(out)
        if found is not None:
            require_same_work(out, plan, found["plan"])
            if problem := _problem_of(found, set(shards.weight_map.values()), made_of):
                raise damaged_progress(out, problem)
        self._values = found or fresh
        self.files: dict[str, Any] = self._values["files"]
        for file, record in list(self.files.items()):
            path, unhashed = out / file, record[_UNHASHED]
            is_known = set(made_of[file]) <= self.shards.keys() | unhashed.keys()
            if not (
                is_known
                and path.is_file()
                and hash_file(path).to_json() == file_record(record)
                and all(_is_same(shards, *each) for each in unhashed.items())
            ):
                del self.files[file]
        self._require_same_shards({shard for file in self.files for shard in made_of[file]})

    def _require_same_shards(self, needed: Collection[str]) -> None:
        """Compare the shards whose hashes are known, and forget those that no file that is kept was made of."""
        for shard, record in list(self.shards.items()):
            if shard not in needed:
                del self.shards[shard]
                continue
            if self._source.are_deleted:
                continue  # the source is one commit of a repository
            path = self._source.open(shard)
            nbytes, changed = stamp_of(path)
            if (nbytes, changed) == (record["bytes"], record[_CHANGED]):
                continue
            if nbytes != record["bytes"] or hash_file(path).to_json() != file_record(record):
                raise _has_changed(path)
            record[_CHANGED] = changed

    @property
    def shards(self) -> dict[str, Any]:
        """sha256, size and time of change of the shards that are known, by name."""
        shards: dict[str, Any] = self._values["shards"]
        return shards

    @property
    def unhashed(self) -> set[str]:
        """The shards that finished files were made of, and whose hashes are not known."""
        return {shard for record in self.files.values() for shard in record[_UNHASHED]}

    def save(self) -> None:
        """Write the note."""
        write_progress(self._out, self._values)

    def add(self, file: str, record: Mapping[str, Any], made_of: Mapping[str, HashedShard]) -> None:
        """Note a file that is on the disk, and what is known by now of the shards that it was made of.

        Raises:
            CheckpointError: a shard has changed since a call before this one.
            OSError: a shard cannot be read.
        """
        self.files[file] = dict(record) | {_UNHASHED: {shard: hashed.stamp for shard, hashed in made_of.items()}}
        self.save()
        self.settle(made_of)

    def settle(self, hashed: Mapping[str, HashedShard], waits: bool = False) -> None:
        """Note the hashes that are known, or that come to be known.

        Args:
            hashed: the shards that have been opened.
            waits: for all of them; otherwise those that are not known yet stay unhashed, and those that were stopped.

        Raises:
            CheckpointError: a shard has changed since a call before this one.
            OSError: a shard cannot be read.
        """
        left = self.unhashed
        for shard, each in sorted(hashed.items()):
            if shard in left and (waits or each.is_hashed):
                self._settle(shard, each)
                left.remove(shard)
        self.save()

    def _settle(self, shard: str, hashed: HashedShard) -> None:
        before, now = self.shards.get(shard), hashed.record.result().to_json()
        is_as_read = self._source.are_deleted or stamp_of(hashed.path) == hashed.stamp
        if not is_as_read or (before is not None and file_record(before) != now):
            raise _has_changed(hashed.path)
        self.shards[shard] = now | {_CHANGED: hashed.stamp[1]}
        for record in self.files.values():
            record[_UNHASHED].pop(shard, None)

    def remove(self) -> None:
        """Nothing is left to be done."""
        (self._out / PROGRESS_MARK).unlink(missing_ok=True)


def _is_same(shards: Shards, shard: str, stamp: list[int]) -> bool:
    """Whether a shard is as it was; one that is fetched again is fetched for what is made of it, too."""
    return not shards.are_deleted and shard in shards.weight_map.values() and stamp_of(shards.open(shard)) == stamp


def _has_changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: has changed since this NF4 folder was started; restore it, or start again in another folder"
    )


def _problem_of(note: Mapping[str, Any], shards: Set[str], files: Collection[str]) -> str | None:
    """What a note says that none of this work says: other names, or no hashes, sizes and times."""
    for shard, record in note["shards"].items():
        if shard not in shards:
            return f"{shard!r} is no shard of the source"
        if not is_file_record(record) or type(record.get(_CHANGED)) is not int:
            return f"what it says of the shard {shard!r} is no sha256, size and time"
    for file, record in note["files"].items():
        if file not in files:
            return f"{file!r} is no file of this folder's"
        if not is_file_record(record):
            return f"what it says of the file {file!r} is no sha256 and size"
        left_out, unhashed = record.get("left_out"), record.get(_UNHASHED)
        if not isinstance(left_out, list) or not all(isinstance(key, str) for key in left_out):
            return f"what it says that {file!r} leaves out are no names of tensors"
        if (
            not isinstance(unhashed, dict)
            or not all(map(_is_stamp, unhashed.values()))
            or not unhashed.keys() <= shards
        ):
            return f"what it says of the shards of {file!r} are no sizes and times"
    return None


def _is_stamp(value: Any) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [int, int]


def require_same_work(out: Path, plan: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse a folder that was made, or started, with another source or other settings.

    Raises:
        CheckpointError: names what differs.
    """
    for key, now in plan.items():
        if before.get(key) != now:
            name, was = key.removesuffix("_sha256"), before.get(key)
            if isinstance(was, Mapping) and isinstance(now, Mapping):
                inner = next(each for each in [*now, *was] if was.get(each) != now.get(each))
                name, (was, now) = f"{name}.{inner}", (each.get(inner, _UNSAID.get(inner)) for each in (was, now))
            raise CheckpointError(
                f"{out}: was made with {name}: {json.dumps(was)}, and {json.dumps(now)} is asked for; choose another "
                "folder, or delete this one"
            )


def file_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest has of a file that is noted."""
    return {key: record[key] for key in ("sha256", "bytes")}
