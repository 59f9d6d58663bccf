"""An allocator's error is recognized, whichever allocator reports it."""

import errno
import sys

import pytest
import torch

from expertune.placement.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory_recognizes_an_allocators_error(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_is_out_of_memory_recognizes_the_message_of_this_torchs_cpu_allocator() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_silent_failure_of_an_extension_is_one_only_where_the_system_bounds_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    silent = SystemError("error return without exception set")
    limits = {"now": (resource.RLIM_INFINITY,) * 2}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["now"])
    assert not is_out_of_memory(silent)
    limits["now"] = (10**9, 10**9)
    assert is_out_of_memory(silent)
    assert not is_out_of_memory(SystemError("bad argument to internal function"))
