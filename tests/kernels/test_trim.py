"""Freed blocks of the C allocator go back to the system."""

import sys

import pytest
import torch

from expertune.kernels import trim
from tests.processes import BENEATH, run_program

pytestmark = pytest.mark.skipif(trim._malloc_trim is None, reason="glibc alone has malloc_trim")


def leave_holes() -> list[torch.Tensor]:
    """Blocks of 64 KiB of which every eighth lives on; what lies between cannot go back at the heap's end."""
    blocks = [torch.ones(16 * 1024) for _ in range(1200)]
    return blocks[::8]


def test_trim_gives_back_what_was_freed_once_memory_has_grown_by_the_slack(monkeypatch):
    assert trim._malloc_trim is not None
    trim._malloc_trim(0)  # else blocks may come of memory that earlier tests have freed, and nothing grows
    monkeypatch.setattr(trim, "SLACK_BYTES", 32 * 2**20)
    monkeypatch.setattr(trim, "_lowest", trim._beyond_blocks_in_use())
    kept = leave_holes()
    before = trim._resident_bytes()
    trim.trim()
    assert before - trim._resident_bytes() > 40 * 2**20
    assert all(block.eq(1).all() for block in kept)


@pytest.mark.skipif(trim._mallinfo2 is None, reason="glibc before 2.33 does not say what is in use")
def test_blocks_in_use_are_nothing_that_trim_could_give_back(monkeypatch):
    monkeypatch.setattr(trim, "SLACK_BYTES", 32 * 2**20)
    monkeypatch.setattr(trim, "_lowest", trim._beyond_blocks_in_use())
    monkeypatch.setattr(trim, "_malloc_trim", lambda _: pytest.fail("looked for holes among blocks in use"))
    kept = [torch.ones(16 * 1024) for _ in range(1200)]
    trim.trim()
    assert len(kept) == 1200


@pytest.mark.parametrize("why", ["memory has not grown", "the user has set glibc's own variables"])
def test_trim_leaves_the_heap_alone_where(monkeypatch, why):
    monkeypatch.setattr(trim, "_lowest", 0 if why.startswith("the user") else sys.maxsize)
    if why.startswith("the user"):
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setattr(trim, "_malloc_trim", lambda _: pytest.fail("gave memory back"))
    trim.trim()


FRAGMENT = """
import torch
from expertune.kernels.trim import map_large_blocks

def resident():
    # Without pages of libraries, of which as many are resident as the page cache had at hand.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

{call}
keep = []
for size in range(8):  # blocks that are given back between blocks that stay, as layers leave their inputs behind
    large = [torch.ones(2**20 * 12, dtype=torch.uint8) for _ in range(8)]
    keep.append(torch.ones(2**17, dtype=torch.uint8))
    del large
    torch.ones(2**20 * 20, dtype=torch.uint8)
    before = resident()
print(before)
"""


def test_memory_that_tensors_gave_back_leaves_the_process():
    def run(call):
        return float(run_program(FRAGMENT.format(call=call), imports=BENEATH).out)

    assert run("map_large_blocks()") < run("") - 10
