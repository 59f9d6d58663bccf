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
    if isinstance(error, SystemError):
        # An extension failed without a word: under a limit of the system it had no memory for the words either.
        return "without exception set" in str(error) and _is_limited()
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _is_limited() -> bool:
    """Whether the system bounds this process's memory (`ulimit -d` or `-v`)."""
    try:
        import resource
    except ImportError:
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def in_one_line(error: BaseException) -> str:
    """The allocator's message without torch's place in its source."""
    text = re.sub(r"^\[enforce fail at [^\]]*\]\s*\S* == \S*\.\s*", "", " ".join(str(error).split()))
    return text[:_LONGEST_ERROR].rstrip(". ") or type(error).__name__
