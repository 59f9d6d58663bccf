"""How an allocator reports that memory ran out."""

import errno
import re

import torch

# What allocators write into a plain RuntimeError.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|std::bad_alloc|ALLOC_FAILED|Cannot allocate memory",
    re.IGNORECASE,
)
_LONGEST_ERROR = 300


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a CUDA device, of torch's CPU allocator, of Python or of the OS."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def in_one_line(error: BaseException) -> str:
    """The allocator's message without torch's place in its source."""
    text = re.sub(r"^\[enforce fail at [^\]]*\]\s*\S* == \S*\.\s*", "", " ".join(str(error).split()))
    return text[:_LONGEST_ERROR].rstrip(". ") or type(error).__name__
