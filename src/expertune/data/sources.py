"""Where examples come from: local files or datasets on the Hugging Face hub, each with an optional `[a:b]` slice.

A source is one of them, a glob of files, or a list of these; their examples follow one another in that order.
"""

import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from expertune.config.yaml_file import shortened
from expertune.data.hub import HubRows, is_hub_name
from expertune.data.readers import READERS, RawFile, SourceExample, check_whole, read_rows, reader_of
from expertune.errors import DataError, nearest
from expertune.storage import hash_file
from expertune.text import counted

_SLICE = re.compile(r"(?P<name>.*)\[(?P<start>\d{0,15}):(?P<stop>\d{0,15})\]", re.DOTALL)
_NUM_NAMED = 3
_TEXT_PER_PACKED_BYTE = 4


@dataclass(frozen=True)
class _Part:
    """One file or hub dataset of a source.

    Attributes:
        spec: what the source says of it.
        name: its path or hub name.
        start: the first example of its slice.
        stop: where its slice ends, or None.
        label: how its examples are called.
        rows: the dataset, or None for a file.
    """

    spec: str
    name: str
    start: int
    stop: int | None
    label: str = ""
    rows: HubRows | None = None

    @property
    def path(self) -> Path:
        return _path(self.name)

    @property
    def is_file(self) -> bool:
        return _exists(self.path) or not is_hub_name(self.name) or reader_of(self.path) is not None

    @property
    def num_bytes(self) -> int:
        if self.rows is not None:
            return self.rows.num_bytes
        packed = self.path.suffix.lower() in (".gz", ".parquet")
        return self.path.stat().st_size * (_TEXT_PER_PACKED_BYTE if packed else 1)

    @property
    def file(self) -> RawFile:
        return RawFile(self.path, self.label)

    def read(self) -> Iterator[SourceExample]:
        """All its examples, whatever the slice says."""
        if self.rows is not None:
            return (SourceExample(place, values) for place, values in self.rows)
        read = reader_of(self.path)
        assert read is not None
        return read_rows(self.file, read)

    def sha256(self) -> str:
        if self.rows is None:
            return hash_file(self.path).sha256
        digest = hashlib.sha256()
        for _, values in self.rows:
            digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def state(self) -> Any:
        """What shows that a file is being written to."""
        if self.rows is not None:
            return None
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns


class Source:
    """The files and hub datasets that a source names, by their content; made by `find_source`.

    Args:
        name: the source as the run file names it.
        parts: its files and datasets.

    Attributes:
        name: the source as the run file names it.
        num_bytes: how much text it holds, about; zipped files and Parquet are counted four times.
        sha256: name -> hash of the file's bytes as they lie on disk (of a hub dataset: of its examples as JSON).
    """

    def __init__(self, name: str, parts: Sequence[_Part]) -> None:
        self.name = name
        self._parts = tuple(parts)
        self._states = [part.state() for part in parts]
        self.num_bytes = sum(part.num_bytes for part in parts)
        self.sha256: dict[str, str] = {}
        for part in parts:
            if part.label not in self.sha256:
                self.sha256[part.label] = part.sha256()

    @property
    def content(self) -> list[Any]:
        """What decides the examples, in order: name, hash and slice of each part."""
        return [[part.label, self.sha256[part.label], part.start, part.stop] for part in self._parts]

    def __iter__(self) -> Iterator[SourceExample]:
        """The examples in order; unreadable ones are among them, with their problem."""
        for part in self._parts:
            yield from islice(part.read(), part.start, part.stop)
        self.require_unchanged()

    def read(self, stream: bool = False) -> "SourceExamples":
        """Read every example, and check what can only be known of all of them.

        Args:
            stream: do not hold the examples; each iteration over them reads them again.

        Raises:
            DataError: a part is empty or not readable as a whole, it has fewer examples than its slice asks for, or
                several have different columns.
        """
        held: list[SourceExample] = []
        num_rows: dict[str, int] = {}
        columns: dict[str, set[str]] = {}
        for part in self._parts:
            if part.rows is None:
                check_whole(part.file)
            count, names = 0, columns.setdefault(part.label, set())
            for count, example in enumerate(part.read(), start=1):
                if part.start < count and (part.stop is None or count <= part.stop):
                    if not stream:
                        held.append(example)
                    if example.values is not None:
                        names.update(example.values)
            num_rows[part.label] = num_rows.get(part.label, 0) + _num_taken(part, count)
        _require_same_columns(columns, self.name)
        self.require_unchanged()
        return SourceExamples(self.name, self if stream else held, self.sha256, num_rows)

    def require_unchanged(self) -> None:
        """Refuse a file that was written to since it was found.

        Raises:
            DataError: names the file.
        """
        for part, state in zip(self._parts, self._states, strict=True):
            try:
                changed = part.state() != state
            except OSError:
                changed = True
            if changed:
                raise DataError(f"{part.name}: changed while it was read; start again when nothing writes to it")


@dataclass(frozen=True)
class SourceExamples:
    """The examples of a source.

    Attributes:
        name: the source as the run file names it.
        examples: examples in order, as often as they are iterated over; unreadable ones are among them.
        sha256: see `Source`.
        num_rows: name -> how many examples were taken from it.
    """

    name: str
    examples: Iterable[SourceExample]
    sha256: dict[str, str]
    num_rows: dict[str, int]

    @property
    def readable(self) -> Iterator[dict[str, Any]]:
        """The columns of the examples that could be read."""
        return (example.values for example in self.examples if example.values is not None)


