"""Slots of offloaded layers when a copy fails."""

import pytest
import torch

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
