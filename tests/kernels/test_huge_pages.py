"""Weights and scratch memory ask for huge pages; what lies beside them in memory does not."""

import ctypes
import mmap
from pathlib import Path

import pytest
import torch

from expertune.kernels import huge_pages
from expertune.kernels.huge_pages import ask_for_huge_pages

HUGE = 2**21
SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that an address lies in."""
    inside = False
    for line in SMAPS.read_text(encoding="ascii", errors="replace").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or not SMAPS.exists(), reason="no huge pages here"
)
def test_whole_pages_inside_a_tensor_are_asked_for_and_no_byte_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, madvise = [], huge_pages._madvise
    assert madvise is not None

    def recorded(start: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> None:
        asked.append((start.value, size.value, advice))
        madvise(start, size, advice)

    monkeypatch.setattr(huge_pages, "_madvise", recorded)
    # A mapping that nothing else has been in, and in it a tensor that neither begins nor ends with a huge page.
    memory = torch.frombuffer(mmap.mmap(-1, 7 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE
    tensor = memory[first + 4096 : first + 4 * HUGE + 8192]
    start = memory.data_ptr() + first + HUGE
    assert ask_for_huge_pages(tensor) is tensor
    assert asked == [(start, 3 * HUGE, 14)]  # MADV_HUGEPAGE
    assert "hg" in flags_at(start)
    assert "hg" in flags_at(start + 3 * HUGE - 1)
    assert "hg" not in flags_at(start - 1)
    assert "hg" not in flags_at(start + 3 * HUGE)


@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_small_tensors_and_those_without_memory_are_left_alone(made_on: str) -> None:
    tensor = torch.zeros(1000, device=made_on)
    assert ask_for_huge_pages(tensor) is tensor
