"""What a file of examples holds: JSONL, JSON, CSV, Parquet and plain text, the text kinds optionally gzipped.

Local files are read without the `datasets` library. Every example keeps its place, so that each later message can name
it, and an example that cannot be read is a problem of its own where the rest of the file can be.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertune.config.yaml_file import shortened
from expertune.errors import DataError, first_line

# What no text and no table comes near; what a file made to exhaust memory does.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED = 16 * 2**20
_DEEPEST = 100

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceExample:
    """An example as its source holds it.

    Attributes:
        place: file and example, counted from 1; in line-based files the example is the line's number.
        values: column -> value, or None where the example could not be read.
        problem: why it could not be read, with the fix.
    """

    place: str
    values: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class RawFile:
    """A file's bytes.

    Attributes:
        path: the file, for errors that concern it as a whole.
        label: how its examples call it.
        content: its bytes, unzipped.
    """

    path: Path
    label: str
    content: bytes

    def place(self, number: int) -> str:
        """How messages call an example, counted from 1."""
        return f"{self.label}: row {number}"


Reader = Callable[[RawFile], Iterator[SourceExample]]


def reader_of(path: Path) -> Reader | None:
    """What reads files of this name; None where nothing does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    return None if zipped and kind == ".parquet" else READERS.get(kind)


def read_rows(path: Path, label: str, raw: bytes, read: Reader) -> list[SourceExample]:
    """Every example of a file.

    Args:
        path: the file.
        label: how messages call its examples.
        raw: its bytes as they lie on disk.
        read: `reader_of(path)`.

    Raises:
        DataError: the file is empty, or cannot be read as a whole.
    """
    content = _unzip(path, raw) if path.suffix.lower() == ".gz" else raw
    if not content.removeprefix(_BOM).strip():
        raise DataError(f"{path}: the file is empty; is it the right file?")
    return list(read(RawFile(path, label, content)))


def _unzip(path: Path, raw: bytes) -> bytes:
    most = max(_ALWAYS_UNPACKED, _MOST_UNPACKED * len(raw))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    if len(content) > most:
        raise DataError(
            f"{path}: {len(raw)} bytes unpack to more than {_MOST_UNPACKED} times as many, as no text does; if it is "
            "one, unpack it (gzip -d) and name the unpacked file"
        )
    return content


def _read_lines(file: RawFile) -> Iterator[tuple[str, str, str]]:
    """(place, text, problem) of each line that is not blank.

    Lines end at the byte "\\n" and nowhere else: `str.splitlines` would also split at U+2028 and its like, which
    JSON allows inside a string.
    """
    offset = 0
    for number, line in enumerate(io.BytesIO(file.content.removeprefix(_BOM)), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield file.place(number), "", _encoding_problem(error, offset)
        else:
            if text.strip():
                yield file.place(number), text.removesuffix("\n").removesuffix("\r"), ""
        offset += len(line)


def _read_jsonl(file: RawFile) -> Iterator[SourceExample]:
    for place, text, problem in _read_lines(file):
        if problem:
            yield SourceExample(place, None, problem)
            continue
        try:
            value = _parse_json(text)
        except (ValueError, RecursionError) as error:
            yield SourceExample(place, None, f"not valid JSON ({error}); each line is one JSON object")
        else:
            yield _object_example(place, value)


def _read_json(file: RawFile) -> Iterator[SourceExample]:
    text = _decode(file)
    try:
        value = _parse_json(text)
    except (ValueError, RecursionError) as error:
        lines = "; one object per line is JSONL: name the file .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{file.path}: not valid JSON ({error}){lines}") from None
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, start=1):
        yield _object_example(file.place(number), item)


def _parse_json(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_each_key_once)
    # Deeper than any example is, and deep enough to exhaust the stack of whatever walks it later.
    if text.count("[") + text.count("{") > _DEEPEST and _is_deeper(value, _DEEPEST):
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shortened(repr(twice))} is there twice, and only one of its values could be read")
    return values


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _object_example(place: str, value: Any) -> SourceExample:
    if isinstance(value, dict):
        return SourceExample(place, value)
    return SourceExample(place, None, f"is {type(value).__name__}, not an object with columns")


def _read_csv(file: RawFile) -> Iterator[SourceExample]:
    text = _decode(file)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 0
    with _fields_of(len(text)):
        try:
            header = next(reader, [])
            if len(set(header)) != len(header) or "" in header or not header:
                raise DataError(f"{file.path}: the first line must name each column once, got {shortened(header)}")
            for number, fields in enumerate(filter(None, reader), start=1):
                if len(fields) == len(header):
                    yield SourceExample(file.place(number), dict(zip(header, fields, strict=True)))
                else:
                    found = f"has {len(fields)} fields where the header names {len(header)}"
                    what = f"{found} (ends on line {reader.line_num}); quote fields that hold commas"
                    yield SourceExample(file.place(number), None, what)
        except csv.Error as error:
            raise DataError(
                f"{file.path}: row {number + 1} (line {reader.line_num}): not valid CSV ({error}); check the quotes"
            ) from None


@contextmanager
def _fields_of(length: int) -> Iterator[None]:
    """Let fields be as long as the file: Python's reader refuses more than 128 KiB, which a document easily is."""
    before = csv.field_size_limit(min(max(length, csv.field_size_limit()), sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_text(file: RawFile) -> Iterator[SourceExample]:
    for place, text, problem in _read_lines(file):
        yield SourceExample(place, None if problem else {"text": text}, problem)


def _read_parquet(file: RawFile) -> Iterator[SourceExample]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, most = 0, max(_ALWAYS_UNPACKED, _MOST_UNPACKED * len(file.content))
    try:
        table = pq.ParquetFile(pa.BufferReader(file.content))
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(f"{file.path}: the columns {shortened(names)} must each be there once")
        # A value that repeats takes no space, so that a small file may claim any number of examples.
        if table.metadata.num_rows > max(_ALWAYS_UNPACKED // 1024, len(file.content)):
            raise DataError(f"{file.path}: claims {table.metadata.num_rows} examples in {len(file.content)} bytes")
        for batch in table.iter_batches(batch_size=256):
            most -= batch.nbytes
            if most < 0:
                raise DataError(
                    f"{file.path}: {len(file.content)} bytes unpack to more than {_MOST_UNPACKED} times as many, as no "
                    "text does; if it is one, write the examples as JSONL"
                )
            for values in batch.to_pylist():
                number += 1
                yield SourceExample(file.place(number), values)
    except DataError:
        raise
    except Exception as error:  # Arrow raises errors of many kinds for a damaged file
        reason = first_line(error)
        raise DataError(
            f"{file.path}: not a whole Parquet file, or one with values that cannot be read ({reason}); copy it again"
        ) from None


READERS: Mapping[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""What reads a kind of file, by its name's end."""


def _decode(file: RawFile) -> str:
    raw = file.content
    try:
        return raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{file.path}: line {line}: {_encoding_problem(error, 0)}") from None


def _encoding_problem(error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    utf_16 = offset == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    return (
        f"not UTF-8: byte 0x{byte:02x} at byte offset {offset + error.start}; "
        f"convert the file, e.g. iconv -f {'utf-16' if utf_16 else 'latin1'} -t utf-8"
    )
