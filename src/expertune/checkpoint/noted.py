"""What of an NF4 folder is finished: the note on the disk by which an interrupted `quantize` resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertune.checkpoint.formats.nf4_folder import FORMAT_VERSION, PROGRESS_MARK, read_progress
from expertune.checkpoint.shards import HashedShard, Shards, stamp_of
from expertune.checkpoint.writer import hash_file
from expertune.errors import CheckpointError
from expertune.storage import write_json

# Of a finished file, shards that it was made of and whose hash was not known yet: name -> size and time of change.
_UNHASHED = "unhashed"


class Notes:
    """The note of one folder; what it says is finished has been checked.

    A file is noted when it is on the disk. The manifest needs the hashes of its shards too, and reading a large shard
    to its end takes minutes, for which Ctrl-C does not wait. Until they are known, the note has the shards' sizes and
    times of change: where these are the same later, the file is kept, and the hashes are taken then.

    Args:
        out: the folder.
        plan: what identifies the work: all that decides its bytes.
        shards: the source's.

    Raises:
        CheckpointError: the note is damaged, or of other work.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], shards: Shards) -> None:
        self._path = out / PROGRESS_MARK
        fresh: dict[str, Any] = {"format_version": FORMAT_VERSION, "plan": dict(plan), "shards": {}, "files": {}}
        found = read_progress(out)
        if found is not None:
            require_same_work(out, plan, found["plan"])
        self._values = found or fresh
        self.files: dict[str, Any] = self._values["files"]
        for file, record in list(self.files.items()):
            path = out / file
            is_whole = path.is_file() and hash_file(path).to_json() == file_record(record)
            if not is_whole or not all(_is_same(shards, *each) for each in record.get(_UNHASHED, {}).items()):
                del self.files[file]

    @property
    def shards(self) -> dict[str, Any]:
        """sha256 and size of the shards that are known, by name."""
        shards: dict[str, Any] = self._values["shards"]
        return shards

    @property
    def unhashed(self) -> set[str]:
        """The shards that finished files were made of, and whose hashes are not known."""
        return {shard for record in self.files.values() for shard in record.get(_UNHASHED, {})}

    def save(self) -> None:
        """Write the note."""
        write_json(self._path, self._values)

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
        if before is not None and before != now:
            raise CheckpointError(
                f"{hashed.path}: has changed since this NF4 folder was started; restore it, or start again in another "
                "folder"
            )
        self.shards[shard] = now
        for record in self.files.values():
            record.get(_UNHASHED, {}).pop(shard, None)

    def remove(self) -> None:
        """Nothing is left to be done."""
        self._path.unlink(missing_ok=True)


def _is_same(shards: Shards, shard: str, stamp: list[int]) -> bool:
    """Whether a shard is as it was; one that is fetched again is fetched for what is made of it, too."""
    return not shards.are_deleted and shard in shards.weight_map.values() and stamp_of(shards.open(shard)) == stamp


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
                name, was, now = f"{name}.{inner}", was.get(inner), now.get(inner)
            raise CheckpointError(
                f"{out}: was made with {name}: {json.dumps(was)}, and {json.dumps(now)} is asked for; choose another "
                "folder, or delete this one"
            )


def file_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest has of a file that is noted."""
    return {key: record[key] for key in ("sha256", "bytes")}
