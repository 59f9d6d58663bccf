"""What an optimizer's name under `training.optim` stands for.

transformers builds the optimizer from its name, with two parameter groups: with weight decay and without. Here stands
what the trainer and the plan both need to know of it: the default, the replacement without CUDA, the state's bytes, and
how the state is allocated before the first update.
"""

import inspect
from typing import Any

import torch

_DEFAULT = {"cpu": "adamw_torch", "cuda": "paged_adamw_8bit"}

# Numbers of state per parameter, where a name contains this; all others keep Adam's two moments.
_STATE_NUMBERS = {"lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0}  # adafactor: a row and a column of each matrix

# A byte per number of an 8-bit optimizer, and one float32 scale for each block of 256.
_BYTES_8BIT = 1 + 4 / 256


def default_optimizer(device_type: str) -> str:
    """The optimizer of a run that names none."""
    return _DEFAULT.get(device_type, _DEFAULT["cpu"])


def usable_optimizer(name: str, device_type: str) -> str:
    """The optimizer that a run takes: 8-bit and paged ones need CUDA."""
    needs_cuda = "8bit" in name or "paged" in name
    return default_optimizer(device_type) if needs_cuda and device_type != "cuda" else name


def state_bytes(name: str, num_parameters: int, itemsize: int, device_type: str) -> int:
    """Bytes of an optimizer's state.

    Args:
        name: as under `training.optim`.
        num_parameters: numbers that are trained.
        itemsize: bytes of each of them.
        device_type: `cpu` or `cuda`.
    """
    name = usable_optimizer(name.lower(), device_type)
    numbers = 0 if name == "sgd" else next((n for part, n in _STATE_NUMBERS.items() if part in name), 2)
    return int(num_parameters * numbers * (_BYTES_8BIT if "8bit" in name else itemsize))


def allocate_states(optimizer: Any) -> None:
    """Allocate the states that an optimizer's first update would allocate, with the values that it would give them.

    torch's optimizers do this in `_init_group` (read in torch 2.11 to 2.13), which looks at gradients' shapes alone;
    bitsandbytes' in `init_state` (read in 0.50). Other optimizers allocate in their first update: transformers'
    Adafactor, torch's SGD with momentum, and those of further packages.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    groups = optimizer.param_groups
    new = [parameter for group in groups for parameter in group["params"] if not optimizer.state.get(parameter)]
    try:
        if hasattr(optimizer, "init_state"):
            if not optimizer.initialized:
                optimizer.check_overrides()
                optimizer.to_gpu()
                optimizer.initialized = True
            for number, group in enumerate(groups):
                for index, parameter in enumerate(group["params"]):
                    if not optimizer.state.get(parameter):
                        optimizer.init_state(group, parameter, number, index)
        elif hasattr(optimizer, "_init_group"):
            for parameter in new:
                parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand_as(parameter)
            num_lists = len(inspect.signature(optimizer._init_group).parameters) - 1
            with torch.no_grad():
                for group in groups:
                    optimizer._init_group(group, *([] for _ in range(num_lists)))
    except Exception:
        for parameter in new:
            optimizer.state.pop(parameter, None)
        raise
    finally:
        for parameter in new:
            parameter.grad = None
