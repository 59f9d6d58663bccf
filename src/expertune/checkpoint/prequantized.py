"""Checkpoints that are quantized already: bitsandbytes' 4-bit tensors, and MXFP4 blocks.

*bitsandbytes* writes a 4-bit weight as `X` (uint8 [N*K/2, 1]) and its state beside it: `X.absmax`, `X.quant_map`,
`X.nested_absmax`, `X.nested_quant_map`, and `X.quant_state.bitsandbytes__nf4`, which is JSON. Which linears are 4-bit
is as in the file. Its experts are `expertune.checkpoint.packed`'s.

*MXFP4* stacks are `expertune.checkpoint.mxfp4`'s.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from expertune.checkpoint.mxfp4 import copy_blocks, decoded_entry
from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.packed import (
    NF4_STATE,
    ExpertWeight,
    Packed,
    copy_weight,
    decoded_weight,
    expert_weight,
    read_packed,
)
from expertune.checkpoint.reader import TensorEntry
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import BLOCK_SIZE, Scheme
from expertune.layers.nf4_linear import Nf4Linear

Method = Literal["bitsandbytes", "mxfp4"]

_STATE_PART = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)")
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Piece:
    """Tensors of a checkpoint that make one weight.

    Attributes:
        key: the weight's name on disk.
        parts: part of the weight -> name on disk; of an ordinary tensor only `weight`.
        method: what packed it; None for an ordinary tensor.
    """

    key: str
    parts: Mapping[str, str]
    method: Method | None = None


class Loader(Protocol):
    """What of the loader is needed here."""

    model: nn.Module
    names: NameMap
    quantization: QuantizationConfig
    dtype: torch.dtype
    device: torch.device

    def place(self, entry: TensorEntry, destination: Destination) -> bool:
        """Place an ordinary tensor."""

    def claim(self, entry: TensorEntry, name: str, projection: str | None, expert: int | None) -> None:
        """Refuse a weight that is stored twice."""


def method_of(values: Mapping[str, Any] | None, keys: Iterable[str], where: str) -> Method | None:
    """How a checkpoint is quantized, by the `quantization_config` of its config; None where it is not.

    Where the config says nothing, names of tensors may: of weights that were packed in a live model and saved with it.

    Raises:
        UnsupportedModelError: in a way that cannot be read; names it.
    """
    if values is None:
        return "bitsandbytes" if any(key.endswith(f".{NF4_STATE}") for key in keys) else None
    method = values.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in values else "of an unknown method")
    if method == "mxfp4":
        return "mxfp4"
    if method != "bitsandbytes":
        what = method
    elif not values.get("load_in_4bit", values.get("_load_in_4bit", False)):
        what = "bitsandbytes, 8 bits"
    elif values.get("bnb_4bit_quant_type", "nf4") != "nf4":
        what = f"bitsandbytes, {values['bnb_4bit_quant_type']}"
    elif values.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        what = f"bitsandbytes, packed into {values['bnb_4bit_quant_storage']}"
    else:
        return "bitsandbytes"
    raise UnsupportedModelError(
        f"{where}: the checkpoint is already quantized ({what}), which cannot be read: give the 16-bit one, or one in "
        "bitsandbytes' nf4 or in mxfp4"
    )


def find_pieces(keys: Iterable[str], method: Method | None) -> list[Piece]:
    """Group a checkpoint's tensors into weights, in the order of their names' first appearance.

    Raises:
        CheckpointError: a block tensor without its scales.
    """
    keys = list(keys)
    packed = _bitsandbytes_parts(keys) if method == "bitsandbytes" else _mxfp4_parts(keys) if method == "mxfp4" else {}
    owner = {key: name for name, parts in packed.items() for key in parts.values()}
    pieces: dict[str, Piece] = {}
    for key in keys:
        name = owner.get(key, key)
        if name not in pieces:
            pieces[name] = Piece(name, packed[name], method) if name in packed else Piece(key, {"weight": key})
    return list(pieces.values())


def _bitsandbytes_parts(keys: list[str]) -> dict[str, dict[str, str]]:
    states = {f".{NF4_STATE}", ".absmax"}
    parts: dict[str, dict[str, str]] = {
        key.removesuffix(end): {} for end in states for key in keys if key.endswith(end)
    }
    for key in keys:
        state = _STATE_PART.fullmatch(key)
        if key in parts:
            parts[key]["weight"] = key
        elif state and state[1] in parts:
            parts[state[1]][state[2]] = key
    return parts


def _mxfp4_parts(keys: list[str]) -> dict[str, dict[str, str]]:
    known = set(keys)
    parts = {}
    for key in keys:
        name = key.removesuffix(_BLOCKS)
        if name != key:
            if name + _SCALES not in known:
                raise CheckpointError(f"tensor {key} has no {name + _SCALES} beside it; download the checkpoint again")
            parts[name] = {"blocks": key, "scales": name + _SCALES}
    return parts


def double_quantization_of(pieces: Iterable[Piece], names: NameMap) -> bool | None:
    """Whether the experts of a bitsandbytes checkpoint keep 8-bit scales; None where it has no 4-bit experts.

    They do where all of them have such scales, which can all stay as they are. Otherwise all are held with float32
    scales, which are those of the file or what its 8-bit ones stand for, exactly.
    """
    held = [
        "nested_absmax" in piece.parts and weight.keeps_nested_scales
        for piece in pieces
        if piece.method == "bitsandbytes"
        and (weight := expert_weight(names, names.locate(piece.key))) is not None
        and not weight.lies_across
    ]
    return all(held) if held else None


def scheme_of(pieces: Iterable[Piece], names: NameMap, asked: QuantizationConfig) -> Scheme:
    """What the experts' codes will stand for: MXFP4 where the checkpoint holds it and the run file does not object."""
    kept = asked.scheme == "auto" and any(
        piece.method == "mxfp4" and names.locate(piece.key).projection is not None for piece in pieces
    )
    return "mxfp4" if kept else "nf4"


