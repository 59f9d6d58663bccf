"""Give freed blocks of the C allocator back to the system, where experts are on disk. Linux, glibc.

Blocks below the mmap threshold lie on heaps, between others that live longer: a heap that only shrinks at its end keeps
what a layer has freed, and since every expert has its own number of tokens, the next layer's blocks fit few of the
holes. In a training step of six layers of hidden 1024 and 3072 tokens, 765 of 2486 MB were such holes. glibc also
raises the threshold with the blocks that it frees, so that ever larger ones come from a heap.

Pages that are given back are zeroed again when they are next used: that costs a small model a third of its step. So
nothing is given back unless memory is so short that experts are on disk, and then between layers.

What the holes come to is not a count of the allocator's, which goes on counting a block that has been given back. It is
what the process has resident beyond the blocks in use, less what that was after the last time: whatever memory the
layers themselves take, only freed blocks can make it grow.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import ClassVar

# What freed blocks may come to.
SLACK_BYTES = 64 * 2**20

# From malloc.h.
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 8 * 2**20

_STATM = Path("/proc/self/statm")
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_malloc_trim = getattr(_libc, "malloc_trim", None)
_mallinfo2 = getattr(_libc, "mallinfo2", None)  # glibc 2.33
_lowest = sys.maxsize


class _Mallinfo2(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


if _mallinfo2 is not None:
    _mallinfo2.restype = _Mallinfo2


def is_users_own() -> bool:
    """Whether the process's user has set variables of glibc's allocator: then it is left as it is."""
    return any(name.startswith("MALLOC_") for name in os.environ)


def map_large_blocks() -> None:
    """Have blocks of 8 MiB and more mapped one by one, so that the system has them back when they are freed.

    Smaller ones stay on the heap: dequantized tiles are such, and are fast because they come back warm.
    """
    mallopt = getattr(_libc, "mallopt", None)  # musl has none
    if mallopt is not None and not is_users_own():
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def trim() -> None:
    """Call between layers. A process whose user has set glibc's own variables (MALLOC_...) is left alone."""
    global _lowest
    if _malloc_trim is None or is_users_own():
        return
    beyond = _beyond_blocks_in_use()
    if beyond - _lowest < SLACK_BYTES:
        _lowest = min(_lowest, beyond)
        return
    _malloc_trim(0)
    _lowest = _beyond_blocks_in_use()


def _beyond_blocks_in_use() -> int:
    """Resident bytes that are in no block in use: freed blocks, and what was never the allocator's."""
    in_use = 0
    if _mallinfo2 is not None:
        blocks = _mallinfo2()
        in_use = blocks.uordblks + blocks.hblkhd  # on heaps, and mapped one by one
    return _resident_bytes() - in_use


def _resident_bytes() -> int:
    # Less pages of mapped files, which come and go with experts that wait on disk.
    _, resident, of_files, *_ = map(int, _STATM.read_bytes().split())
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
