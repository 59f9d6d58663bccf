"""Where examples come from: local files or datasets on the Hugging Face hub, each with an optional `[a:b]` slice.

A source is one of them, a glob of files, or a list of these; their examples follow one another in that order.
"""

import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertune.config.yaml_file import shortened
from expertune.data.hub import is_hub_name, read_hub
from expertune.data.readers import READERS, SourceExample, read_rows, reader_of
from expertune.errors import DataError, nearest

_SLICE = re.compile(r"(?P<name>.*)\[(?P<start>\d{0,15}):(?P<stop>\d{0,15})\]", re.DOTALL)
_NUM_NAMED = 3


@dataclass(frozen=True)
class Source:
    """The examples that a source names.

    Attributes:
        name: the source as the run file names it.
        examples: examples in order; unreadable ones are among them, with their problem.
        sha256: name -> hash of the file's bytes as they lie on disk (of a hub dataset: of its examples as JSON).
        num_rows: name -> how many examples were taken from it.
    """

    name: str
    examples: list[SourceExample]
    sha256: dict[str, str]
    num_rows: dict[str, int]


@dataclass(frozen=True)
class _Part:
    """One file or hub dataset of a source: its name, its slice, and how its examples are called."""

    spec: str
    name: str
    start: int
    stop: int | None

    @property
    def path(self) -> Path:
        return _path(self.name)

    @property
    def is_file(self) -> bool:
        return _exists(self.path) or not is_hub_name(self.name) or reader_of(self.path) is not None


def read_source(spec: str | Sequence[str]) -> Source:
    """Read every example that `spec` names.

    Args:
        spec: a path, a glob (`rows/*.jsonl`, sorted by path) or a hub name (`name`, `name:split` or
            `name:config:split`; the split is `train` by default), then an optional slice `[a:b]`, `[:b]` or `[a:]`,
            counted from 0 as in Python, of each file. Or a list of these.

    Raises:
        DataError: a source is missing, empty, of an unknown kind or not readable as a whole, it has fewer examples than
            its slice asks for, or several have different columns.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    parts = [part for each in specs for part in _expand(each)]
    labels = _labels([part.path for part in parts if part.is_file])
    source = Source(_joined(specs), [], {}, {})
    columns: dict[str, set[str]] = {}
    for part in parts:
        label = labels[part.path] if part.is_file else part.name
        examples, source.sha256[label] = _read_file(part.path, label) if part.is_file else _read_dataset(part.name)
        if not examples:
            raise DataError(f"{part.name}: holds no examples; is it the right file?")
        examples = _cut(examples, part)
        source.examples.extend(examples)
        source.num_rows[label] = source.num_rows.get(label, 0) + len(examples)
        columns.setdefault(label, set()).update(*(example.values for example in examples if example.values is not None))
    _require_same_columns(columns, source.name)
    return source


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


def _cut(examples: list[SourceExample], part: _Part) -> list[SourceExample]:
    start, end = part.start, len(examples) if part.stop is None else part.stop
    spec = part.spec if part.spec.startswith(part.name) else f"{part.name} (of {part.spec})"
    if end > len(examples):
        raise DataError(
            f"{spec}: the slice ends at row {end}, but there are {len(examples)} examples; write [{start}:]"
        )
    if start >= end:
        raise DataError(f"{spec}: the slice holds no examples; there are {len(examples)} examples, counted from 0")
    return examples[start:end]


def _read_dataset(name: str) -> tuple[list[SourceExample], str]:
    examples = [SourceExample(place, values) for place, values in read_hub(name)]
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.values, sort_keys=True, default=str).encode() + b"\n")
    return examples, digest.hexdigest()


def _read_file(path: Path, label: str) -> tuple[list[SourceExample], str]:
    read = reader_of(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: is a folder; name one file in it, or several as {path / '*.jsonl'}")
        if read is None:
            raise DataError(
                f"{path}: unknown kind of file; use one of {', '.join(READERS)} (text kinds may end in .gz)"
            )
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: is a device or a pipe; examples are read several times, so write them to a file")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        # A ValueError is a path that no file can have, with a NUL in it.
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return read_rows(path, label, raw, read), hashlib.sha256(raw).hexdigest()


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor the folder {path.parent}"
    meant = nearest(path.name, (other.name for other in path.parent.iterdir()))
    return f"; did you mean {path.with_name(meant)}?" if meant else ""
