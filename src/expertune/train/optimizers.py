"""An optimizer by its name under `training.optim`: the default, the replacement without CUDA, bytes, Muon's settings.

A plan reads it, for which torch is not imported.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from expertune.errors import ConfigError

_DEFAULT = {"cpu": "adamw_torch", "cuda": "paged_adamw_8bit"}

# Numbers of state per parameter, where a name contains this; all others keep Adam's two moments.
_STATE_NUMBERS = {"muon": 1, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0}  # adafactor: a row and a column

# 8-bit optimizers that bitsandbytes computes on a CPU as well.
_8BIT_ON_CPU = ("adamw_8bit", "adamw_bnb_8bit", "lion_8bit", "rmsprop_bnb_8bit")

# Bytes that an update takes for each number of the factor that it is at, at the most: Muon's in float32 and bfloat16;
# of 8-bit states on a CPU both moments in float32, as they were and as they become, with what they are quantized by.
_UPDATE_BYTES = {"muon": 16, "8bit": 40}

# A byte per number of an 8-bit optimizer, and one float32 scale for each block of 256.
_BYTES_8BIT = 1 + 4 / 256

# Numbers that bitsandbytes has one scale for.
SCALE_BLOCK = 256

# Optimizers whose update of one expert looks at other experts' values, by parts of their names.
_NOT_BY_EXPERT = ("adafactor", "apollo", "galore", "lomo", "stable")

NOTHING_FOR_MUON = (
    "training.optim is muon, and the adapter has no factor that it updates: routers and the output head are left to "
    "AdamW. Set training.optim to adamw_torch, or name experts or attention in lora.targets"
)


def default_optimizer(device_type: str) -> str:
    """The optimizer of a run that names none."""
    return _DEFAULT.get(device_type, _DEFAULT["cpu"])


def usable_optimizer(name: str, device_type: str) -> str:
    """The optimizer that a run takes: paged ones need CUDA, and so do most 8-bit ones."""
    needs_cuda = "paged" in name or ("8bit" in name and name not in _8BIT_ON_CPU)
    return default_optimizer(device_type) if needs_cuda and device_type != "cuda" else name


def state_bytes(name: str, num_parameters: int, itemsize: int, device_type: str, num_by_adamw: int = 0) -> int:
    """Bytes of an optimizer's state.

    Args:
        name: as under `training.optim`.
        num_parameters: numbers that are trained.
        itemsize: bytes of each of them.
        device_type: `cpu` or `cuda`.
        num_by_adamw: numbers among them that Muon leaves to AdamW.
    """
    name = usable_optimizer(name.lower(), device_type)
    numbers = 0 if name == "sgd" else next((n for part, n in _STATE_NUMBERS.items() if part in name), 2)
    if name == "muon":
        return (num_parameters + num_by_adamw) * itemsize
    return int(num_parameters * numbers * (_BYTES_8BIT if "8bit" in name else itemsize))


def update_bytes(name: str, num_parameters: int, device_type: str) -> int:
    """Bytes that an update takes beside parameter, gradient and state of the factor that it is at.

    Args:
        name: as under `training.optim`.
        num_parameters: numbers of the largest factor.
        device_type: `cpu` or `cuda`.
    """
    name = usable_optimizer(name.lower(), device_type)
    kind = "8bit" if "8bit" in name and device_type == "cpu" else name
    return num_parameters * _UPDATE_BYTES.get(kind, 0)


def why_not_by_expert(optimizer: str, sizes: Iterable[int]) -> str | None:
    """Why an optimizer would take another step where experts are shared out to ranks; None where it would not.

    Args:
        optimizer: its name under `training.optim`.
        sizes: numbers of an expert in each factor.
    """
    if any(part in optimizer for part in _NOT_BY_EXPERT):
        return (
            f"training.optim {optimizer} updates an expert by what it finds in others, which are in other processes "
            "with distributed.experts: parallel; set training.optim to adamw_torch, or distributed.experts to replicate"
        )
    if "8bit" in optimizer and any(size % SCALE_BLOCK for size in sizes):
        return (
            f"training.optim {optimizer} has scales for {SCALE_BLOCK} numbers at a time, which would belong to two "
            "experts of two processes; set lora.r to a multiple of 4, or training.optim to adamw_torch"
        )
    return None


@dataclass(frozen=True)
class MuonSettings:
    """What `training.optim_args` may set, by torch's names.

    Attributes:
        momentum: of the gradients' mean.
        nesterov: look ahead by it.
        ns_steps: of the Newton-Schulz iteration.
        adjust_lr_fn: `match_rms_adamw` multiplies the learning rate by 0.2 sqrt(max(rows, columns)), by which an update
            is as large as AdamW's, so that its learning rates hold (Moonlight, 2025); `original` by
            sqrt(max(1, rows / columns)).
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"

    @classmethod
    def parse(cls, text: str | None) -> "MuonSettings":
        """Settings as transformers writes them: `momentum=0.9,ns_steps=6`.

        Raises:
            ConfigError: names the setting, and what it can be.
        """
        values: dict[str, Any] = {}
        readers = {each.name: _READERS[each.name] for each in fields(cls)}
        for part in filter(None, (text or "").replace(" ", "").split(",")):
            name, _, value = part.partition("=")
            if name not in readers:
                raise ConfigError(
                    f"training.optim_args: muon has no setting {name!r:.80}; it has {', '.join(readers)}, as in "
                    "momentum=0.95,ns_steps=5"
                )
            read, wanted = readers[name]
            try:
                values[name] = read(value)
            except (ValueError, KeyError):
                raise ConfigError(f"training.optim_args: {name} has to be {wanted}, got {value!r:.80}") from None
        return cls(**values)


def _momentum(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise ValueError
    return value


def _steps(text: str) -> int:
    if not 1 <= (value := int(text)) < 100:
        raise ValueError
    return value


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "momentum": (_momentum, "a number from 0 to below 1"),
    "nesterov": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "ns_steps": (_steps, "a number from 1 to 99"),
    "adjust_lr_fn": (
        {name: name for name in ("match_rms_adamw", "original")}.__getitem__,
        "match_rms_adamw or original",
    ),
}
