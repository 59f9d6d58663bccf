"""bitsandbytes' 4-bit checkpoints: weights taken byte by byte, in whatever pieces a checkpoint holds them.

A 4-bit weight is `X` (uint8 [N*K/2, 1]) and its state beside it: `X.absmax`, `X.quant_map`, `X.nested_absmax`,
`X.nested_quant_map`, and `X.quant_state.bitsandbytes__nf4`, which is JSON. Which linears are 4-bit is as in the file.

Experts come as one projection of one expert, one expert's gate and up in one linear, or a whole stack [E, N, K]. In
each of them an output feature's blocks of 64 weights are its own and its codes are whole bytes, so that output features
go where they belong without being dequantized, also where a family alternates those of gate and up. Float32 scales go
with their blocks. Scales in 8 bits share one float32 among 256 of them, whichever matrix these belong to: they stay as
they are where every matrix begins with such a group, and are held as the float32 they stand for where one does not.

A family that multiplies from the other side has stacks whose blocks run across the output features of ours: their bytes
cannot be taken, only the weights that they stand for.

Shape suffixes: E experts, N output features and K input features of one expert's piece, B = K / 64 blocks of an output
feature.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from expertune.checkpoint.formats.interface import Kept, Piece, Target
from expertune.checkpoint.linears import NF4_STATE
from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import DequantizedEntry, TensorEntry
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Stack
from expertune.kernels.nf4.reference import dynamic_codebook, nf4_codebook

if TYPE_CHECKING:  # to recognize a checkpoint and count its bytes takes none of it
    from bitsandbytes.functional import QuantState

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
        if (weight := _expert_weight(names, destination)) is not None and not weight.lies_across
    ]
    packed = {destination.name for _, destination in destinations if destination.converter is None}
    linears = {
        name: module for name, module in model.named_modules() if f"{name}.weight" in packed and _stays_packed(module)
    }
    return Kept("nf4", all(nested), linears) if nested else Kept(linears=linears)


def place(target: Target, piece: Piece, entries: Mapping[str, TensorEntry]) -> bool:
    """See `Format`; experts and linears keep their bytes, what is neither in the live model is dequantized."""
    packed, destination = _read_packed(piece.key, entries), target.names.locate(piece.key)
    weight = _expert_weight(target.names, destination)
    if weight is not None:
        return _place_experts(target, packed, weight, destination)
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


def _place_experts(target: Target, packed: "_Packed", weight: "_ExpertWeight", destination: Destination) -> bool:
    if not weight.lies_across:
        _copy_weight(target, packed, weight)
        return True
    if not target.requantizes:
        raise UnsupportedModelError(
            f"{packed.entry.shard}: {packed.entry.key} packs all experts from the other side: its blocks of "
            f"{BLOCK_SIZE} run across the output features that are multiplied, so its bytes cannot be taken. Give the "
            "16-bit checkpoint, or set quantization.scheme to nf4, and its dequantized weights are quantized again"
        )
    return target.place(_dequantized_stack(packed, weight), destination)


@dataclass(frozen=True)
class _Packed:
    """A weight as bitsandbytes packed it; `state` is the JSON of its quantization state."""

    entry: TensorEntry
    parts: Mapping[str, TensorEntry]
    state: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that was packed."""
        return tuple(self.state["shape"])

    @property
    def nested(self) -> bool:
        """Whether its scales are themselves held in 8 bits."""
        return "nested_absmax" in self.parts

    @property
    def dequantized(self) -> DequantizedEntry:
        """The weight that was packed, of its dtype then, by bitsandbytes' own code."""
        from bitsandbytes.functional import dequantize_4bit

        header = replace(self.entry, shape=self.shape, dtype=getattr(torch, self.state["dtype"]))
        return DequantizedEntry(
            **vars(header), dequantize=lambda: dequantize_4bit(self.entry.read(), self._quant_state())
        )

    def scales(self) -> Tensor:
        """Scale of each block, float32 [N*K/64], by bitsandbytes' own code."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self._quant_state()
        if not self.nested:
            return state.absmax.view(-1)
        return (dequantize_blockwise(state.absmax, state.state2) + state.offset).view(-1)

    def read_state(self) -> dict[str, Tensor]:
        """Its quantization state by part."""
        return {part: entry.read() for part, entry in self.parts.items() if part != "weight"}

    def _quant_state(self) -> "QuantState":
        from bitsandbytes.functional import QuantState

        return QuantState.from_dict(self.read_state(), torch.device("cpu"))


@dataclass(frozen=True)
class _ExpertWeight:
    """What of the experts a packed weight is.

    Attributes:
        module: the experts module.
        spec: its shapes.
        projections: which projections its output features belong to.
        expert: whose; None for all of them, in a stack.
    """

    module: str
    spec: ExpertsSpec
    projections: tuple[str, ...]
    expert: int | None

    @property
    def weight(self) -> str:
        """Which of `spec.weight_names` it is or belongs to."""
        return self.spec.weight_names[self.projections[0] == "down"]

    @property
    def lies_across(self) -> bool:
        """Whether its blocks run across output features."""
        return self.expert is None and self.spec.is_transposed

    @property
    def keeps_nested_scales(self) -> bool:
        """Whether 8-bit scales can be cut into those of its matrices."""
        if self.expert is not None and len(self.projections) == 1:
            return True
        out_features, in_features = self.spec.shape(self.projections[0])
        together = layout.are_rows_together(self.spec, self.weight)
        return together and out_features * in_features % (BLOCK_SIZE * NESTED_BLOCK_SIZE) == 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, N, K], or [1, N, K] of one expert."""
        out_features, in_features = self.spec.shape(self.projections[0])
        num_experts = self.spec.num_experts if self.expert is None else 1
        return num_experts, out_features * len(self.projections), in_features

    def by_projection(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """One expert's values [N, ...] by output feature, for each projection."""
        return (values_N,) if len(self.projections) == 1 else layout.split_rows(self.spec, self.weight, values_N)


def _expert_weight(names: NameMap, destination: Destination) -> _ExpertWeight | None:
    """What of the experts a packed weight is by its name; None for one beside them, or one that is converted."""
    if names.is_listed(destination):
        module, weight = names.weight_of(destination.name) or ("", "")
        spec = names.specs[module]
        return _ExpertWeight(module, spec, layout.fused_projections(spec, weight), destination.expert)
    if destination.converter is not None or destination.projection is None:
        return None
    spec, projection = names.specs[destination.name], destination.projection
    if destination.expert is not None:
        return _ExpertWeight(destination.name, spec, (projection,), destination.expert)
    weight = spec.weight_names[projection == "down"]
    return _ExpertWeight(destination.name, spec, layout.fused_projections(spec, weight), None)


def _read_packed(key: str, entries: Mapping[str, TensorEntry]) -> _Packed:
    """The state of a packed weight, checked against what our kernels multiply.

    Args:
        key: the weight's name on disk.
        entries: its tensors by part.

    Raises:
        CheckpointError: a part is missing or damaged; names it.
        UnsupportedModelError: packed in other blocks, or with another codebook.
    """
    if any(part.startswith("quant_state.") and part != NF4_STATE for part in entries):
        shard = next(iter(entries.values())).shard
        raise UnsupportedModelError(
            f"{shard}: {key}: 4-bit values of another kind than nf4: give the 16-bit checkpoint"
        )
    for part in ("weight", "absmax", "quant_map", NF4_STATE):
        if part not in entries:
            shard = next(iter(entries.values())).shard
            raise CheckpointError(f"{shard}: {key}: its {part} is missing; download the checkpoint again")
    entry = entries["weight"]
    try:
        state = json.loads(bytes(entries[NF4_STATE].read().numpy()))
        shape, block_size, nested = tuple(state["shape"]), state["blocksize"], state.get("nested_blocksize")
        getattr(torch, state["dtype"])
        offset = float(state["nested_offset"]) if "nested_absmax" in entries else 0.0
        numel = torch.Size(shape).numel()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{entry.shard}: the quantization state of {key} is damaged ({error!r}); download it again"
        ) from None
    packed = _Packed(entry, entries, state)
    if block_size != BLOCK_SIZE or (packed.nested and nested != NESTED_BLOCK_SIZE):
        raise UnsupportedModelError(
            f"{entry.shard}: {key} has blocks of {block_size}, and of {nested} for their scales; only "
            f"{BLOCK_SIZE} and {NESTED_BLOCK_SIZE} can be read: give the 16-bit checkpoint"
        )
    if len(shape) not in (2, 3) or entry.dtype != torch.uint8 or entry.nbytes * 2 != numel:
        raise CheckpointError(f"{entry.shard}: {key} of shape {shape} cannot lie in {entry.nbytes} bytes")
    scales = torch.uint8 if packed.nested else torch.float32
    blocks = -(-numel // BLOCK_SIZE)
    if (
        entries["absmax"].numel != blocks
        or entries["absmax"].dtype != scales
        or (packed.nested and entries["nested_absmax"].numel != -(-blocks // NESTED_BLOCK_SIZE))
        or not torch.isfinite(torch.tensor(offset))
    ):
        raise CheckpointError(f"{entry.shard}: the scales of {key} do not fit its shape {shape}")
    maps = {"quant_map": nf4_codebook} | ({"nested_quant_map": dynamic_codebook} if packed.nested else {})
    for part, codebook in maps.items():
        if part not in entries or not torch.equal(entries[part].read().float(), codebook(torch.device("cpu"))):
            raise UnsupportedModelError(f"{entry.shard}: the {part} of {key} is not bitsandbytes' own")
    return packed


def _copy_weight(target: Target, packed: _Packed, weight: _ExpertWeight) -> None:
    """The bytes of one expert's weight, or of a stack, as they are, into their module.

    Raises:
        CheckpointError: it is of another shape, of an expert that the model does not have, or stored twice.
    """
    experts = target.model.get_submodule(weight.module)
    assert isinstance(experts, Nf4Experts)
    codes_ENK = _codes(packed, weight)
    stack, _ = experts.locate(experts.read_here.start, weight.projections[0])
    split_scales = _scales(packed, weight, stack.double_quantization)
    for position, expert in enumerate(range(weight.shape[0]) if weight.expert is None else [weight.expert]):
        if expert not in experts.read_here:
            continue
        codes = weight.by_projection(codes_ENK.read_part(position))
        for part, projection in enumerate(weight.projections):
            target.claim(packed.entry, weight.module, projection, expert)
            stack, index = experts.locate(expert, projection)
            stack.put(index, packed=codes[part])
            split_scales.copy(stack, index, position, part)


def _dequantized_stack(packed: _Packed, weight: _ExpertWeight) -> DequantizedEntry:
    """A stack whose blocks run across output features, as float32 in the family's layout, an expert at a time.

    Raises:
        CheckpointError: it is of another shape.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    stacked = weight.spec.stack_shape(weight.weight)
    _require_shape(packed, {stacked})
    codes = replace(packed.entry, shape=(stacked[0], packed.entry.nbytes // stacked[0], 1))
    scales = functools.cache(lambda: packed.scales().view(stacked[0], -1))

    def dequantize(expert: int) -> Tensor:
        state = QuantState(
            scales()[expert],
            torch.Size(stacked[1:]),
            nf4_codebook(torch.device("cpu")),
            BLOCK_SIZE,
            "nf4",
            torch.float32,
        )
        return dequantize_4bit(codes.read_part(expert), state)

    return DequantizedEntry(**vars(replace(packed.entry, shape=stacked, dtype=torch.float32)), dequantize=dequantize)


def _codes(packed: _Packed, weight: _ExpertWeight) -> TensorEntry:
    """The codes as uint8 [E, N, K/2], of the shape that the model expects."""
    num_experts, out_features, in_features = weight.shape
    entry = packed.entry
    if weight.expert is None:
        _require_shape(packed, {weight.shape, (num_experts * out_features, in_features)})
    else:
        if weight.expert >= weight.spec.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} belongs to expert {weight.expert}, but the model has "
                f"{weight.spec.num_experts}"
            )
        _require_shape(packed, {(out_features, in_features)})
    return replace(entry, shape=(num_experts, out_features, in_features // 2))


def _require_shape(packed: _Packed, expected: set[tuple[int, ...]]) -> None:
    if packed.shape not in expected:
        raise CheckpointError(
            f"{packed.entry.shard}: tensor {packed.entry.key} has shape {packed.shape}, expected shape "
            f"{' or '.join(str(shape) for shape in sorted(expected, key=len, reverse=True))}"
        )


@dataclass(frozen=True)
class _Scales:
    """Scales of a packed weight, [E, N, B] or by groups, to be copied into the stacks of its projections."""

    weight: _ExpertWeight
    absmax_ENB: Tensor
    nested: Tensor | None
    offset: float

    def copy(self, stack: Nf4Stack, index: int, position: int, part: int) -> None:
        """Those of one matrix: expert `position` of the weight, `part` of its projections."""
        stack.put(index, absmax=self.weight.by_projection(self.absmax_ENB[position])[part].reshape(-1))
        if self.nested is not None:
            groups = stack.whole.nested_absmax.shape[1]
            first = (position * len(self.weight.projections) + part) * groups
            offset = torch.tensor([self.offset])
            stack.put(index, nested_absmax=self.nested[first : first + groups], offset=offset)


def _scales(packed: _Packed, weight: _ExpertWeight, double_quantization: bool) -> _Scales:
    shape = (*weight.shape[:2], -1)
    if not double_quantization:
        return _Scales(weight, packed.scales().view(shape), None, 0.0)
    absmax, nested = (packed.parts[part].read() for part in ("absmax", "nested_absmax"))
    return _Scales(weight, absmax.view(shape), nested.view(-1), float(packed.state["nested_offset"]))
