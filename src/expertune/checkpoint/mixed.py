"""Which linears of the decoder stay in 16 bits: `quantization.layers` resolved against one model."""

import re
from collections.abc import Mapping

from torch import nn

from expertune.checkpoint.linears import attention_linears
from expertune.checkpoint.names import NameMap
from expertune.errors import ConfigError, nearest

_ATTENTION = "attention"


def split_linears(
    linears: Mapping[str, nn.Linear], model: nn.Module, names: NameMap, bits: Mapping[str, int]
) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """The linears that become 4-bit and those that stay as they are, by live name in model order.

    Args:
        linears: what would become 4-bit.
        model: the model; the meta device is enough, and experts may be swapped already.
        names: its name map.
        bits: `quantization.layers`.

    Raises:
        ConfigError: a key fits no linear, names experts, or is no regular expression.
    """
    patterns = {key: _compile(key) for key in bits}
    attention = set(attention_linears(model, names.specs))
    fits: dict[str, list[str]] = {key: [] for key in bits}
    packed: dict[str, nn.Linear] = {}
    whole: dict[str, nn.Linear] = {}
    for name, linear in linears.items():
        on_disk = names.on_disk(name)
        found = [
            key
            for key, pattern in patterns.items()
            if pattern.match(on_disk) or (key == _ATTENTION and name in attention)
        ]
        for key in found:
            fits[key].append(name)
        (whole if found and bits[found[0]] == 16 else packed)[name] = linear
    if unused := [key for key, fitting in fits.items() if not fitting]:
        _refuse(unused[0], {names.on_disk(name).rpartition(".")[2] for name in linears}, names)
    return packed, whole


def _compile(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise ConfigError(f"quantization.layers: {key!r} is not a regular expression: {error}") from None


def _refuse(key: str, projections: set[str], names: NameMap) -> None:
    of_experts = {"experts", *names.projection_names.values()}
    if key in of_experts:
        raise ConfigError(
            f"quantization.layers: {key!r} names experts, which are always in 4 bits; name linears beside them, such "
            f"as {_ATTENTION}"
        )
    known = sorted({_ATTENTION, *projections})
    meant = nearest(key, known)
    hint = f"; did you mean {meant}?" if meant else ""
    raise ConfigError(
        f"quantization.layers: {key!r} fits no linear that would be in 4 bits{hint} (this model has {', '.join(known)})"
    )
