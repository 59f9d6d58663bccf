"""Weights and scratch memory ask for huge pages; what lies beside them in memory does not."""

from pathlib import Path

import pytest
import torch

from expertune.kernels.huge_pages import ask_for_huge_pages

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
def test_whole_pages_inside_a_tensor_are_asked_for_and_no_byte_outside() -> None:
    tensor = torch.empty(9 * 2**20 + 4096, dtype=torch.uint8)
    inside = -(-tensor.data_ptr() // 2**21) * 2**21
    assert ask_for_huge_pages(tensor) is tensor
    assert "hg" in flags_at(inside)
    if inside != tensor.data_ptr():
        assert "hg" not in flags_at(tensor.data_ptr())


@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_small_tensors_and_those_without_memory_are_left_alone(made_on: str) -> None:
    tensor = torch.zeros(1000, device=made_on)
    assert ask_for_huge_pages(tensor) is tensor
