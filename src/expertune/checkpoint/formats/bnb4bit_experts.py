"""Experts that bitsandbytes packed: which of them a weight is, and its bytes into their module.

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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertune.checkpoint.formats.bnb4bit_packed import Packed, require_shape
from expertune.checkpoint.formats.interface import Target
from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import DequantizedEntry, TensorEntry
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Stack
from expertune.kernels.nf4.reference import nf4_codebook


@dataclass(frozen=True)
class ExpertWeight:
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


def expert_weight(names: NameMap, destination: Destination) -> ExpertWeight | None:
    """What of the experts a packed weight is by its name; None for one beside them, or one that is converted."""
    if names.is_listed(destination):
        module, weight = names.weight_of(destination.name) or ("", "")
        spec = names.specs[module]
        return ExpertWeight(module, spec, layout.fused_projections(spec, weight), destination.expert)
    if destination.converter is not None or destination.projection is None:
        return None
    spec, projection = names.specs[destination.name], destination.projection
    if destination.expert is not None:
        return ExpertWeight(destination.name, spec, (projection,), destination.expert)
    weight = spec.weight_names[projection == "down"]
    return ExpertWeight(destination.name, spec, layout.fused_projections(spec, weight), None)


def place_experts(target: Target, packed: Packed, weight: ExpertWeight, destination: Destination) -> bool:
    """Place a packed weight of experts: its bytes as they are, or quantized again where its blocks run across.

    Raises:
        CheckpointError: it is of another shape, of an expert that the model does not have, or stored twice.
        UnsupportedModelError: its bytes cannot be taken, and the target does not quantize again.
    """
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


def _copy_weight(target: Target, packed: Packed, weight: ExpertWeight) -> None:
    """The bytes of one expert's weight, or of a stack, as they are, into their module.

    Raises:
        CheckpointError: it is of another shape, of an expert that the model does not have, or stored twice.
    """
    from expertune.experts.module import Nf4Experts  # with all kernels, of which a plan needs none

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


def _dequantized_stack(packed: Packed, weight: ExpertWeight) -> DequantizedEntry:
    """A stack whose blocks run across output features, as float32 in the family's layout, an expert at a time.

    Raises:
        CheckpointError: it is of another shape.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    stacked = weight.spec.stack_shape(weight.weight)
    require_shape(packed, {stacked})
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


def _codes(packed: Packed, weight: ExpertWeight) -> TensorEntry:
    """The codes as uint8 [E, N, K/2], of the shape that the model expects."""
    num_experts, out_features, in_features = weight.shape
    entry = packed.entry
    if weight.expert is None:
        require_shape(packed, {weight.shape, (num_experts * out_features, in_features)})
    else:
        if weight.expert >= weight.spec.num_experts:
            raise CheckpointError(
                f"{entry.shard}: tensor {entry.key} belongs to expert {weight.expert}, but the model has "
                f"{weight.spec.num_experts}"
            )
        require_shape(packed, {(out_features, in_features)})
    return replace(entry, shape=(num_experts, out_features, in_features // 2))


@dataclass(frozen=True)
class _Scales:
    """Scales of a packed weight, [E, N, B] or by groups, to be copied into the stacks of its projections."""

    weight: ExpertWeight
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


def _scales(packed: Packed, weight: ExpertWeight, double_quantization: bool) -> _Scales:
    shape = (*weight.shape[:2], -1)
    if not double_quantization:
        return _Scales(weight, packed.scales().view(shape), None, 0.0)
    absmax, nested = (packed.parts[part].read() for part in ("absmax", "nested_absmax"))
    return _Scales(weight, absmax.view(shape), nested.view(-1), float(packed.state["nested_offset"]))
