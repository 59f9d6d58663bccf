"""Where rows come from: a local file or a dataset on the Hugging Face hub, with an optional `[a:b]` slice.

Local files are read without the `datasets` library: JSONL, JSON, CSV and plain text (each optionally gzipped), and
Parquet. Every row keeps its place, so that each later message can name it.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertune.data.hub import is_hub_name, read_hub
from expertune.errors import DataError

_SLICE = re.compile(r"(?P<name>.*)\[(?P<start>\d*):(?P<stop>\d*)\]", re.DOTALL)


@dataclass(frozen=True)
class SourceRow:
    """A row as its source holds it.

    Attributes:
        place: file and row, counted from 1; in line-based files the row is the line's number.
        values: column -> value, or None where the row could not be read.
        problem: why it could not be read, with the mend.
    """

    place: str
    values: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """The rows that a source names.

    Attributes:
        name: the source as the run file names it.
        rows: rows in order; unreadable ones are among them, with their problem.
        sha256: name -> hash of the file's bytes as they lie on disk (of a hub dataset: of its rows as JSON).
    """

    name: str
    rows: list[SourceRow]
    sha256: dict[str, str]


def read_source(spec: str) -> Source:
    """Read every row that `spec` names.

    Args:
        spec: a path, or a hub name (`name`, `name:split` or `name:config:split`; the split is `train` by default),
            then an optional slice `[a:b]`, `[:b]` or `[a:]`, counted from 0 as in Python.

    Raises:
        DataError: the source is missing, empty, of an unknown kind or not readable as a whole, or it has fewer rows
            than the slice asks for.
    """
    name, start, stop = _split_slice(spec)
    path = Path(name).expanduser()
    if path.exists() or not is_hub_name(name) or _reader(path) is not None:
        rows, sha256 = _read_file(path)
    else:
        rows = [SourceRow(place, values) for place, values in read_hub(name)]
        sha256 = {name: _sha256_of_rows(rows)}
    if not rows:
        raise DataError(f"{name}: holds no rows; is it the right file?")
    return Source(spec, _cut(rows, start, stop, spec), sha256)


def _split_slice(spec: str) -> tuple[str, int, int | None]:
    if not spec.endswith("]"):
        return spec, 0, None
    match = _SLICE.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec}: a slice is written [a:b], [:b] or [a:] with row numbers counted from 0")
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _cut(rows: list[SourceRow], start: int, stop: int | None, spec: str) -> list[SourceRow]:
    end = len(rows) if stop is None else stop
    if end > len(rows):
        raise DataError(f"{spec}: the slice ends at row {end}, but there are {len(rows)} rows; write [{start}:]")
    if start >= end:
        raise DataError(f"{spec}: the slice holds no rows; there are {len(rows)} rows, counted from 0")
    return rows[start:end]


def _read_file(path: Path) -> tuple[list[SourceRow], dict[str, str]]:
    read = _reader(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name one file in it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if read is None:
        raise DataError(f"{path}: unknown kind of file; use one of {', '.join(_READERS)} (text kinds may end in .gz)")
    sha256 = {path.name: hashlib.sha256(raw).hexdigest()}
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    if not raw.strip():
        raise DataError(f"{path}: the file is empty; is it the right file?")
    return list(read(path, raw)), sha256


def _reader(path: Path) -> Callable[[Path, bytes], Iterator[SourceRow]] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    return None if zipped and kind == ".parquet" else _READERS.get(kind)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor the folder {path.parent}"
    names = [other.name for other in path.parent.iterdir()]
    match = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(match[0])}?" if match else ""


def _read_lines(path: Path, raw: bytes) -> Iterator[tuple[str, str, str]]:
    """(place, text, problem) of each line that is not blank.

    Lines end at the byte "\\n" and nowhere else: `str.splitlines` would also split at U+2028 and its like, which
    JSON allows inside a string.
    """
    offset = 0
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path.name}: row {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield place, "", _encoding_problem(error, offset)
        else:
            if text.strip():
                yield place, text.removesuffix("\r"), ""
        offset += len(line) + 1


def _read_jsonl(path: Path, raw: bytes) -> Iterator[SourceRow]:
    for place, text, problem in _read_lines(path, raw):
        if problem:
            yield SourceRow(place, None, problem)
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield SourceRow(place, None, f"not valid JSON ({error}); each line is one JSON object")
        else:
            yield _object_row(place, value)


def _read_json(path: Path, raw: bytes) -> Iterator[SourceRow]:
    try:
        value = json.loads(_decode(path, raw))
    except (ValueError, RecursionError) as error:
        lines = "; one object per line is JSONL: name the file .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path}: not valid JSON ({error}){lines}") from None
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, start=1):
        yield _object_row(f"{path.name}: row {number}", item)


def _object_row(place: str, value: Any) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(place, value)
    return SourceRow(place, None, f"is {type(value).__name__}, not an object with columns")


def _read_csv(path: Path, raw: bytes) -> Iterator[SourceRow]:
    reader = csv.reader(io.StringIO(_decode(path, raw), newline=""), strict=True)
    number = 0
    try:
        header = next(reader)
        if len(set(header)) != len(header) or "" in header:
            raise DataError(f"{path}: the first line must name each column once, got {header}")
        for number, fields in enumerate(filter(None, reader), start=1):
            place = f"{path.name}: row {number}"
            if len(fields) == len(header):
                yield SourceRow(place, dict(zip(header, fields, strict=True)))
            else:
                what = f"has {len(fields)} fields where the header names {len(header)} (ends on line {reader.line_num})"
                yield SourceRow(place, None, f"{what}; quote fields that hold commas")
    except csv.Error as error:
        raise DataError(
            f"{path}: row {number + 1} (line {reader.line_num}): not valid CSV ({error}); check the quotes"
        ) from None


def _read_text(path: Path, raw: bytes) -> Iterator[SourceRow]:
    for place, text, problem in _read_lines(path, raw):
        yield SourceRow(place, None if problem else {"text": text}, problem)


def _read_parquet(path: Path, raw: bytes) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(pa.BufferReader(raw)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}); copy it again") from None
    for number, row in enumerate(values, start=1):
        yield SourceRow(f"{path.name}: row {number}", row)


_READERS: dict[str, Callable[[Path, bytes], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line}: {_encoding_problem(error, 0)}") from None


def _encoding_problem(error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    return (
        f"not UTF-8: byte 0x{byte:02x} at byte offset {offset + error.start}; "
        "convert the file, e.g. iconv -f latin1 -t utf-8"
    )


def _sha256_of_rows(rows: list[SourceRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
