"""Layers of mapped files in the kernel's page cache: which stay there between two uses, and which are read ahead.

The kernel keeps what was used last. Of a model that is larger than memory, and is passed from its first layer to its
last again and again, none would be left when its turn comes. So as many layers as there is memory for stay, evenly
spread over the model, and each of the others is dropped from the cache after its use.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from expertune.checkpoint.reader import TensorEntry, advise
from expertune.kernels.limits import available_memory

# Of the memory that is free or holds cached files; and layers beside those that stay: one in use, one that is loaded
# and one that is read ahead.
_SHARE, _PASSING = 0.95, 3

# Multiples of it, modulo one, are spread evenly over any share of the layers.
_GOLDEN = 0.6180339887498949

_Span = tuple[Path, int, int]


class PageCache:
    """What of some layers' files is in the page cache.

    Args:
        files: the tensors of each layer in their files.
    """

    def __init__(self, files: Sequence[Sequence[TensorEntry]]) -> None:
        self._spans = [_spans(tensors) for tensors in files]
        sizes = [sum(end - start for _, start, end in spans) for spans in self._spans]
        self._total_bytes, self._passing_bytes = sum(sizes), _PASSING * max(sizes)
        self._cached: set[int] = set()

    def stays(self, layer: int) -> bool:
        """Whether there is memory for a layer to stay in the cache until its next use."""
        memory = _SHARE * available_memory() - self._passing_bytes
        return (layer * _GOLDEN) % 1 * self._total_bytes < memory

    def used(self, layer: int) -> None:
        """Call after a layer's use, when none of its pages is mapped."""
        if self.stays(layer):
            self._cached.add(layer)
        else:
            self._cached.discard(layer)
            # Where a launcher has started others on this machine, one may map the same files, and use the layer next.
            if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
                self._advise(layer, "DONTNEED")

    def read_ahead(self, layer: int) -> None:
        """Have the kernel read a layer that is not in the cache; returns before it is there."""
        if layer not in self._cached:
            self._cached.add(layer)
            self._advise(layer, "WILLNEED")

    def _advise(self, layer: int, advice: Literal["WILLNEED", "DONTNEED"]) -> None:
        # The mapped pages do not need it: a file that has been moved or deleted keeps them.
        with suppress(OSError):
            for path, start, end in self._spans[layer]:
                advise(path, start, end, advice)


def _spans(tensors: Sequence[TensorEntry]) -> list[_Span]:
    """From the first to the last byte of some tensors in each of their files."""
    spans: dict[Path, tuple[int, int]] = {}
    for tensor in tensors:
        start, end = spans.get(tensor.shard, (tensor.start, tensor.start))
        spans[tensor.shard] = min(start, tensor.start), max(end, tensor.start + tensor.nbytes)
    return [(path, start, end) for path, (start, end) in spans.items()]
