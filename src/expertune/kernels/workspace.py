"""Memory that operators of one thread take turns in.

A tensor of tens of megabytes that is allocated for each layer is mapped and zeroed by the kernel page by page, which
takes as long as a fifth of the layer's GEMMs. What is taken here stays mapped. It is bounded by the largest layer's
working set.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor

from expertune.kernels.huge_pages import ask_for_huge_pages

_local = threading.local()


def clear() -> None:
    """Give this thread's memory back."""
    of_this_thread().clear()


def of_this_thread() -> dict[str, Any]:
    """This thread's memory by name, for `share`."""
    held: dict[str, Any] = _local.__dict__.setdefault("held", {})
    return held


def share(memory: dict[str, Any]) -> None:
    """Have this thread take turns in another thread's memory; no operator of both is ever under way."""
    _local.held = memory


def take(name: str, *shape: int) -> Tensor:
    """Float32 on the CPU, of this shape, whatever was in it; valid until the name is taken again on this thread."""
    size = math.prod(shape)
    return _at_least(name, size)[:size].view(shape)


def address(name: str, size: int) -> int:
    """Where so many numbers lie that `take` would give."""
    return _at_least(name, size).data_ptr()


def _at_least(name: str, size: int) -> Tensor:
    held = of_this_thread()
    found: Tensor | None = held.get(name)
    if found is None or found.numel() < size:
        held.pop(name, None)
        # Kept beyond the caller's inference mode: a tensor made in it could never be written to by training.
        with torch.inference_mode(False):
            found = held[name] = ask_for_huge_pages(torch.empty(size, dtype=torch.float32))
    return found


def as_float(tensor: Tensor, name: str | None = None) -> Tensor:
    """The tensor in float32 and adjoining in memory, as the native library reads it: itself, or a copy.

    The copy lies in `name`'s memory; without a name it is the caller's own.
    """
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.float().contiguous() if name is None else take(name, *tensor.shape).copy_(tensor)
