"""Shards of a merged model: the source's own, with something added to some of their tensors; a block at a time.

Header, order and offsets are copied as they are, so that names, dtypes and metadata are those of the source. A block of
a tensor is read, added to in float32, rounded to the tensor's dtype and written before the next is read.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from expertune.checkpoint.reader import TensorEntry, read_header
from expertune.errors import CheckpointError, ExportError
from expertune.exporting.additions import Addition
from expertune.storage import write_whole

_BLOCK_BYTES = 2**20
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
    with shard.open("rb", buffering=0) as source, write_whole(out) as file, _Flusher(file) as flusher:
        done = 0
        for entry in entries:
            _copy(source, file, entry.start - done)  # of the first tensor, the header
            if addition := additions.get(entry.key):
                _add(source, file, entry, addition)
            else:
                _copy(source, file, entry.nbytes)
            done = entry.start + entry.nbytes
            progress(done)
            flusher.reached(done)
        _copy(source, file, shard.stat().st_size - done)


class _Flusher:
    """Has the disk write while the next blocks are computed, rather than all of a file when it is finished."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._flushed = file, 0
        self._thread = ThreadPoolExecutor(1)
        self._task: Future[None] | None = None

    def __enter__(self) -> "_Flusher":
        return self

    def reached(self, done: int) -> None:
        """Flush what has been written, where that is much and nothing is being flushed."""
        if done - self._flushed >= _FLUSHED_BYTES and (self._task is None or self._task.done()):
            self._file.flush()
            self._flushed, self._task = done, self._thread.submit(os.fsync, self._file.fileno())

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def _copy(source: BinaryIO, file: BinaryIO, count: int) -> None:
    """Hand some bytes on as they are."""
    buffer = memoryview(bytearray(min(count, _BLOCK_BYTES)))
    while count > 0:
        _fill(source, block := buffer[:count])
        file.write(block)
        count -= len(block)


@torch.no_grad()
def _add(source: BinaryIO, file: BinaryIO, entry: TensorEntry, addition: Addition) -> None:
    width = entry.shape[-1]
    num_rows = entry.numel // width // addition.num_parts
    step = max(1, _BLOCK_BYTES // (width * entry.dtype.itemsize))
    values = torch.empty(step, width, dtype=entry.dtype)
    sums = torch.empty(step, width)
    for part in range(addition.num_parts):
        update = addition.part(part)
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            block, total = values[: rows.stop - first], sums[: rows.stop - first]
            view = block.view(-1).view(torch.uint8).numpy().data
            _fill(source, view)
            total.copy_(block)
            if isinstance(update, Tensor):
                total += update[rows]
            else:
                total.addmm_(update[0][rows], update[1])
            block.copy_(total)
            if not total.sum().isfinite() or (block.dtype == torch.float16 and not block.isfinite().all()):
                raise ExportError(
                    f"{entry.shard}: {entry.key} holds NaN or values too large for {entry.dtype} with the adapter "
                    "added; the adapter or the model is damaged"
                )
            file.write(view)


def _fill(source: BinaryIO, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{source.name}: the file ends before its tensors do; download it again")
        filled += count
