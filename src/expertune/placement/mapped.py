"""Expert bytes on disk, used on a CPU from the mapped file itself: a layer is paged in before its use and out after it.

Pages of a mapped file count as resident memory while they are mapped, though the kernel may take them back. So a layer
is read ahead into the page cache alone, and mapped when it is used. Paging out leaves it in the page cache where there
is memory for that (see `page_cache.py`), and the next use maps it again without a read.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from expertune.checkpoint.reader import TensorEntry
from expertune.kernels import trim
from expertune.placement import READ_BYTES
from expertune.placement.page_cache import PageCache

# From linux/mman.h (5.14): read pages and map them, all in one call, without touching them one by one.
_MADV_POPULATE_READ = 22


def map_tensor(entry: TensorEntry) -> Tensor:
    """The tensor as a read-only view of its mapped file; nothing is read before it is used.

    Args:
        entry: a tensor whose place in the file is a multiple of its items' size.
    """
    # A private mapping: the file itself can never be changed through it.
    storage = torch.UntypedStorage.from_file(str(entry.shard), False, entry.start + entry.nbytes)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    return whole[entry.start :].view(entry.dtype).view(entry.shape)


class MappedLayers:
    """A `Backend` for layers whose tensors are mapped, and used in place.

    Args:
        layers: the mapped tensors of each layer.
        files: the same in their files.
    """

    def __init__(self, layers: Sequence[list[Tensor]], files: Sequence[Sequence[TensorEntry]]) -> None:
        self._layers, self._cache = list(layers), PageCache(files)
        self._loading: dict[int, Future[None]] = {}
        self._mapped: set[int] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="expert-bytes")
        trim.map_large_blocks()

    def start(self, layer: int) -> None:
        """Read the layer into the page cache, on a thread of its own."""
        self._loading[layer] = self._reader.submit(_read, self._layers[layer])

    def expect(self, layer: int) -> None:
        """Have the layer read into the page cache once what has been started is there."""
        self._reader.submit(self._cache.read_ahead, layer)

    def wait(self, layer: int) -> list[Tensor]:
        """The layer's tensors; every page is resident."""
        self._loading[layer].result()
        if layer not in self._mapped:
            _page_in(self._layers[layer])
            self._mapped.add(layer)
        return self._layers[layer]

    def used(self, layer: int) -> None:
        """Nothing to do: work on a CPU is done when it returns."""

    def drop(self, layer: int) -> None:
        """Page the layer out, and give back what it has left on the heap; what kept it from memory, `wait` raises."""
        self._loading.pop(layer).exception()
        self._mapped.discard(layer)
        page_out(self._layers[layer])
        self._cache.used(layer)
        trim.trim()

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown()


def page_out(tensors: Sequence[Tensor]) -> None:
    """Give the memory of mapped tensors back; never of others, which would lose what they hold.

    The whole mapping of each tensor is given back: paging in maps pages before the tensor's own as well, where the
    page cache holds them in larger blocks.
    """
    for tensor in tensors:
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        _advise(whole, getattr(mmap, "MADV_DONTNEED", None))


def _read(tensors: Sequence[Tensor]) -> None:
    """Have tensors in the page cache, without leaving them mapped."""
    for tensor in tensors:
        for part in tensor.view(-1).view(torch.uint8).split(READ_BYTES):
            _page_in([part])
            _advise(part, getattr(mmap, "MADV_DONTNEED", None))
    page_out(tensors)


def _page_in(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if not _advise(tensor, _MADV_POPULATE_READ if sys.platform == "linux" else None):
            # An older kernel or another system: reading a byte of each page loads it.
            tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _advise(tensor: Tensor, advice: int | None) -> bool:
    """Advise the kernel about the pages of a tensor; whether it took the advice."""
    if advice is None or not tensor.nbytes:
        return not tensor.nbytes
    first = tensor.data_ptr() & ~(mmap.PAGESIZE - 1)
    length = tensor.data_ptr() + tensor.nbytes - first
    # Releases the interpreter's lock, so that paging in runs beside the computation.
    return bool(_madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice) == 0)


_madvise = getattr(ctypes.CDLL(None), "madvise", lambda *_: -1)
