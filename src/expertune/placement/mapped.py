"""Expert bytes on disk, used on a CPU from the mapped file itself: a layer is paged in before its use and out after it.

Pages of a mapped file count as resident memory while they are mapped, though the kernel may take them back. Paging out
leaves them in the page cache, and the next use maps them again without a read as long as memory suffices.
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
    """

    def __init__(self, layers: Sequence[list[Tensor]]) -> None:
        self._layers = list(layers)
        self._loading: dict[int, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="expert-bytes")
        trim.map_large_blocks()

    def start(self, layer: int) -> None:
        """Page the layer in, on a thread of its own."""
        self._loading[layer] = self._reader.submit(_page_in, self._layers[layer])

    def wait(self, layer: int) -> list[Tensor]:
        """The layer's tensors; every page is resident."""
        self._loading[layer].result()
        return self._layers[layer]

    def used(self, layer: int) -> None:
        """Nothing to do: work on a CPU is done when it returns."""

    def drop(self, layer: int) -> None:
        """Page the layer out, and give back what it has left on the heap; what kept it from memory, `wait` raises."""
        self._loading.pop(layer).exception()
        page_out(self._layers[layer])
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


def _page_in(tensors: list[Tensor]) -> None:
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