def find_source(spec: str | Sequence[str]) -> Source:
    """Find the files and datasets of a source, and hash them; no example is looked at.

    Args:
        spec: a path, a glob (`rows/*.jsonl`, sorted by path) or a hub name (`name`, `name:split` or
            `name:config:split`; the split is `train` by default), then an optional slice `[a:b]`, `[:b]` or `[a:]`,
            counted from 0 as in Python, of each file. Or a list of these.

    Raises:
        DataError: a part is missing, is of an unknown kind, or cannot be read.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    parts = [part for each in specs for part in _expand(each)]
    labels = _labels([part.path for part in parts if part.is_file])
    datasets: dict[str, HubRows] = {}
    found = []
    for part in parts:
        if part.is_file:
            _require_readable(part.path)
            found.append(replace(part, label=labels[part.path]))
        else:
            if part.name not in datasets:
                datasets[part.name] = HubRows(part.name)
            found.append(replace(part, label=part.name, rows=datasets[part.name]))
    name = _joined(specs)
    try:
        return Source(name, found)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None


def rows_of_slices(spec: str | Sequence[str]) -> int | None:
    """How many examples a source has by its slices alone, with no look at it; None where one has no end, or is a glob.

    Args:
        spec: see `find_source`.

    Raises:
        DataError: a slice is not written as one.
    """
    parts = [_split_slice(each) for each in ([spec] if isinstance(spec, str) else spec)]
    if any(stop is None or glob.escape(name) != name for name, _, stop in parts):
        return None
    return sum(max(stop - start, 0) for _, start, stop in parts if stop is not None)


def local_bytes(spec: str | Sequence[str]) -> int | None:
    """How much text a source of local files holds, about; None where a part is not on this machine.

    Args:
        spec: see `find_source`.

    Raises:
        DataError: a slice is not written as one, no file matches a pattern, or a file is missing or cannot be read.
    """
    parts = [part for each in ([spec] if isinstance(spec, str) else spec) for part in _expand(each)]
    for part in parts:
        if part.is_file:
            _require_readable(part.path)
    return sum(part.num_bytes for part in parts) if all(part.is_file for part in parts) else None


def _expand(spec: str) -> list[_Part]:
    name, start, stop = _split_slice(spec)
    path = _path(name)
    if _exists(path) or glob.escape(name) == name:
        return [_Part(spec, name, start, stop)]
    # Not Path.glob, which takes no absolute pattern.
    found = sorted(each for each in glob.glob(str(path), recursive=True) if Path(each).is_file())  # noqa: PTH207
    if not found:
        raise DataError(f"{name}: no file matches this pattern (from {Path.cwd()})")
    return [_Part(spec, each, start, stop) for each in found]


def _path(name: str) -> Path:
    # Not Path.expanduser, which raises where there is no such user.
    return Path(os.path.expanduser(name))  # noqa: PTH111


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        return False


def _split_slice(spec: str) -> tuple[str, int, int | None]:
    if not spec.endswith("]"):
        return spec, 0, None
    match = _SLICE.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec}: a slice is written [a:b], [:b] or [a:] with row numbers counted from 0")
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """How examples call their files: by name, with as many folders in front as it takes to tell them apart."""
    different = set(paths)
    for depth in range(1, max((len(path.parts) for path in different), default=0) + 1):
        labels = {path: "/".join(path.parts[-depth:]) for path in different}
        if len(set(labels.values())) == len(different):
            return labels
    return {path: str(path) for path in different}


def _joined(specs: Sequence[str]) -> str:
    more = f" and {len(specs) - _NUM_NAMED} more" if len(specs) > _NUM_NAMED else ""
    return ", ".join(specs[:_NUM_NAMED]) + more


def _require_same_columns(columns: dict[str, set[str]], name: str) -> None:
    """Examples of one layout only: a template that fits some files would misread the others."""
    first, *others = [label for label, names in columns.items() if names] or [""]
    for other in others:
        if columns[other] != columns[first]:
            raise DataError(
                f"{name}: the files have different columns: {first} has {_named(columns[first])}, and {other} has "
                f"{_named(columns[other])}; give all the same columns, or train on one kind"
            )


def _named(columns: set[str]) -> str:
    return shortened(", ".join(sorted(columns)), 500) or "none"


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {counted(count, 'example')}"


def _num_taken(part: _Part, count: int) -> int:
    """How many of a part's examples its slice takes."""
    if not count:
        raise DataError(f"{part.name}: holds no examples; is it the right file?")
    start, end = part.start, count if part.stop is None else part.stop
    spec = part.spec if part.spec.startswith(part.name) else f"{part.name} (of {part.spec})"
    if end > count:
        raise DataError(f"{spec}: the slice ends at row {end}, but there {_are(count)}; write [{start}:]")
    if start >= end:
        raise DataError(f"{spec}: the slice holds no examples; there {_are(count)}, counted from 0")
    return end - start


def _require_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: is a folder; name one file in it, or several as {path / '*.jsonl'}")
        if reader_of(path) is None:
            raise DataError(
                f"{path}: unknown kind of file; use one of {', '.join(READERS)} (text kinds may end in .gz)"
            )
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: is a device or a pipe; examples are read several times, so write them to a file")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        # A ValueError is a path that no file can have, with a NUL in it.
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor the folder {path.parent}"
    meant = nearest(path.name, (other.name for other in path.parent.iterdir()))
    return f"; did you mean {path.with_name(meant)}?" if meant else ""
