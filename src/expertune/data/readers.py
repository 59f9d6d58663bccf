"""What a file of examples holds: JSONL, JSON, CSV, TSV, Parquet and plain text, the text kinds optionally gzipped.

Local files are read without the `datasets` library. Every example keeps its place, so that each later message can name
it, and an example that cannot be read is a problem of its own where the rest of the file can be.

Examples are read one by one, whatever the file's size; only `.json`, whose end may change what its start means, is held
as a whole.
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
from typing import Any, BinaryIO, cast

from expertune.config.yaml_file import shortened
from expertune.errors import DataError, first_line

# What no text and no table comes near; what a file made to exhaust memory does.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED = 16 * 2**20
_DEEPEST = 100

# What separates the columns of a table, and what it is called.
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**16


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
    """A file of examples.

    Attributes:
        path: the file, for errors that concern it as a whole.
        label: how its examples call it.
    """

    path: Path
    label: str

    def place(self, number: int) -> str:
        """How messages call an example, counted from 1."""
        return f"{self.label}: row {number}"

    @property
    def num_bytes(self) -> int:
        """Its size on disk."""
        return self.path.stat().st_size

    @property
    def is_zipped(self) -> bool:
        """Whether its content is gzipped."""
        return self.path.suffix.lower() == ".gz"

    @property
    def most_bytes(self) -> int:
        """The most bytes that it may hold, unzipped."""
        return max(_ALWAYS_UNPACKED, _MOST_UNPACKED * self.num_bytes) if self.is_zipped else self.num_bytes

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its content, unzipped; a byte order mark is still in it."""
        with self.path.open("rb") as file:
            yield cast(BinaryIO, io.BufferedReader(_Unzipped(self, file))) if self.is_zipped else file


class _Unzipped(io.RawIOBase):
    """The content of a gzip file; reading raises DataError where that is not whole, or is more than a text can be."""

    def __init__(self, file: RawFile, zipped: BinaryIO) -> None:
        self._file, self._left = file, file.most_bytes
        self._content = gzip.GzipFile(fileobj=zipped)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; the number of bytes, 0 at the end."""
        path = self._file.path
        try:
            count = self._content.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); copy it again") from None
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"{path}: {self._file.num_bytes} bytes unpack to more than {_MOST_UNPACKED} times as many, as no text "
                "does; if it is one, unpack it (gzip -d) and name the unpacked file"
            )
        return count


Reader = Callable[[RawFile], Iterator[SourceExample]]


def reader_of(path: Path) -> Reader | None:
    """What reads files of this name; None where nothing does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    return None if zipped and kind == ".parquet" else READERS.get(kind)


def read_rows(file: RawFile, read: Reader) -> Iterator[SourceExample]:
    """The examples of a file, one by one; `check_whole` comes first.

    Args:
        file: the file.
        read: `reader_of(file.path)`.

    Raises:
        DataError: the file cannot be read as a whole; maybe not before its last example.
    """
    try:
        yield from read(file)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror or error})") from None


def check_whole(file: RawFile) -> None:
    """Refuse an empty file, and a zipped one that is damaged or made to exhaust memory.

    Raises:
        DataError: names the file and the fix.
    """
    try:
        with file.open() as stream:
            blank = not stream.read(_CHUNK).removeprefix(_BOM).strip()
            while (blank or file.is_zipped) and (chunk := stream.read(_CHUNK)):
                blank = blank and not chunk.strip()
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror or error})") from None
    if blank:
        raise DataError(f"{file.path}: the file is empty; is it the right file?")


