"""What an optimizer's name under `training.optim` stands for.

transformers builds the optimizer from its name, with two parameter groups: with weight decay and without. Here stands
what the trainer and the plan both need to know of it: the default, the replacement without CUDA, and the state's bytes.
"""

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
