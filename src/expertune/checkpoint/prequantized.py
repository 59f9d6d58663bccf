"""Checkpoints that are quantized already: bitsandbytes' 4-bit tensors, and MXFP4 blocks.

*bitsandbytes* writes a 4-bit matrix as `X.weight` (uint8 [N*K/2, 1]) and its state beside it: `X.weight.absmax`,
`X.weight.quant_map`, `X.weight.nested_absmax`, `X.weight.nested_quant_map`, and
`X.weight.quant_state.bitsandbytes__nf4`, which is JSON. These bytes are ours: they are copied, never decoded. Which
linears are 4-bit is as in the file.

*MXFP4* stacks are `expertune.checkpoint.mxfp4`'s.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from expertune.checkpoint.mxfp4 import copy_blocks, decoded_entry
from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import DecodedEntry, TensorEntry
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Scheme
from expertune.kernels.nf4.reference import dynamic_codebook, nf4_codebook
from expertune.nf4_linear import Nf4Linear

Method = Literal["bitsandbytes", "mxfp4"]

_NF4_STATE = ".quant_state.bitsandbytes__nf4"
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
    dtype: torch.dtype
    device: torch.device

    def place(self, entry: TensorEntry, destination: Destination) -> bool:
        """Place an ordinary tensor."""

    def claim(self, entry: TensorEntry, name: str, projection: str | None, expert: int | None) -> None:
        """Refuse a weight that is stored twice."""


def method_of(values: Mapping[str, Any] | None, where: str) -> Method | None:
    """How a checkpoint is quantized, by the `quantization_config` of its config; None where it is not.

    Raises:
        UnsupportedModelError: in a way that cannot be read; names it.
    """
    if values is None:
        return None
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
    parts: dict[str, dict[str, str]] = {
        key.removesuffix(_NF4_STATE): {} for key in keys if key.endswith((_NF4_STATE, ".weight.absmax"))
    }
    parts = {name.removesuffix(".absmax"): {} for name in parts}
    for key in keys:
        name, found, part = key.partition(".weight.")
        if f"{name}.weight" in parts:
            parts[f"{name}.weight"][part if found else "weight"] = key
        elif key in parts:
            parts[key]["weight"] = key
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
    """Whether a bitsandbytes checkpoint's experts are double-quantized; None where it has no 4-bit experts.

    Raises:
        UnsupportedModelError: some are and some are not.
    """
    found = {
        "nested_absmax" in piece.parts: piece.key
        for piece in pieces
        if piece.method == "bitsandbytes" and names.locate(piece.key).projection is not None
    }
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{found[True]} is double-quantized and {found[False]} is not: quantize the 16-bit checkpoint instead"
        )
    return next(iter(found), None)


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
    packed = _read_packed(piece, entries)
    if destination.converter is not None and loader.names.weight_of(destination.name):
        raise UnsupportedModelError(
            f"{packed.entry.shard}: the bytes of {piece.key} lie otherwise than this family's experts are multiplied: "
            "give the 16-bit checkpoint"
        )
    if destination.projection is not None:
        _copy_expert(loader, packed, destination)
        return True
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
    decoded = DecodedEntry(**vars(replace(packed.entry, shape=packed.shape, dtype=packed.dtype)), decode=packed.decode)
    return loader.place(decoded, destination)


@dataclass(frozen=True)
class _Packed:
    """A matrix as bitsandbytes packed it; `state` is the JSON of its quantization state."""

    entry: TensorEntry
    parts: Mapping[str, TensorEntry]
    state: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.state["dtype"])

    @property
    def nested(self) -> bool:
        return "nested_absmax" in self.parts

    def decode(self) -> Tensor:
        stats = {part: entry.read() for part, entry in self.parts.items() if part != "weight"}
        state = bnb.functional.QuantState.from_dict(stats, torch.device("cpu"))
        return bnb.functional.dequantize_4bit(self.entry.read(), state)


def _read_packed(piece: Piece, entries: Mapping[str, TensorEntry]) -> _Packed:
    """The state of a packed matrix, checked against what our kernels multiply."""
    key = _NF4_STATE.removeprefix(".")
    if any(part.startswith("quant_state.") and part != key for part in entries):
        raise UnsupportedModelError(f"{piece.key}: 4-bit values of another kind than nf4: give the 16-bit checkpoint")
    for part in ("weight", "absmax", "quant_map", key):
        if part not in entries:
            raise CheckpointError(f"{piece.key}: its {part} is missing; download the checkpoint again")
    entry = entries["weight"]
    try:
        state = json.loads(bytes(entries[key].read().numpy()))
        shape, block_size, nested = tuple(state["shape"]), state["blocksize"], state.get("nested_blocksize")
        getattr(torch, state["dtype"])
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{entry.shard}: the quantization state of {piece.key} is damaged ({error!r}); download it again"
        ) from None
    packed = _Packed(entry, entries, state)
    blocks = -(-torch.Size(shape).numel() // BLOCK_SIZE)
    if block_size != BLOCK_SIZE or (packed.nested and nested != NESTED_BLOCK_SIZE):
        raise UnsupportedModelError(
            f"{entry.shard}: {piece.key} has blocks of {block_size}, and of {nested} for their scales; only "
            f"{BLOCK_SIZE} and {NESTED_BLOCK_SIZE} can be read: give the 16-bit checkpoint"
        )
    if len(shape) != 2 or entry.dtype != torch.uint8 or entry.nbytes * 2 != shape[0] * shape[1]:
        raise CheckpointError(f"{entry.shard}: {piece.key} of shape {shape} cannot lie in {entry.nbytes} bytes")
    scales = torch.uint8 if packed.nested else torch.float32
    if (
        entries["absmax"].numel != blocks
        or entries["absmax"].dtype != scales
        or not torch.isfinite(torch.tensor(offset))
    ):
        raise CheckpointError(f"{entry.shard}: the scales of {piece.key} do not fit its shape {shape}")
    maps = {"quant_map": nf4_codebook} | ({"nested_quant_map": dynamic_codebook} if packed.nested else {})
    for part, codebook in maps.items():
        if part not in entries or not torch.equal(entries[part].read().float(), codebook(torch.device("cpu"))):
            raise UnsupportedModelError(f"{entry.shard}: the {part} of {piece.key} is not bitsandbytes' own")
    return packed


def _copy_expert(loader: Loader, packed: _Packed, destination: Destination) -> None:
    """The bytes of one expert's matrix, as they are, into its module."""
    experts = loader.model.get_submodule(destination.name)
    entry, projection = packed.entry, destination.projection
    assert isinstance(experts, Nf4Experts)
    assert projection is not None
    if destination.expert is None:
        raise UnsupportedModelError(f"{entry.shard}: {entry.key} packs all experts in one: give the 16-bit checkpoint")
    if destination.expert >= experts.num_experts:
        raise CheckpointError(
            f"{entry.shard}: tensor {entry.key} belongs to expert {destination.expert}, but the model has "
            f"{experts.num_experts}"
        )
    stack, index = experts.locate(destination.expert, projection)
    if packed.shape != (stack.rows, stack.columns):
        raise CheckpointError(
            f"{entry.shard}: tensor {entry.key} has shape {packed.shape}, expected shape {(stack.rows, stack.columns)}"
        )
    loader.claim(entry, destination.name, projection, destination.expert)
    with torch.no_grad():
        stack.packed[index].copy_(entry.read().view(stack.packed[index].shape))
        stack.absmax[index].copy_(packed.parts["absmax"].read().view(-1))
        if packed.nested:
            stack.nested_absmax[index].copy_(packed.parts["nested_absmax"].read().view(-1))
            stack.offset[index] = float(packed.state["nested_offset"])


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