def _raw_lines(file: RawFile) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, content) of each line, its end included and a byte order mark left out.

    Lines end at the byte "\\n" and nowhere else: `str.splitlines` would also split at U+2028 and its like, which
    JSON allows inside a string.
    """
    offset = 0
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            yield number, offset, line
            offset += len(line)


def _read_lines(file: RawFile) -> Iterator[tuple[str, str, str]]:
    """(place, text, problem) of each line that is not blank."""
    for number, offset, line in _raw_lines(file):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield file.place(number), "", _encoding_problem(error, offset)
        else:
            if text.strip():
                yield file.place(number), text.removesuffix("\n").removesuffix("\r"), ""


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
    with file.open() as stream:
        content = stream.read().removeprefix(_BOM)
    try:
        value = _parse_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except (ValueError, RecursionError) as error:
        lines = "; one object per line is JSONL: name the file .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{file.path}: not valid JSON ({error}){lines}") from None
    del content
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
    separator = _separator(file)
    with file.open() as stream:
        reader = csv.reader(
            io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=separator, strict=True
        )
        number, longest = 0, file.most_bytes
        try:
            header = _next_fields(reader, longest) or []
            if len(set(header)) != len(header) or "" in header or not header:
                raise DataError(f"{file.path}: the first line must name each column once, got {shortened(header)}")
            while (fields := _next_fields(reader, longest)) is not None:
                if not fields:
                    continue
                number += 1
                if len(fields) == len(header):
                    yield SourceExample(file.place(number), dict(zip(header, fields, strict=True)))
                else:
                    found = f"has {len(fields)} fields where the header names {len(header)}"
                    what = f"{found} (ends on line {reader.line_num}); quote fields that hold {_SEPARATORS[separator]}"
                    yield SourceExample(file.place(number), None, what)
        except UnicodeDecodeError:
            raise _not_utf8(file) from None
        except csv.Error as error:
            raise DataError(
                f"{file.path}: row {number + 1} (line {reader.line_num}): not valid CSV ({error}); check the quotes"
            ) from None


def _separator(file: RawFile) -> str:
    """What separates a table's columns: a comma, unless the first line is one column by it and several by another.

    Spreadsheets write semicolons where a comma is the decimal mark. A sentence may hold one too: by what separates
    columns, at least half of the first rows have as many fields as the first line.
    """
    with file.open() as stream:
        content = stream.read(_CHUNK)
    text = content.removeprefix(_BOM).decode("utf-8", "replace")
    num_columns = {}
    for separator in _SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        names = _next_fields(reader, _CHUNK) or []
        rows = [fields for fields in iter(lambda: _next_fields(reader, _CHUNK), None) if fields]  # noqa: B023
        if len(content) == _CHUNK:
            del rows[-1:]  # the last one may be cut
        if separator == ",":
            if len(names) > 1:
                return ","
        elif all(names) and 2 * sum(len(fields) == len(names) for fields in rows) >= len(rows):
            num_columns[separator] = len(names)
    most = max(num_columns, key=num_columns.__getitem__, default=",")
    return most if num_columns.get(most, 1) > 1 else ","


def _next_fields(reader: Iterator[list[str]], longest: int) -> list[str] | None:
    """The next row; None at the end. Python's limit for a field is 128 KiB, which a document easily exceeds."""
    before = csv.field_size_limit()
    csv.field_size_limit(min(max(longest, before), sys.maxsize, 2**31 - 1))
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _read_text(file: RawFile) -> Iterator[SourceExample]:
    for place, text, problem in _read_lines(file):
        yield SourceExample(place, None if problem else {"text": text}, problem)


def _read_parquet(file: RawFile) -> Iterator[SourceExample]:
    import pyarrow.parquet as pq

    number, size = 0, file.num_bytes
    most = max(_ALWAYS_UNPACKED, _MOST_UNPACKED * size)
    try:
        with file.open() as stream:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{file.path}: the columns {shortened(names)} must each be there once")
            # A value that repeats takes no space, so that a small file may claim any number of examples.
            if table.metadata.num_rows > max(_ALWAYS_UNPACKED // 1024, size):
                raise DataError(f"{file.path}: claims {table.metadata.num_rows} examples in {size} bytes")
            for batch in table.iter_batches(batch_size=256):
                most -= batch.nbytes
                if most < 0:
                    raise DataError(
                        f"{file.path}: {size} bytes unpack to more than {_MOST_UNPACKED} times as many, as no text "
                        "does; if it is one, write the examples as JSONL"
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
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""What reads a kind of file, by its name's end."""


def _not_utf8(file: RawFile) -> DataError:
    """The error of a file that is not UTF-8, with the place of the first byte that is not."""
    for number, offset, line in _raw_lines(file):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return DataError(f"{file.path}: line {number}: {_encoding_problem(error, offset)}")
    return DataError(f"{file.path}: changed while it was read; start again when nothing writes to it")


def _encoding_problem(error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    utf_16 = offset == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    return (
        f"not UTF-8: byte 0x{byte:02x} at byte offset {offset + error.start}; "
        f"convert the file, e.g. iconv -f {'utf-16' if utf_16 else 'latin1'} -t utf-8"
    )
