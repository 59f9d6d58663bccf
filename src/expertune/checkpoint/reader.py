"""Read safetensors folders one tensor at a time, with plain reads.

A memory-mapped file counts as resident memory once it is touched; a plain read into a buffer does not, so that the
peak of a load is what the model holds and one tensor. Large tensors are read in parts at once, as one thread copies out
of the page cache at a fraction of what memory can do. Format: eight bytes of header length, a JSON header, the data
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.model_folder import INDEX_NAME
from expertune.errors import CheckpointError
from expertune.kernels.huge_pages import ask_for_huge_pages
from expertune.kernels.limits import available_memory
from expertune.storage import how_to_replace

_MAX_HEADER_BYTES = 100 * 2**20
_MAX_DIMENSIONS = 16

# A part of a tensor that one thread reads; more threads than these gain nothing.
_PART_BYTES = 16 * 2**20
_READERS = 4

_ADVICE_BYTES = 4 * 2**20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors headers give a dtype, e.g. `BF16`."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, by its header.

    Attributes:
        key: name on disk.
        shard: file that holds it.
        dtype: torch dtype.
        shape: sizes.
        start: byte position in the file.
        nbytes: size in bytes.
    """

    key: str
    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self, memory: "Memory | None" = None) -> Tensor:
        """The tensor, on the CPU.

        Args:
            memory: what it may be read into; the tensor is then good until the next read into the same memory.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        return self._read(self.start, self.nbytes, memory).view(self.shape)

    def read_part(self, index: int, memory: "Memory | None" = None) -> Tensor:
        """Element `index` of the first dimension, e.g. one expert of a stack, without reading the others.

        Arguments and errors are `read`'s own.
        """
        size = self.nbytes // self.shape[0]
        return self._read(self.start + index * size, size, memory).view(self.shape[1:])

    def part(self, first: int, count: int) -> "TensorEntry":
        """Some elements of the first dimension, as an entry of its own."""
        size = self.nbytes // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + first * size, nbytes=count * size)

    def slice(self, here: range) -> "TensorEntry":
        """Some of the bytes, as an entry of its own."""
        return replace(self, dtype=torch.uint8, shape=(len(here),), start=self.start + here.start, nbytes=len(here))

    def read_features(self, features: Sequence[int], feature_bytes: int | None = None) -> Tensor:
        """Some output features of a weight whose last dimension is its input, without reading the others.

        Args:
            features: which ones, all dimensions before the last taken as one.
            feature_bytes: bytes of each, where the tensor's shape does not say it; the result is then uint8.

        Returns:
            [features, in_features].

        Raises:
            CheckpointError: the file ends before one does.
        """
        size = self.shape[-1] * self.dtype.itemsize if feature_bytes is None else feature_bytes
        read = torch.stack([self._read(self.start + feature * size, size).view(torch.uint8) for feature in features])
        return read.view(self.dtype) if feature_bytes is None else read

    def _read(self, start: int, nbytes: int, memory: "Memory | None" = None) -> Tensor:
        buffer = (memory or Memory()).take(nbytes)
        view = buffer.numpy().data
        readers = min(_READERS, torch.get_num_threads(), nbytes // _PART_BYTES)
        if readers < 2:
            self._fill(view, start)
        else:
            parts = range(0, nbytes, _PART_BYTES)
            with ThreadPoolExecutor(readers) as pool:
                list(pool.map(lambda at: self._fill(view[at : at + _PART_BYTES], start + at), parts))
        return buffer.view(self.dtype)

    def _fill(self, view: memoryview, start: int) -> None:
        """Read the bytes from `start` on."""
        with self.shard.open("rb", buffering=0) as file:
            file.seek(start)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(
                        f"{self.shard}: the file ends inside tensor {self.key}; {how_to_replace(self.shard)}"
                    )
                filled += count


@contextmanager
def read_ahead(files: Iterable[Path]) -> Iterator[None]:
    """Within it, a thread has the system read files into its cache, in order and without a pause.

    Of files that are larger than half of the memory that is available only the first ones: what is made of them lies in
    the other half, and what is read too early is dropped before it is used.
    """
    left = available_memory() // 2
    with ThreadPoolExecutor(1) as reading:
        for file in files:
            end = min(file.stat().st_size, left)
            reading.submit(advise, file, 0, end, "WILLNEED")
            left -= end
        try:
            yield
        finally:
            reading.shutdown(cancel_futures=True)


def advise(path: Path, start: int, end: int, advice: Literal["WILLNEED", "DONTNEED"]) -> None:
    """Tell the system about some bytes of a file in its cache; nothing where it takes no advice, as on macOS.

    Raises:
        OSError: the file cannot be opened.
    """
    if (known := getattr(os, f"POSIX_FADV_{advice}", None)) is None:
        return
    # Of one piece of advice to read the kernel follows no more than a device's own read-ahead.
    piece_bytes = _ADVICE_BYTES if advice == "WILLNEED" else max(end - start, 1)
    with path.open("rb", buffering=0) as file:
        for at in range(start, end, piece_bytes):
            os.posix_fadvise(file.fileno(), at, min(piece_bytes, end - at), known)


class Memory:
    """Memory that one tensor after the other is read into: fresh pages cost more than the copy that fills them."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Uninitialized uint8 [nbytes], which shares memory with what was taken before."""
        if len(self._held) < nbytes:
            self._held = torch.empty(0, dtype=torch.uint8)  # the smaller block goes before the larger one comes
            self._held = ask_for_huge_pages(torch.empty(nbytes, dtype=torch.uint8))
        return self._held[:nbytes]


