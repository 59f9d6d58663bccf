"""Expert bytes on the host or on disk, copied into two slots on the device: one in use, one being filled.

On CUDA the copies run on a stream of their own, from pinned memory, beside the computation. A layer on disk is first
read into a pinned buffer by a thread. On other devices the thread copies.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Of each tensor in a slot, so that kernels may load 16 bytes at a time.
_ALIGNMENT = 256

_NUM_SLOTS = 2


class SlotLayers:
    """A `Backend` for layers that are offloaded to the host or to disk.

    Args:
        layers: the offloaded tensors of each layer, pinned or mapped.
        device: the device that computes.
        rooms: tensors that a slot has room for, of each layer, without memory; None means those of the layer.
    """

    def __init__(
        self, layers: Sequence[list[Tensor]], device: torch.device, rooms: Sequence[list[Tensor]] | None = None
    ) -> None:
        self._layers, self._rooms, self._device = list(layers), list(rooms or layers), device
        self._cuda = device.type == "cuda"
        size = _slot_bytes(self._rooms)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_NUM_SLOTS)]
        self._free = list(range(_NUM_SLOTS))
        self._slot_of: dict[int, int] = {}
        self._loading: dict[int, Future[Any]] = {}
        self._used: list[Any] = [None] * _NUM_SLOTS
        self._copier = ThreadPoolExecutor(1, "expert-bytes", initializer=partial(_use, device))
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # on which layers were written
        staged = self._cuda and any(map(_is_pageable, self._layers))
        size = _slot_bytes(self._layers)
        self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=True) if staged else None
        self._staged: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return sum(slot.nbytes for slot in self._slots)

    def start(self, layer: int) -> None:
        """Start to fill a free slot."""
        slot = self._free.pop()
        self._slot_of[layer] = slot
        self._loading[layer] = self._copier.submit(self._fill, layer, slot)

    def expect(self, layer: int) -> None:
        """Nothing to do: it would take a slot."""

    def wait(self, layer: int) -> list[Tensor]:
        """The layer's tensors in its slot; work that is issued after this sees them filled."""
        filled = self._loading[layer].result()
        if filled is not None:
            torch.cuda.current_stream(self._device).wait_event(filled)
        return self._rooms_of(layer)

    def used(self, layer: int) -> None:
        """Record the end of the work on the slot."""
        if self._cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._used[self._slot_of[layer]] = event

    def drop(self, layer: int) -> None:
        """Free the layer's slot; why it could not be filled, if so, is what `wait` raises."""
        self._loading.pop(layer).exception()
        self._free.append(self._slot_of.pop(layer))

    def close(self) -> None:
        """End the thread and free the slots."""
        self._copier.shutdown()
        if self._stream is not None:
            # A copy that nobody has waited for may be under way, and the slots' memory is given to what comes next.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._slots.clear()
        self._staging = None

    def _rooms_of(self, layer: int) -> list[Tensor]:
        return _views(self._slots[self._slot_of[layer]], self._rooms[layer])

    def _targets(self, layer: int) -> list[Tensor]:
        """Where a layer's tensors are copied to."""
        return self._rooms_of(layer)

    def _copied(self, layer: int) -> None:
        """Called when the copies of a layer have been issued, on the thread and the stream that copy."""

    def _fill(self, layer: int, slot: int) -> Any:
        """Copy a layer into a slot; the event after which it is loaded, None where it is loaded on return."""
        sources, targets = self._layers[layer], self._targets(layer)
        if self._staging is not None and _is_pageable(sources):
            if self._staged is not None:
                self._staged.synchronize()  # the buffer's last copy has ended
            staged = _views(self._staging, sources)
            for to, source in zip(staged, sources, strict=True):
                to.copy_(source)
            sources = staged
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if self._stream is not None and self._used[slot] is not None:
                self._stream.wait_event(self._used[slot])
            for to, source in zip(targets, sources, strict=True):
                to.copy_(source, non_blocking=self._cuda)
            self._copied(layer)
            if self._stream is None:
                return None
            filled = torch.cuda.Event()
            filled.record(self._stream)
            self._staged = filled
            return filled


def _use(device: torch.device) -> None:
    """Have this thread use the device. It begins with the first GPU, whose memory may be another process's."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _is_pageable(tensors: Sequence[Tensor]) -> bool:
    """Whether some lie on the host where a device cannot copy from beside its work."""
    return any(tensor.device.type == "cpu" and not tensor.is_pinned() for tensor in tensors)


def _slot_bytes(layers: Sequence[Sequence[Tensor]]) -> int:
    """Bytes of a slot that holds any of the layers."""
    return max((sum(_aligned(tensor.nbytes) for tensor in tensors) for tensors in layers), default=0)


def _views(slot: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a slot with the shapes and dtypes of `like`, one after the other."""
    views, at = [], 0
    for tensor in like:
        views.append(slot[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += _aligned(tensor.nbytes)
    return views


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
