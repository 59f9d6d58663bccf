"""Shards of a merged model: the source's own, with something added to some of their tensors; a block at a time.

Header, order and offsets are copied as they are, so that names, dtypes and metadata are those of the source. A block of
a tensor is read, added to in float32, rounded to the tensor's dtype and written before the next is read.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from expertune.checkpoint.reader import TensorEntry, read_header
from expertune.errors import CheckpointError, ExportError
from expertune.exporting.additions import Addition
from expertune.exporting.magnitudes import scale_rows
from expertune.storage import how_to_replace, write_whole

_BLOCK_BYTES = 2**20
_BLOCKS_BEHIND = 16
_FLUSHED_BYTES = 2**26


def merge_shard(shard: Path, out: Path, additions: Mapping[str, Addition], progress: Callable[[int], None]) -> None:
    """Write one shard, whole or not at all.

    Args:
        shard: of the source.
        out: the file to write.
        additions: what is added, by name on disk.
        progress: called with the bytes done, now and then.

    Raises:
        CheckpointError: the shard is damaged.
        ExportError: a merged weight is too large for its dtype; names the tensor.
    """
    entries = sorted(read_header(shard).values(), key=lambda entry: entry.start)
    with shard.open("rb", buffering=0) as source, write_whole(out) as file, _Behind(file) as behind:
        done = 0
        for entry in entries:
            _copy(source, behind, entry.start - done)  # of the first tensor, the header
            if addition := additions.get(entry.key):
                _add(source, behind, entry, addition)
            else:
                _copy(source, behind, entry.nbytes)
            done = entry.start + entry.nbytes
            progress(done)
        _copy(source, behind, shard.stat().st_size - done)


class _Behind:
    """Writes while the next blocks are computed, and has the disk write what it has been given meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._writer, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self._flush: Future[None] | None = None
        self._unflushed = self._given = 0
        self._buffers = [bytearray(_BLOCK_BYTES) for _ in range(_BLOCKS_BEHIND + 2)]

    def __enter__(self) -> "_Behind":
        return self

    def buffer(self, nbytes: int) -> memoryview:
        """Room for the next block that is written; what was given out before is not waited for any more."""
        self._given = (self._given + 1) % len(self._buffers)
        if len(self._buffers[self._given]) < nbytes:
            self._buffers[self._given] = bytearray(nbytes)
        return memoryview(self._buffers[self._given])[:nbytes]

    def write(self, block: memoryview) -> None:
        """Append a block of `buffer`; a failed write is raised here, or at the end."""
        self._writes.append(self._writer.submit(self._write, block))
        if len(self._writes) > _BLOCKS_BEHIND:
            self._writes.popleft().result()

    def _write(self, block: memoryview) -> None:
        self._file.write(block)
        self._unflushed += len(block)
        if self._unflushed >= _FLUSHED_BYTES and (self._flush is None or self._flush.done()):
            self._require_flushed()
            self._unflushed, self._flush = 0, self._flusher.submit(os.fsync, self._file.fileno())

    def _require_flushed(self) -> None:
        """Raise what the last flush met: the system tells of a failed write once, and a later flush succeeds."""
        if self._flush is not None:
            self._flush.result()

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.shutdown(cancel_futures=kind is not None)
        self._flusher.shutdown()
        if kind is None:
            for write in self._writes:
                write.result()
            self._require_flushed()


def _copy(source: BinaryIO, out: _Behind, count: int) -> None:
    """Hand some bytes on as they are."""
    while count > 0:
        block = out.buffer(min(count, _BLOCK_BYTES))
        _fill(source, block)
        out.write(block)
        count -= len(block)


@torch.no_grad()
def _add(source: BinaryIO, out: _Behind, entry: TensorEntry, addition: Addition) -> None:
    width = entry.shape[-1]
    num_rows = entry.numel // width // addition.num_parts
    step = max(1, _BLOCK_BYTES // (width * entry.dtype.itemsize))
    sums = torch.empty(step, width)
    for part in range(addition.num_parts):
        update = addition.part(part)
        magnitudes = addition.magnitude(part) if addition.magnitude else None
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            total = sums[: rows.stop - first]
            view = out.buffer(total.numel() * entry.dtype.itemsize)
            block = torch.frombuffer(view, dtype=entry.dtype).view(total.shape)
            _fill(source, view)
            total.copy_(block)
            if isinstance(update, Tensor):
                total += update[rows]
            else:
                total.addmm_(update[0][rows], update[1])
            if magnitudes is not None:
                scale_rows(total, magnitudes[rows])
            block.copy_(total)
            if block.dtype == torch.float16 and not block.isfinite().all():
                raise ExportError(
                    f"{entry.shard}: {entry.key} has values too large for float16 with the adapter added; export the "
                    "adapter by itself, e.g. with --to peft"
                )
            out.write(view)


def _fill(source: BinaryIO, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(
                f"{source.name}: the file ends before its tensors do; {how_to_replace(Path(source.name))}"
            )
        filled += count
