"""Huge pages for memory that is read through: fewer page faults, and fewer misses of the processor's table of pages.

A matrix that is dequantized by columns touches a page for every row, and rows of a few thousand bytes leave each page
after one of them. Linux backs anonymous memory with pages of 2 MiB where that is asked for (`madvise`, the default of
most distributions). Files that are mapped cannot have them: experts on disk stay on small pages.

Only whole huge pages inside a tensor are asked for, so that what lies beside it stays as it was. The request is one for
addresses: where the allocator keeps the memory of a freed tensor, what it hands out there next has huge pages too.
"""

import ctypes
import sys

from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_HUGEPAGE = 14  # from mman.h
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def ask_for_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor itself; call before it is first written to. Where the system does not have them nothing changes."""
    if _madvise is None or tensor.device.type != "cpu":
        return tensor
    start = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if start < end:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
    return tensor
