"""Offloaded expert bytes, prefetched one layer ahead of use.

A step passes the layers forward and then backward. While one layer computes, the next one in that order is prefetched.
The layer at a turnaround is kept, and the recomputation and the backward of a layer share one transfer, so that a step
takes two transfers of each layer less one at each turnaround. At most two layers are loaded at a time: the one in use
and the next one. The bytes are the same wherever they were offloaded to, and so are the results.

A `Backend` does the transfers: `mapped.py` pages a mapped file in and out on a CPU, `slots.py` copies into two buffers
on a device, `gathered.py` fills these from all ranks. `expertune.placement.experts.Placement` chooses.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """Transfers layers, which it knows by number."""

    def start(self, layer: int) -> None:
        """Start to load a layer; returns at once."""

    def expect(self, layer: int) -> None:
        """The layer follows those that were started; it may be brought nearer where that takes none of their memory."""

    def wait(self, layer: int) -> list[Tensor]:
        """The layer's tensors on the device that computes, once they are loaded; raises what kept them from it."""

    def used(self, layer: int) -> None:
        """The work on a layer has been issued."""

    def drop(self, layer: int) -> None:
        """Free the memory of a layer that was loaded, or could not be."""

    def close(self) -> None:
        """Free everything; the backend is not used afterwards."""


class Prefetcher:
    """The offloaded layers of a model, in the order of its forward.

    Args:
        backend: transfers them.
        num_layers: how many there are.

    Attributes:
        transfers: layers loaded since the start.
        waited_seconds: time in which the host waited for a layer that was not loaded yet.
    """

    def __init__(self, backend: Backend, num_layers: int) -> None:
        self.backend, self.num_layers = backend, num_layers
        self.transfers, self.waited_seconds = 0, 0.0
        self._loaded: list[int] = []
        self._backward_follows, self._in_turns = False, False

    def handles(self) -> "list[PrefetchedLayer]":
        """One handle for each layer's operator."""
        return [PrefetchedLayer(self, layer) for layer in range(self.num_layers)]

    def announce(self, backward: bool) -> None:
        """Whether a backward follows the forward that is about to run."""
        if not self._in_turns:
            self._backward_follows = backward

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """While open, several forwards pass each layer before the next, and a backward of the last one follows.

        A layer is then dropped when another is used, not at the end of each use.
        """
        self._backward_follows = self._in_turns = True
        try:
            yield
        finally:
            self._in_turns = False

    @contextmanager
    def acquire(self, layer: int, backward: bool, reused: bool = False) -> Iterator[list[Tensor]]:
        """The layer's tensors while the block runs; the next layer is prefetched meanwhile.

        Args:
            layer: its number.
            backward: the direction in which the layers are passed.
            reused: the same layer is used once more before the next one.
        """
        following = self._following(layer, backward)
        for other in [other for other in self._loaded if other not in (layer, following)]:
            self._drop(other)
        self._start(layer)
        started = time.monotonic()
        try:
            tensors = self.backend.wait(layer)
        except Exception:
            self._drop(layer)  # so that it is loaded when it is used again
            raise
        self.waited_seconds += time.monotonic() - started
        if following is not None:
            self._start(following)
            if (after := self._following(following, backward)) is not None and after != layer:
                self.backend.expect(after)
        try:
            yield tensors
        finally:
            self.backend.used(layer)
            # At a turnaround the layer itself comes next.
            if following is not None and not reused and not self._in_turns:
                self._drop(layer)

    def drop_loaded(self) -> None:
        """Drop every layer."""
        for layer in list(self._loaded):
            self._drop(layer)

    def close(self) -> None:
        """Drop every layer; the prefetcher is not used afterwards."""
        self.drop_loaded()
        self.backend.close()

    def _following(self, layer: int, backward: bool) -> int | None:
        """The layer after this one; None at a turnaround, where this one comes next again."""
        if backward:
            return layer - 1 if layer else None
        if layer + 1 < self.num_layers:
            return layer + 1
        return None if self._backward_follows or self.num_layers == 1 else 0

    def _start(self, layer: int) -> None:
        if layer not in self._loaded:
            self.backend.start(layer)
            self._loaded.append(layer)
            self.transfers += 1

    def _drop(self, layer: int) -> None:
        self._loaded.remove(layer)
        self.backend.drop(layer)


class PrefetchedLayer:
    """One layer's `expertune.kernels.expert_mlp.LayerHandle`."""

    def __init__(self, prefetcher: Prefetcher, layer: int) -> None:
        self.prefetcher, self.layer = prefetcher, layer

    def announce(self, backward: bool) -> None:
        """See `Prefetcher.announce`."""
        self.prefetcher.announce(backward)

    def acquire(
        self, weights: Sequence[Tensor], backward: bool, reused: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """See `Prefetcher.acquire`; tensors that are not offloaded (biases) are passed through."""
        return self._acquire(list(weights), backward, reused)

    def __deepcopy__(self, memo: object) -> "PrefetchedLayer":
        # A copy of the model reads the same bytes in the same order.
        return self

    @contextmanager
    def _acquire(self, weights: list[Tensor], backward: bool, reused: bool) -> Iterator[list[Tensor]]:
        with self.prefetcher.acquire(self.layer, backward, reused) as loaded:
            yield [*loaded, *weights[len(loaded) :]]
