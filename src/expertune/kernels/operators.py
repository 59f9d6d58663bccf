"""What torch's operators here share: objects that they find by name, and no autocast.

An operator takes tensors, numbers and strings. What else a layer is (its activation, settings, where its weights are
offloaded to) is registered under a stable name, which is the operator's argument: a graph that `torch.compile` made of
the same model in another process has the same arguments, so that it is found in torch's cache.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

_registered: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


def register(owner: object, name: str) -> str:
    """The name under which `find` gives the owner while it lives: `name`, with a number where another one has it."""
    found, number = name, 1
    while found in _registered:
        number += 1
        found = f"{name}#{number}"
    _registered[found] = owner
    return found


def find(name: str) -> Any:
    """What is registered under a name."""
    return _registered[name]


def no_autocast(x: Tensor) -> torch.autocast:
    """Inside an operator autocast is off: it would round float32 factors and GEMMs to half precision on the way."""
    return torch.autocast(x.device.type, enabled=False)
