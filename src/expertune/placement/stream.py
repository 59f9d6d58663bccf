"""Frozen expert bytes that wait elsewhere, brought one layer ahead of use.

A step passes the layers forward and then backward. While one layer computes, the next one on the way is brought; the
layer at a turn of the way is kept, and the recomputation and the backward of a layer share one transfer, so that a step
takes two transfers of each layer less one at each turn. At most two layers are there at a time: the one in use and the
one on its way. The bytes are the same wherever they waited, and so are the results.

A `Carrier` does the bringing: `mapped.py` pages a mapped file in and out on a CPU, `slots.py` copies into two buffers
on a device.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor


class Carrier(Protocol):
    """Brings layers by number."""

    def start(self, layer: int) -> None:
        """Begin to bring a layer; returns at once."""

    def wait(self, layer: int) -> list[Tensor]:
        """The layer's tensors where they are used, once they are there."""

    def used(self, layer: int) -> None:
        """The work on a layer has been issued."""

    def drop(self, layer: int) -> None:
        """The layer makes room."""

    def close(self) -> None:
        """Give everything back."""


class Stream:
    """The layers of a model that are brought, in the order of its forward.

    Args:
        carrier: brings them.
        num_layers: how many there are.

    Attributes:
        transfers: layers brought since the start.
        waited_seconds: time in which the host stood still because a layer was not there yet.
    """

    def __init__(self, carrier: Carrier, num_layers: int) -> None:
        self.carrier, self.num_layers = carrier, num_layers
        self.transfers, self.waited_seconds = 0, 0.0
        self._there: list[int] = []
        self._expects_backward = False

    def legs(self) -> "list[Leg]":
        """Each layer's part of the way, as its operator takes it."""
        return [Leg(self, layer) for layer in range(self.num_layers)]

    def expect(self, backward: bool) -> None:
        """Whether a backward follows the forward that is about to run."""
        self._expects_backward = backward

    @contextmanager
    def bring(self, layer: int, backward: bool, again: bool = False) -> Iterator[list[Tensor]]:
        """The layer's tensors while the block runs; the next layer on the way is brought meanwhile.

        Args:
            layer: its number.
            backward: which way through the layers this is.
            again: the same layer is used once more before the next one.
        """
        following = self._following(layer, backward)
        for other in [other for other in self._there if other not in (layer, following)]:
            self._drop(other)
        self._start(layer)
        began = time.monotonic()
        tensors = self.carrier.wait(layer)
        self.waited_seconds += time.monotonic() - began
        if following is not None:
            self._start(following)
        try:
            yield tensors
        finally:
            self.carrier.used(layer)
            # At a turn of the way the layer itself comes next.
            if following is not None and not again:
                self._drop(layer)

    def close(self) -> None:
        """Drop every layer; the stream is not used afterwards."""
        for layer in list(self._there):
            self._drop(layer)
        self.carrier.close()

    def _following(self, layer: int, backward: bool) -> int | None:
        """The layer after this one; None where the way turns, and this one is next again."""
        if backward:
            return layer - 1 if layer else None
        if layer + 1 < self.num_layers:
            return layer + 1
        return None if self._expects_backward or self.num_layers == 1 else 0

    def _start(self, layer: int) -> None:
        if layer not in self._there:
            self.carrier.start(layer)
            self._there.append(layer)
            self.transfers += 1

    def _drop(self, layer: int) -> None:
        self.carrier.drop(layer)
        self._there.remove(layer)


class Leg:
    """One layer's `expertune.kernels.expert_mlp.Transport`."""

    def __init__(self, stream: Stream, layer: int) -> None:
        self.stream, self.layer = stream, layer

    def expect(self, backward: bool) -> None:
        """See `Stream.expect`."""
        self.stream.expect(backward)

    def bring(
        self, weights: Sequence[Tensor], backward: bool, again: bool = False
    ) -> AbstractContextManager[list[Tensor]]:
        """See `Stream.bring`; the tensors that stay (biases) are handed on as they are."""
        return self._bring(list(weights), backward, again)

    def __deepcopy__(self, memo: object) -> "Leg":
        # A copy of the model reads the same bytes on the same way.
        return self

    @contextmanager
    def _bring(self, weights: list[Tensor], backward: bool, again: bool) -> Iterator[list[Tensor]]:
        with self.stream.bring(self.layer, backward, again) as brought:
            yield [*brought, *weights[len(brought) :]]
