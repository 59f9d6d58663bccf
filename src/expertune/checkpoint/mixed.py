"""Which linears of the decoder stay in 16 bits: `quantization.layers` resolved against one model, and back."""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from expertune.checkpoint.linears import attention_linears
from expertune.checkpoint.names import NameMap
from expertune.errors import ConfigError, nearest

_ATTENTION = "attention"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FROM_LAYER = re.compile(r"[^.]+\.\d+\..+")


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


def as_layers(whole: Collection[str], linears: Collection[str], names: NameMap) -> dict[str, int]:
    """The value of `quantization.layers` that keeps these linears in 16 bits: the same for the same linears.

    A projection that stays everywhere is named alone, one that stays in some layers with their numbers:
    `{k_proj: 16, "layers.(0|31).mlp.down_proj": 16}`.

    Args:
        whole: live names of the linears that stay in 16 bits.
        linears: live names of all that would become 4-bit.
        names: the model's name map.
    """
    places = _ends(names.on_disk(name) for name in linears)
    stay = dict(zip(linears, places, strict=True))
    kept = {stay[name] for name in whole}
    found: set[str] = set()
    for leaf in {_leaf(place) for place in kept}:
        alike = [place for place in places if _leaf(place) == leaf]
        if kept.issuperset(alike):
            found.add(leaf)
            continue
        by_kind: dict[str, list[str]] = {}
        for place in alike:
            by_kind.setdefault(_NUMBER.sub("#", place), []).append(place)
        for kind, each in by_kind.items():
            own = [place for place in each if place in kept]
            if kind.count("#") != 1:
                found.update(own)
            elif own:
                numbers = sorted(int(_NUMBER.findall(place)[0]) for place in own)
                found.add(kind.replace("#", r"\d+" if len(own) == len(each) else f"({'|'.join(map(str, numbers))})"))
    return dict.fromkeys(sorted(found), 16)


def _ends(on_disk: Iterable[str]) -> list[str]:
    """The names from their layer on, where these are as many: what is before may have a prefix or not."""
    whole = list(on_disk)
    ends = [match[0] if (match := _FROM_LAYER.search(name)) else name for name in whole]
    return ends if len(set(ends)) == len(whole) else whole


def _leaf(place: str) -> str:
    return place.rpartition(".")[2]


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
