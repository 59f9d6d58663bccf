"""Layers on disk in the kernel's page cache: as many stay as there is memory for, the others leave it after use."""

import os
from pathlib import Path

import pytest
import torch

from expertune.checkpoint.reader import TensorEntry
from expertune.placement import page_cache
from expertune.placement.page_cache import PageCache

LAYERS, SIZE = 32, 2**16


@pytest.fixture
def files(tmp_path: Path) -> list[list[TensorEntry]]:
    """Two tensors of each layer in a file of its own."""
    entries = []
    for layer in range(LAYERS):
        path = tmp_path / f"layer-{layer}"
        path.write_bytes(bytes(SIZE))
        half = SIZE // 2
        entries.append([TensorEntry("", path, torch.uint8, (half,), at, half) for at in (0, half)])
    os.sync()  # what has not been written cannot leave the cache
    return entries


def leave_memory_for(layers: float, monkeypatch: pytest.MonkeyPatch) -> None:
    available = int((layers + 3) * SIZE / 0.95) + 1
    monkeypatch.setattr(page_cache, "available_memory", lambda: available)


def is_cached(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], SIZE // 2, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except (OSError, AttributeError):
            pytest.skip("this system does not tell what is in its page cache")


def drops_pages(path: Path) -> bool:
    """Whether the file system does as it is advised, by advice of the test's own."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not is_cached(path)


@pytest.mark.parametrize("count", [0, 1, 9, 16, 31, 32, 100])
def test_as_many_layers_stay_as_there_is_memory_for_evenly_spread(
    count: int, files: list[list[TensorEntry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_memory_for(count, monkeypatch)
    stays = [PageCache(files).stays(layer) for layer in range(LAYERS)]
    assert abs(sum(stays) - min(count, LAYERS)) <= 1
    for begin in range(0, LAYERS, 8):
        assert abs(sum(stays[begin : begin + 8]) - min(count, LAYERS) / 4) < 2


def test_layer_for_which_there_is_no_memory_leaves_the_cache_after_its_use_and_is_read_ahead_again(
    files: list[list[TensorEntry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PageCache(files)
    path = files[5][0].shard
    assert is_cached(path)
    cache.used(5)
    assert is_cached(path)
    leave_memory_for(0, monkeypatch)
    cache.used(5)
    if is_cached(path) and not drops_pages(files[6][0].shard):
        pytest.skip("this file system keeps its files in memory")
    assert not is_cached(path)
    cache.read_ahead(5)
    for _ in range(1000):
        if is_cached(path):
            break
        os.sched_yield()
    assert is_cached(path)


def test_layer_that_another_process_may_use_next_stays_in_the_cache(
    files: list[list[TensorEntry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    leave_memory_for(0, monkeypatch)
    PageCache(files).used(5)
    assert is_cached(files[5][0].shard)


def test_file_that_is_gone_is_passed_over(files: list[list[TensorEntry]], monkeypatch: pytest.MonkeyPatch) -> None:
    leave_memory_for(0, monkeypatch)
    cache = PageCache(files)
    files[5][0].shard.unlink()
    cache.used(5)
    cache.read_ahead(5)
