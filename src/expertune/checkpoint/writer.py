"""Write safetensors files, one tensor at a time, with the same bytes for the same tensors."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expertune.checkpoint.reader import dtype_name
from expertune.storage import FileRecord, write_whole

ALIGNMENT = 64
PADDING = "padding."

# Below it another thread costs more than it saves.
_WORTH_A_THREAD = 2**20


@dataclass(frozen=True)
class Outgoing:
    """A tensor that is about to be written.

    Attributes:
        name: live name.
        dtype: torch dtype.
        shape: sizes.
        read: gives the tensor when its turn comes.
        aligned: begin at a multiple of `ALIGNMENT` bytes, before all tensors that need not.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    aligned: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write a safetensors file, whole or not at all; one tensor is asked for at a time.

    The bytes depend on names, shapes, values and `metadata` only: safetensors' own writer puts the entries of the
    metadata into an order that differs from one process to the next. Aligned tensors come first, in the order given,
    with tensors named `padding.*` after them where their sizes leave a gap: the format allows no holes.

    Raises:
        OSError: the file cannot be written; nothing of it is left.
        ValueError: a tensor that was handed over is not the one that was announced.
    """
    record, finish = write_beside(path, tensors, metadata)
    finish()
    return record


def write_beside(
    path: Path, tensors: Iterable[Outgoing], metadata: Mapping[str, str] | None = None
) -> tuple[FileRecord, Callable[[], None]]:
    """As `write_tensors`, but for the last part, which waits for the disk and needs no tensor.

    Returns:
        What was written, and what flushes it to the disk and renames it into place, from any thread.
    """
    ordered = _in_file_order(list(tensors), path.stem)
    with ExitStack() as stack:
        beside = stack.enter_context(write_whole(path))
        with ThreadPoolExecutor(1) as hashing:
            file = HashedFile(beside, hashing)
            file.write(memoryview(_header(ordered, metadata or {})))
            for outgoing in ordered:
                tensor = outgoing.read()
                if tuple(tensor.shape) != outgoing.shape or tensor.dtype != outgoing.dtype:
                    raise ValueError(f"{outgoing.name}: {tuple(tensor.shape)} of {tensor.dtype} is not as announced")
                if tensor.numel():
                    file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                del tensor  # or it would stay while the next is read
        finish = stack.pop_all().close
    return file.record, finish


class HashedFile:
    """A file that is written from its start to its end, and hashed meanwhile.

    Args:
        file: what is written to.
        hashing: the thread that hashes large pieces while they are written.
    """

    def __init__(self, file: BinaryIO, hashing: ThreadPoolExecutor) -> None:
        self.file, self._hashing, self._digest, self._nbytes = file, hashing, hashlib.sha256(), 0

    def write(self, view: memoryview) -> None:
        """Append these bytes."""
        if len(view) < _WORTH_A_THREAD:
            self._digest.update(view)
            self.file.write(view)
        else:
            hashed = self._hashing.submit(self._digest.update, view)
            self.file.write(view)
            hashed.result()
        self._nbytes += len(view)

    @property
    def record(self) -> FileRecord:
        """What has been written."""
        return FileRecord(self._digest.hexdigest(), self._nbytes)


def _in_file_order(tensors: list[Outgoing], file: str) -> list[Outgoing]:
    ordered: list[Outgoing] = []
    position = num_paddings = 0
    for outgoing in (tensor for tensor in tensors if tensor.aligned):
        ordered.append(outgoing)
        position += outgoing.nbytes
        gap = -position % ALIGNMENT
        if gap:
            ordered.append(_padding(f"{PADDING}{file}.{num_paddings}", gap))
            position, num_paddings = position + gap, num_paddings + 1
    # Wide dtypes first: each tensor then begins at a multiple of its item's size.
    rest = sorted((t for t in tensors if not t.aligned), key=lambda t: (-t.dtype.itemsize, t.name))
    return ordered + rest


def _padding(name: str, nbytes: int) -> Outgoing:
    return Outgoing(name, torch.uint8, (nbytes,), lambda: torch.zeros(nbytes, dtype=torch.uint8))


def _header(ordered: list[Outgoing], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header, filled up with blanks so that the data begins at a multiple of `ALIGNMENT`."""
    position = 0
    values: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for outgoing in ordered:
        end = position + outgoing.nbytes
        values[outgoing.name] = {
            "dtype": dtype_name(outgoing.dtype),
            "shape": list(outgoing.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(values, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
