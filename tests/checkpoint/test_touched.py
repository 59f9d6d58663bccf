"""Memory that is touched before it is asked for: whose it is, in which order, and how much of it."""

import pytest
import torch

from expertune.checkpoint import touched as module
from expertune.checkpoint.touched import LEAST_BYTES, touched


def test_blocks_come_in_the_announced_order_and_share_nothing() -> None:
    sizes = [LEAST_BYTES, 100, LEAST_BYTES + 4096, LEAST_BYTES]
    with touched(sizes) as memory:
        blocks = [memory.take(size) for size in sizes]
    assert [len(block) for block in blocks] == sizes
    for number, block in enumerate(blocks):
        block.fill_(number)
    assert all((block == number).all() for number, block in enumerate(blocks))


def test_block_that_was_not_announced_is_made_when_it_is_asked_for() -> None:
    with touched([LEAST_BYTES, LEAST_BYTES + 1]) as memory:
        assert len(memory.take(LEAST_BYTES + 1)) == LEAST_BYTES + 1
        assert len(memory.take(0)) == 0
        assert len(memory.take(LEAST_BYTES)) == LEAST_BYTES


def test_no_more_is_touched_ahead_than_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AHEAD_BYTES", 2 * LEAST_BYTES)
    made: list[int] = []
    touch = module._touch
    monkeypatch.setattr(module, "_touch", lambda size: made.append(size) or touch(size))
    with touched([LEAST_BYTES] * 6) as memory:
        for taken in range(6):
            assert len(memory.take(LEAST_BYTES)) == LEAST_BYTES
            assert taken < len(made) <= taken + 3
    assert made == [LEAST_BYTES] * 6


def test_error_of_the_reader_ends_the_touching() -> None:
    with pytest.raises(ZeroDivisionError), touched([LEAST_BYTES] * 100):
        _ = 1 / 0


def test_memory_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(RuntimeError), touched([2**62]) as memory:
        memory.take(2**62)
    assert torch.ones(1).item() == 1