@dataclass(frozen=True)
class DequantizedEntry(TensorEntry):
    """A packed tensor that reads as the floats it stands for."""

    dequantize: Callable[..., Tensor] = lambda: torch.empty(0)

    def read(self, memory: Memory | None = None) -> Tensor:
        """All of it."""
        return self.dequantize()

    def read_part(self, index: int, memory: Memory | None = None) -> Tensor:
        """Element `index` of the first dimension."""
        return self.dequantize(index)


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder.

    Attributes:
        folder: where it lies.
        tensors: entries by name on disk, in file order.
    """

    folder: Path
    tensors: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(folder: str | Path) -> CheckpointIndex:
    """Read the headers of a checkpoint folder: the shards its index names, or every safetensors file in it.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or damaged, a tensor that is missing from its shard
            or stored twice; names the file and the tensor.
    """
    folder = Path(folder)
    weight_map = read_weight_map(folder)
    shards = sorted({folder / name for name in weight_map.values()}) if weight_map else _loose_shards(folder)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in read_header(shard).values():
            if entry.key in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {entry.key} is stored twice, in {tensors[entry.key].shard.name} and "
                    f"{shard.name}; remove the file that does not belong"
                )
            tensors[entry.key] = entry
    for key, name in weight_map.items():
        if key not in tensors:
            raise CheckpointError(f"{folder / name}: tensor {key} is missing, though {INDEX_NAME} names it")
        if tensors[key].shard.name != name:
            raise CheckpointError(
                f"{folder}: {INDEX_NAME} places tensor {key} in {name}, but it lies in {tensors[key].shard.name}"
            )
    return CheckpointIndex(folder, tensors)


def read_header(shard: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file by name, in file order.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or is shorter than its header says.
    """
    header, start, size = _parse_header(shard)
    header.pop("__metadata__", None)
    entries = sorted((_entry(shard, key, value, start) for key, value in header.items()), key=lambda each: each.start)
    whole = max((entry.start + entry.nbytes for entry in entries), default=start)
    end, before = start, ""
    for entry in entries:
        if entry.start + entry.nbytes > size:
            raise CheckpointError(
                f"{shard}: truncated: {size:,} bytes of {whole:,}, {whole - size:,} are missing, from tensor "
                f"{short(entry.key)} on; {how_to_replace(shard)}"
            )
        if entry.nbytes and entry.start < end:
            raise CheckpointError(
                f"{shard}: the header is damaged: tensors {short(before)} and {short(entry.key)} share bytes; "
                f"{how_to_replace(shard)}"
            )
        if entry.nbytes:
            end, before = entry.start + entry.nbytes, entry.key
    return {entry.key: entry for entry in entries}


def read_metadata(shard: Path) -> dict[str, str]:
    """The free text entries of a safetensors file's header; empty where it has none.

    Raises:
        CheckpointError: the file is missing, or is no safetensors file.
    """
    metadata = _parse_header(shard)[0].get("__metadata__")
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def _parse_header(shard: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, the byte at which the data begins, and the file's size."""
    try:
        if shard.exists() and not shard.is_file():  # a pipe would never end
            raise CheckpointError(f"{shard}: not a file; {how_to_replace(shard)}")
        size = shard.stat().st_size
        with shard.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{shard}: not a safetensors file, or its header is cut off; {how_to_replace(shard)}"
                )
            header = json.loads(file.read(length), object_pairs_hook=_no_key_twice)
        if not isinstance(header, dict):
            raise ValueError("not a mapping of tensors")
        return header, 8 + length, size
    except FileNotFoundError:
        raise CheckpointError(f"{shard}: shard is missing; {how_to_replace(shard)}") from None
    except OSError as error:
        raise CheckpointError(f"{shard}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{shard}: the safetensors header is damaged ({error}); {how_to_replace(shard)}"
        ) from None


def _entry(shard: Path, key: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = _DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, begin, end]
        if any(type(number) is not int for number in numbers) or min(numbers) < 0 or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"shape and offsets {str(value)[:100]}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{shard}: the header of tensor {short(key)} is damaged or of unknown dtype ({str(error)[:200]}); "
            f"{how_to_replace(shard)}"
        ) from None
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{shard}: tensor {short(key)} of shape {shape} and {dtype} cannot lie in {end - begin} bytes; "
            f"{how_to_replace(shard)}"
        )
    return TensorEntry(key, shard, dtype, shape, data_start + begin, end - begin)


def short(key: str) -> str:
    """A tensor's name for a message: names of a damaged file may be as long as the file."""
    return key if len(key) <= 200 else f"{key[:200]}..."


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    header = dict(pairs)
    if len(header) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]} is there twice")
    return header


def read_weight_map(folder: Path) -> dict[str, str]:
    """Name on disk -> shard, by the folder's index; empty where it has none.

    Raises:
        CheckpointError: the index is damaged.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_mapping(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: damaged: its weight_map names no tensors; {how_to_replace(path)}")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_file_name(name):
            raise CheckpointError(
                f"{path}: tensor {short(key)} lies in {repr(name)[:100]}, which is no file name; {how_to_replace(path)}"
            )
    return weight_map


def _is_file_name(name: str) -> bool:
    """Whether a name is one of a file in the same folder."""
    return Path(name).name == name != ".." and name.isprintable() and 0 < len(name) < 256


def _loose_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    shards = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if shards:
        return shards
    pickles = next(folder.glob("*.bin"), None)
    fix = f"; {pickles.name} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
    raise CheckpointError(f"{folder}: no *.safetensors weights here{fix}")
