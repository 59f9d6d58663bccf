"""bitsandbytes' 4-bit checkpoints: weights taken byte by byte, in whatever pieces a checkpoint holds them.

A 4-bit weight is `X` (uint8 [N*K/2, 1]) and its state beside it: `X.absmax`, `X.quant_map`, `X.nested_absmax`,
`X.nested_quant_map`, and `X.quant_state.bitsandbytes__nf4`, which is JSON (`bnb4bit_packed.py`). Which linears
are 4-bit is as in the file. Experts come in pieces of several kinds (`bnb4bit_experts.py`).

Shape suffixes: N output features, K input features.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn

from expertune.checkpoint.formats.bnb4bit_experts import expert_weight, place_experts
from expertune.checkpoint.formats.bnb4bit_packed import read_packed
from expertune.checkpoint.formats.interface import Kept, Piece, Target
from expertune.checkpoint.linears import NF4_STATE
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import TensorEntry
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.kernels.nf4 import BLOCK_SIZE

_STATE_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)")


def recognizes(config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """See `Format`; where the config says nothing, the state's name does."""
    if config is None:
        return any(key.endswith(f".{NF4_STATE}") for key in keys)
    return config.get("quant_method") == "bitsandbytes" or ("load_in_4bit" in config and not config.get("quant_method"))


def unreadable(config: Mapping[str, Any]) -> str | None:
    """See `Format`; all but nf4 in bytes is."""
    if not config.get("load_in_4bit", config.get("_load_in_4bit", False)):
        return "bitsandbytes, 8 bits"
    if config.get("bnb_4bit_quant_type", "nf4") != "nf4":
        return f"bitsandbytes, {config['bnb_4bit_quant_type']}"
    if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        return f"bitsandbytes, packed into {config['bnb_4bit_quant_storage']}"
    return None


def parts_of(keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """See `Format`; a weight is its codes, `weight`, and its state, part by part."""
    ends = (f".{NF4_STATE}", ".absmax")
    parts: dict[str, dict[str, str]] = {key.removesuffix(end): {} for end in ends for key in keys if key.endswith(end)}
    for key in keys:
        state = _STATE_PART.fullmatch(key)
        if key in parts:
            parts[key]["weight"] = key
        elif state and state[1] in parts:
            parts[state[1]][state[2]] = key
    return parts


def kept(pieces: Sequence[Piece], model: nn.Module, names: NameMap) -> Kept:
    """See `Format`; the 4-bit linears are those of the file.

    Scales stay in 8 bits where all experts have such scales, which can all stay as they are. Otherwise all are held as
    float32, which is what the file has or what its 8-bit ones stand for, exactly.
    """
    destinations = [(piece, names.locate(piece.key)) for piece in pieces if piece.format is not None]
    nested = [
        "nested_absmax" in piece.parts and weight.keeps_nested_scales
        for piece, destination in destinations
        if (weight := expert_weight(names, destination)) is not None and not weight.lies_across
    ]
    packed = {destination.name for _, destination in destinations if destination.converter is None}
    linears = {
        name: module for name, module in model.named_modules() if f"{name}.weight" in packed and _stays_packed(module)
    }
    return Kept("nf4", all(nested), linears) if nested else Kept(linears=linears)


def place(target: Target, piece: Piece, entries: Mapping[str, TensorEntry]) -> bool:
    """See `Format`; experts and linears keep their bytes, what is neither in the live model is dequantized."""
    packed, destination = read_packed(piece.key, entries), target.names.locate(piece.key)
    weight = expert_weight(target.names, destination)
    if weight is not None:
        return place_experts(target, packed, weight, destination)
    if destination.converter is not None and target.names.weight_of(destination.name):
        raise UnsupportedModelError(
            f"{packed.entry.shard}: the bytes of {piece.key} lie otherwise than this family's experts are multiplied: "
            "give the 16-bit checkpoint"
        )
    name, _, leaf = destination.name.rpartition(".")
    try:
        module = target.model.get_submodule(name)
    except AttributeError:
        return False
    if destination.converter is not None or leaf != "weight" or not _stays_packed(module):
        # Such as a router: with the values of its 4 bits.
        return target.place(packed.dequantized, destination)
    if packed.shape != (module.out_features, module.in_features):
        raise CheckpointError(
            f"{packed.entry.shard}: tensor {piece.key} has shape {packed.shape}, the model expects "
            f"{(module.out_features, module.in_features)}"
        )
    target.claim(packed.entry, destination.name, None, None)
    from expertune.checkpoint.nf4_linears import linear_of_bytes

    linear = linear_of_bytes(module, packed.entry.read(), packed.read_state(), target.dtype, target.device)
    target.model.set_submodule(name, linear)
    return True


def _stays_packed(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module's weight stays in 4 bits where a checkpoint has packed it."""
    return isinstance(module, nn.Linear) and module.in_features % BLOCK_SIZE == 0
