"""Examples of large sources, tokenized once and kept in a file that is memory-mapped.

A source of `LARGE_BYTES` and more is tokenized example by example into an Arrow file of the user's cache folder. Memory
then holds two lengths of each example, 8 bytes together, and whatever is looked at. The folder's name is a hash of all
that decides its content, so that the next run with the same data, tokenizer and templates maps the file, and reads the
source only to hash it.

A kept file is used only if its own hash is that in the report beside it, which is written last; any other is made anew.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import platform
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from expertune.config import DataConfig, ObjectiveName
from expertune.data.examples import IGNORE_INDEX, Tally, TokenizedExample, TokenizedExamples, overlap_hash
from expertune.data.sources import Source
from expertune.data.special_tokens import RenderedText, answer_starts, plain_places
from expertune.data.template import own_file_text
from expertune.errors import DataError
from expertune.kernels.cache import cache_folder, read_kept
from expertune.storage import BESIDE, failure, hash_file, write_text, write_whole

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

LARGE_BYTES = 32_000_000
"""Sources of at least so much text are streamed and kept; smaller ones are read into memory, and leave no file."""

_LIBRARIES = ("expertune", "tokenizers", "transformers", "jinja2", "pyarrow")
_EXAMPLES, _REPORT = "examples.arrow", "report.json"
_ROWS_PER_BATCH = 256
_LOOKS_PER_RELEASE = 128
# What of a data section does not change its examples. Sources count by their content.
_NOT_IN_KEY = {"train", "eval", "packing", "merge_accumulation"}
_logger = logging.getLogger(__name__)

Keep = Callable[[TokenizedExample], None]


class MappedExamples(Sequence[TokenizedExample]):
    """Examples of a file that `kept_examples` made; each is built when it is asked for.

    Args:
        path: the file.
        digest: hash of all ids and labels, as `Tally` takes it.

    Attributes:
        lengths: int32 [num_examples], tokens of each example.
        uncut_lengths: int32 [num_examples], the same before `max_length` cut it.
        overlap_hashes: int64 [num_examples], see `TokenizedExamples`.
        digest: as given.

    Raises:
        OSError, ValueError: the file is missing, or is none (`pyarrow.ArrowInvalid` is a ValueError).
    """

    def __init__(self, path: Path, digest: str) -> None:
        import pyarrow as pa

        self._path, self.digest = path, digest
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._reader = pa.ipc.open_file(pa.py_buffer(self._map))
        self._starts = [0]
        lengths, uncut_lengths, overlap_hashes = [], [], []
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            self._starts.append(self._starts[-1] + batch.num_rows)
            lengths.append(
                np.maximum(
                    batch["input_ids"].value_lengths().to_numpy(), batch["rejected_ids"].value_lengths().to_numpy()
                )
            )
            # Copied off the mapped pages, which are given back.
            uncut = np.maximum(batch["uncut_length"].to_numpy(), batch["rejected_uncut_length"].to_numpy())
            uncut_lengths.append(uncut)
            overlap_hashes.append(batch["overlap_hash"].to_numpy().copy())
            if number % _LOOKS_PER_RELEASE == 0:
                self._release()
        self.lengths, self.uncut_lengths = np.concatenate(lengths), np.concatenate(uncut_lengths)
        self.overlap_hashes = np.concatenate(overlap_hashes)
        self._num_looks = 0
        self._release()

    def __reduce__(self) -> Any:
        # For data loaders that start their workers anew: each maps the file itself.
        return MappedExamples, (self._path, self.digest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._example(each) for each in range(*index.indices(len(self)))]
        return self._example(range(len(self))[index])

    def _example(self, index: int) -> TokenizedExample:
        number = bisect_right(self._starts, index) - 1
        batch, row = self._reader.get_batch(number), index - self._starts[number]
        texts = ("place", "prompt", "completion", "plain", "answers", "rejected", "label", "columns")
        values = {name: batch[name][row].as_py() for name in texts}
        ids: list[int] = batch["input_ids"][row].values.to_numpy().tolist()
        trained = batch["trained"][row].values.to_numpy(zero_copy_only=False)
        prompt = values["prompt"]
        if values["plain"] or values["answers"]:
            plain = values["plain"]
            prompt = RenderedText(prompt, zip(plain[::2], plain[1::2], strict=True), values["answers"])
        self._num_looks += 1
        if self._num_looks % _LOOKS_PER_RELEASE == 0:
            self._release()
        place = values["place"].decode("utf-8", "surrogatepass")
        labels = np.where(trained, ids, IGNORE_INDEX).tolist()
        columns = values["columns"]
        example = TokenizedExample(
            *(ids, labels, place, prompt, values["completion"], batch["uncut_length"][row].as_py()),
            label=values["label"],
            columns=None if columns is None else json.loads(columns),
        )
        if values["rejected"] is None:
            return example
        ids, num_prompt_tokens = batch["rejected_ids"][row].values.to_numpy().tolist(), example.num_prompt_tokens
        labels = [IGNORE_INDEX] * num_prompt_tokens + ids[num_prompt_tokens:]
        uncut_length = batch["rejected_uncut_length"][row].as_py()
        rejected = TokenizedExample(ids, labels, place, prompt, values["rejected"], uncut_length)
        return dataclasses.replace(example, rejected=rejected)

    def _release(self) -> None:
        """Give mapped pages back. They stay in the system's page cache, and count as no process's memory."""
        if advice := getattr(mmap, "MADV_DONTNEED", None):
            self._map.madvise(advice)


def is_large(source: Source) -> bool:
    """Whether a source is too large to be read into memory."""
    return source.num_bytes >= LARGE_BYTES


def cache_key(source: Source, data: DataConfig, tokenizer: Any, objective: ObjectiveName = "sft") -> str:
    """A name for all that decides the tokens and the report of a source.

    Args:
        source: the source, by content.
        data: the run's data section.
        tokenizer: a fast transformers tokenizer.
        objective: the run's.
    """
    template = own_file_text(data.template)
    # A template may write the day's date: its examples are another day's tomorrow.
    dated = "strftime_now" in f"{template}{tokenizer.chat_template}"
    return _digest(
        [
            [source.name, source.content],
            [data.model_dump(mode="json", exclude=_NOT_IN_KEY), objective],
            template,
            [tokenizer_digest(tokenizer), str(type(tokenizer)), getattr(tokenizer, "split_special_tokens", False)],
            [_code_digest(), platform.python_version(), *map(version, _LIBRARIES)],
            date.today().isoformat() if dated else None,
        ]
    )


def kept_examples(
    key: str, name: str, make: Callable[[Keep], dict[str, Any]], key_of: Callable[[dict[str, Any]], str]
) -> TokenizedExamples:
    """The examples that are kept under a key; made where there are none yet, by one process at a time.

    Args:
        key: from `cache_key`.
        name: how errors call the source.
        make: hands on each example, and returns the report, plain JSON values.
        key_of: the key with what the report says was chosen, by which a resumed or finished run looks for them.

    Raises:
        DataError: the examples cannot be written; or what `make` raises.
    """
    folder = cache_folder() / "tokens" / key
    try:
        with _held(folder):
            if (kept := _open(folder)) is None:
                _write(folder, make)
                kept = _open(folder)
                if kept is not None:
                    _link(folder, folder.with_name(key_of(kept.report)))
    except OSError as error:
        reason = failure(error, folder) or error
        raise DataError(
            f"{name}: its tokens cannot be kept: {reason}; or set XDG_CACHE_HOME to a folder on another disk"
        ) from error
    if kept is None:
        raise DataError(f"{name}: its tokens were written to {folder} and are not what was written; check the disk")
    return kept


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what decides ids, whatever files it was read from and whatever it has encoded meanwhile."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    held = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    held |= {"truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([held, special, tokenizer.chat_template])


def _open(folder: Path) -> TokenizedExamples | None:
    """What lies in a folder; None where that is nothing, or not what was written."""
    try:
        kept = read_kept(folder / _REPORT)
        if hash_file(folder / _EXAMPLES).sha256 != kept["sha256"]:
            return None
        return TokenizedExamples(MappedExamples(folder / _EXAMPLES, kept["digest"]), kept["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, make: Callable[[Keep], dict[str, Any]]) -> None:
    import pyarrow as pa

    integers = pa.list_(pa.int32())
    schema = pa.schema(
        {
            "input_ids": integers,
            "trained": pa.list_(pa.bool_()),  # a label is its token's id, or none
            "uncut_length": pa.int32(),
            "place": pa.binary(),  # a file's name need not be UTF-8
            "prompt": pa.string(),
            "plain": integers,
            "answers": integers,
            "completion": pa.string(),
            "rejected_ids": integers,  # of a pair; empty elsewhere
            "rejected_uncut_length": pa.int32(),
            "rejected": pa.string(),
            "label": pa.bool_(),
            "columns": pa.string(),  # JSON
            "overlap_hash": pa.int64(),
        }
    )
    for left in folder.glob(f".*{BESIDE}"):  # by a process that was killed
        left.unlink(missing_ok=True)
    tally = Tally()
    rows: list[dict[str, Any]] = []

    def keep(example: TokenizedExample) -> None:
        tally.add(example)
        rows.append(_row(example))
        if len(rows) == _ROWS_PER_BATCH:
            flush()

    def flush() -> None:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        rows.clear()

    with write_whole(folder / _EXAMPLES) as file, pa.ipc.new_file(file, schema) as writer:
        report = make(keep)
        flush()
    kept = {"sha256": hash_file(folder / _EXAMPLES).sha256, "digest": tally.digest, "report": report}
    write_text(folder / _REPORT, json.dumps(kept))


def _link(folder: Path, other: Path) -> None:
    """Have the same files in another folder as well; without hard links they are made there when they are asked for."""
    with contextlib.suppress(OSError):
        other.mkdir(mode=0o700, exist_ok=True)
        for name in (_EXAMPLES, _REPORT):
            (other / name).unlink(missing_ok=True)
            os.link(folder / name, other / name)


def _row(example: TokenizedExample) -> dict[str, Any]:
    rejected = example.rejected
    return {
        "input_ids": np.asarray(example.input_ids, dtype=np.int32),
        "trained": np.asarray(example.labels) != IGNORE_INDEX,
        "uncut_length": example.uncut_length,
        "place": example.place.encode("utf-8", "surrogatepass"),
        "prompt": str(example.prompt),
        "plain": [bound for place in plain_places(example.prompt) for bound in place],
        "answers": list(answer_starts(example.prompt)),
        "completion": str(example.completion),
        "rejected_ids": [] if rejected is None else np.asarray(rejected.input_ids, dtype=np.int32),
        "rejected_uncut_length": 0 if rejected is None else rejected.uncut_length,
        "rejected": None if rejected is None else str(rejected.completion),
        "label": example.label,
        "columns": None if example.columns is None else json.dumps(example.columns),
        "overlap_hash": overlap_hash(example),
    }


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other processes from making the same; where a file system has no locks, they do so beside each other.

    The folder is made for it, and is gone again where nothing was put into it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) if fcntl else None
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.warning("%s: waiting for another process that tokenizes the same examples", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)


@cache
def _code_digest() -> str:
    """Hash of this folder's code and templates: another release may render or tokenize otherwise."""

    def walk(folder: Traversable) -> Iterator[Traversable]:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk(entry)
            elif entry.name.endswith((".py", ".jinja")):
                yield entry

    return _digest([[entry.name, entry.read_text(encoding="utf-8")] for entry in walk(files("expertune.data"))])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