def place_piece(loader: Loader, piece: Piece, entries: Mapping[str, TensorEntry]) -> bool:
    """Place one weight, however it is packed; False where the model has no place for it.

    Args:
        loader: the model that is being filled.
        piece: the weight.
        entries: its tensors by part.

    Raises:
        CheckpointError, UnsupportedModelError: it is damaged, or packed otherwise than can be read; names the tensor.
    """
    destination = loader.names.locate(piece.key)
    if piece.method is None:
        return loader.place(entries["weight"], destination)
    if piece.method == "mxfp4":
        experts = loader.model.get_submodule(destination.name) if destination.projection else None
        if isinstance(experts, Nf4Experts) and experts.down.scheme == "mxfp4":
            copy_blocks(loader, experts, entries, destination)
            return True
        return loader.place(decoded_entry(piece, entries, loader, destination), destination)
    packed = read_packed(piece.key, entries)
    weight = expert_weight(loader.names, destination)
    if weight is not None:
        return _place_expert(loader, packed, weight, destination)
    if destination.converter is not None and loader.names.weight_of(destination.name):
        raise UnsupportedModelError(
            f"{packed.entry.shard}: the bytes of {piece.key} lie otherwise than this family's experts are multiplied: "
            "give the 16-bit checkpoint"
        )
    name, _, leaf = destination.name.rpartition(".")
    try:
        module = loader.model.get_submodule(name)
    except AttributeError:
        return False
    if (
        destination.converter is None
        and isinstance(module, nn.Linear)
        and leaf == "weight"
        and module.in_features % BLOCK_SIZE == 0
    ):
        if packed.shape != (module.out_features, module.in_features):
            raise CheckpointError(
                f"{packed.entry.shard}: tensor {piece.key} has shape {packed.shape}, the model expects "
                f"{(module.out_features, module.in_features)}"
            )
        loader.claim(packed.entry, destination.name, None, None)
        stats = {part: entry.read() for part, entry in entries.items() if part != "weight"}
        linear = linear_of_bytes(module, packed.entry.read(), stats, loader.dtype, loader.device)
        parent, _, child = name.rpartition(".")
        setattr(loader.model.get_submodule(parent), child, linear)
        return True
    # What is no linear in the live model, such as a router, is held in 16 bits: with the values of its 4.
    return loader.place(packed.decoded, destination)


def _place_expert(loader: Loader, packed: Packed, weight: ExpertWeight, destination: Destination) -> bool:
    if not weight.lies_across:
        copy_weight(loader, packed, weight)
        return True
    if loader.quantization.scheme == "auto":
        raise UnsupportedModelError(
            f"{packed.entry.shard}: {packed.entry.key} packs all experts from the other side: its blocks of "
            f"{BLOCK_SIZE} run across the rows that are multiplied, so its bytes cannot be taken. Give the 16-bit "
            "checkpoint, or set quantization.scheme to nf4, and what it decodes to is quantized anew"
        )
    return loader.place(decoded_weight(packed, weight), destination)


def linear_of_bytes(
    linear: nn.Linear, packed: Tensor, stats: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> Nf4Linear:
    """A `Linear4bit` of bitsandbytes around packed bytes, in the place of `linear`, whose bias it keeps.

    Args:
        linear: the model's own layer; its weight is not read.
        packed: uint8 [N*K/2, 1].
        stats: bitsandbytes' state by part, e.g. `absmax`, `quant_state.bitsandbytes__nf4`.
        dtype: dtype of the products.
        device: where the bytes live.
    """
    quantized = empty_linear(linear, dtype)
    quantized.weight = bnb.nn.Params4bit.from_prequantized(packed, stats, device=device, module=quantized)
    quantized.compress_statistics = quantized.weight.compress_statistics
    # Whatever the file's weights were before, products run in this dtype.
    quantized.weight.quant_state.dtype = dtype
    return quantized


def empty_linear(linear: nn.Linear, dtype: torch.dtype) -> Nf4Linear:
    """A 4-bit linear without bytes, on the meta device, in the place of `linear`, whose bias it keeps."""
    quantized = Nf4Linear(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    packed = torch.empty(linear.in_features * linear.out_features // 2, 1, dtype=torch.uint8, device="meta")
    quantized.weight = bnb.nn.Params4bit(packed, requires_grad=False, bnb_quantized=True, module=quantized)
    quantized.bias = linear.bias
    # See `expertune.checkpoint.loader.quantized_linear`.
    quantized.support_avx512bf16_for_cpu = False
    return quantized
