"""Offloaded layers that cannot be loaded: a copy fails, or memory runs out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertune.checkpoint.reader import TensorEntry
from expertune.placement import mapped
from expertune.placement.mapped import MappedLayers, map_tensor
from expertune.placement.prefetch import Prefetcher
from expertune.placement.slots import SlotLayers


def test_layer_whose_copy_failed_says_so_where_it_is_waited_for_and_leaves_its_slot_when_it_is_dropped() -> None:
    rooms = [[torch.empty(4, dtype=torch.uint8, device="meta")]]
    slots = SlotLayers([[torch.ones(8, dtype=torch.uint8)]], torch.device("cpu"), rooms)
    for _ in range(3):  # one more than there are slots
        slots.start(0)
        with pytest.raises(RuntimeError, match="size"):
            slots.wait(0)
        slots.drop(0)
    slots.close()


def without_memory_at(call: int, do: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[object] = []

    def once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return do(*args)

    return once


@pytest.mark.parametrize("backend", ["slots", "mapped"])
def test_prefetched_layer_that_memory_did_not_suffice_for_is_loaded_when_it_is_used_again(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [[TensorEntry("packed", tmp_path / str(layer), torch.uint8, (8,), 0, 8)] for layer in range(3)]
    for layer, [entry] in enumerate(files):
        entry.shard.write_bytes(bytes([layer] * 8))
    layers = [[map_tensor(entry)] for [entry] in files]
    if backend == "slots":
        monkeypatch.setattr(SlotLayers, "_targets", without_memory_at(2, SlotLayers._targets))
        prefetcher = Prefetcher(SlotLayers(layers, torch.device("cpu")), 3)
    else:
        monkeypatch.setattr(mapped, "_read", without_memory_at(2, mapped._read))
        prefetcher = Prefetcher(MappedLayers(layers, files), 3)
    with prefetcher.acquire(0, backward=False):
        pass
    with pytest.raises(torch.OutOfMemoryError), prefetcher.acquire(1, backward=False):
        pass
    for layer in (0, 1, 2):  # from the start again
        with prefetcher.acquire(layer, backward=False) as tensors:
            assert tensors[0].tolist() == [layer] * 8
    prefetcher.close()
