"""Count a model's parameters and the bytes it takes once its experts and linears are 4-bit, from shapes alone.

Shape suffixes: N out_features, K in_features, E experts, D hidden size, r rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated

from pydantic import Field

from expertune.checkpoint.targets import Candidates, Group, ResolvedTargets
from expertune.distributed.shares import most_owned
from expertune.experts.spec import ExpertsSpec
from expertune.kernels.amounts import Scheme, stack_bytes
from expertune.planning.distribution import Distribution
from expertune.train.merging import Traits


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        total: weights of the base model, each counted once however it is held.
        trainable: weights of the adapter.
        packed: "all params" as a loop over a 4-bit model's tensors counts them: two packed weights are one element.
            Every linear matrix counts half, router gates and experts included; embeddings, output head, norms and
            biases count as they are; the adapter is added.
    """

    total: int
    trainable: int
    packed: int

    @property
    def line(self) -> str:
        """The line that QLoRA tutorials print, in the packed convention."""
        share = 100 * self.trainable / self.packed
        return f"trainable params: {self.trainable} || all params: {self.packed} || trainable%: {share}"


@dataclass(frozen=True)
class FrozenWeights:
    """Bytes of the base model as Expertune holds it; exact but for codebooks, below 10 kB for a whole model.

    Attributes:
        experts_bytes: 4-bit experts; what they hold beside (biases, norms) is not among them.
        linears_bytes: NF4 linears of the decoder layers, with their 16-bit biases.
        unquantized_bytes: embeddings, output head, routers, norms and whatever else stays in the compute dtype, or in
            float32 where the family keeps it so.
        buffers_bytes: buffers in their own dtype, such as rotary frequencies.
    """

    experts_bytes: int
    linears_bytes: int
    unquantized_bytes: int
    buffers_bytes: int

    @property
    def quantized_bytes(self) -> int:
        """What is held in 4 bits."""
        return self.experts_bytes + self.linears_bytes

    @property
    def frozen_bytes(self) -> int:
        """Sum of all parts."""
        return self.quantized_bytes + self.unquantized_bytes + self.buffers_bytes


@dataclass(frozen=True)
class Layer:
    """Shapes of one decoder layer.

    Attributes:
        experts: shapes of its experts by dotted name; none where the layer is dense.
        linears: (N, K) by dotted name of its 4-bit linears, and of those that stay in 16 bits instead.
        norms: width of each of its norms; one that works on heads is as wide as all of them.
    """

    experts: Mapping[str, ExpertsSpec]
    linears: Mapping[str, tuple[int, int]]
    norms: tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """Numbers of a token in queries, keys, values and attention's output, all heads together; and query heads.

    `eager` says that the family has no other attention than that of all scores at once.
    """

    query: int
    key: int
    value: int
    output: int
    heads: int
    eager: bool = False

    @property
    def widths(self) -> int:
        """Of all four together."""
        return self.query + self.key + self.value + self.output


def _nobody() -> int:
    raise RuntimeError("nobody has said who counts what a token leaves in the cache")


@dataclass(frozen=True)
class Inventory:
    """Shapes of a model; everything that the plan computes starts here. Plain values, of which none is a tensor.

    Attributes:
        architecture: class of the transformers model.
        specs: shapes of its experts by dotted name, in the order of the forward.
        candidates: what an adapter can attach to.
        linears: (N, K) of every linear by dotted name.
        routers: owner of each router's [E, D] weight -> the experts that it routes to.
        total: see `Parameters`.
        packed: see `Parameters`, without an adapter.
        scheme: what the codes of its experts stand for.
        double_quantization: whether scales are held in 8 bits.
        weights: its bytes.
        layers: shapes by decoder layer.
        hidden_size: D.
        vocab_size: output features of the output head.
        top_k: experts per token.
        attention: widths of the attention.
        takes_logits_to_keep: whether the forward can be asked for the last position's logits alone, which generation
            then does.
        traits: what decides whether micro-batches may run as one.
        distribution: how the ranks of a run hold the experts; bytes are those of the rank that has the most.
        count_cached: counts `cached_numbers`, for which the model is run; a plan without answers does not ask.
    """

    architecture: str
    specs: Mapping[str, ExpertsSpec]
    candidates: Candidates = field(repr=False)
    linears: Mapping[str, tuple[int, int]] = field(repr=False)
    routers: Mapping[str, ExpertsSpec] = field(repr=False)
    total: int
    packed: int
    scheme: Scheme
    double_quantization: bool
    weights: FrozenWeights
    layers: tuple[Layer, ...] = field(repr=False)
    hidden_size: int
    vocab_size: int
    top_k: int
    attention: Attention
    takes_logits_to_keep: bool
    traits: Traits
    distribution: Distribution = field(default_factory=Distribution)
    count_cached: Annotated[Callable[[], int], Field(exclude=True)] = field(default=_nobody, repr=False, compare=False)

    def on_ranks(self, distribution: Distribution) -> "Inventory":
        """The same model, its experts held by ranks."""
        found = replace(self, distribution=distribution)
        return replace(found, weights=replace(self.weights, experts_bytes=sum(found.expert_bytes.values())))

    @cached_property
    def expert_bytes(self) -> dict[str, int]:
        """Packed bytes that a rank holds of each experts module, in the order of the forward."""
        return {name: self._bytes_here(spec) for name, spec in self.specs.items()}

    def _bytes_here(self, spec: ExpertsSpec) -> int:
        held = self.double_quantization, self.scheme, self.distribution.slices
        return experts_bytes(self.experts_here(spec), spec, *held)

    @property
    def matrices(self) -> Iterator[tuple[int, int]]:
        """(N, K) of every matrix that is held in 4 bits."""
        for layer in self.layers:
            yield from layer.linears.values()
            for spec in layer.experts.values():
                for projection in spec.projections:
                    yield from (spec.shape(projection) for _ in range(spec.num_experts))

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Packed bytes of each experts module that a rank computes with: of slices, those of all ranks."""
        return tuple(self.distribution.slices * num_bytes for num_bytes in self.expert_bytes.values())

    def experts_here(self, spec: ExpertsSpec) -> int:
        """Experts of a layer that a rank computes."""
        return most_owned(spec.num_experts, self.distribution.expert_ranks)

    @property
    def read_bytes(self) -> int:
        """4-bit weights that a rank reads in each pass over the layers."""
        return self.weights.linears_bytes + sum(self.layer_bytes)

    @property
    def cached_numbers(self) -> int:
        """Numbers that a token leaves in the cache of a generation."""
        return self.count_cached()

    @property
    def head(self) -> str | None:
        """Dotted name of the output head."""
        return self.candidates.head


def count_parameters(inventory: Inventory, targets: ResolvedTargets) -> Parameters:
    """Total, trainable and packed numbers of parameters (see `Parameters`)."""
    trainable = count_adapter(inventory, targets)
    return Parameters(inventory.total, trainable, inventory.packed + trainable)


def count_adapter(
    inventory: Inventory, targets: ResolvedTargets, experts_of: Callable[[ExpertsSpec], int] | None = None
) -> int:
    """Weights of the adapter: r * (K + N) for each matrix, and N with DoRA; experts one by one (see `factor_sizes`)."""
    return sum(factor_sizes(inventory, targets, experts_of))


def factor_sizes(
    inventory: Inventory, targets: ResolvedTargets, experts_of: Callable[[ExpertsSpec], int] | None = None
) -> Iterator[int]:
    """Numbers of each factor of the adapter; those of an expert layer are stacked.

    Args:
        inventory: the model's shapes.
        targets: what the adapter changes.
        experts_of: how many experts of each layer are counted; None counts all.
    """
    for name, (rank, _) in targets.linears.items():
        out_features, in_features = inventory.linears[name]
        yield from (rank * in_features, rank * out_features)
        if targets.use_dora:
            yield out_features
    for spec, size, part in _parts_of_experts(inventory, targets):
        yield math.ceil(size * (experts_of(spec) if experts_of else spec.num_experts) * part)
    for name, (rank, _) in targets.router.items():
        yield from (rank * inventory.routers[name].num_experts, rank * inventory.routers[name].hidden_size)


def count_by_adamw(inventory: Inventory, targets: ResolvedTargets) -> int:
    """Weights of the adapter that Muon leaves to AdamW: those of routers and of the output head."""
    others = {name: rank for name, rank in targets.linears.items() if name == inventory.head}
    return count_adapter(inventory, ResolvedTargets(linears=others, router=targets.router, experts={}))


def expert_factors(inventory: Inventory, targets: ResolvedTargets) -> Iterator[tuple[ExpertsSpec, int]]:
    """Factors of the experts, with their layer's shapes: r * K, r * N and DoRA's N numbers for each projection."""
    yield from ((spec, size) for spec, size, _ in _parts_of_experts(inventory, targets))


def _parts_of_experts(inventory: Inventory, targets: ResolvedTargets) -> Iterator[tuple[ExpertsSpec, int, float]]:
    """The same, with the part of a layer's experts that has such factors."""
    for name, projections in targets.experts.items():
        spec = inventory.specs[name]
        groups = targets.groups.get(name) or [Group(tuple(range(spec.num_experts)))]
        for projection, (rank, _) in projections.items():
            for experts, factor in groups:
                sizes = (max(1, round(rank * factor)) * width for width in spec.shape(projection))
                yield from ((spec, size, len(experts) / spec.num_experts) for size in sizes)
                if targets.use_dora:
                    yield spec, spec.shape(projection)[0], len(experts) / spec.num_experts


def experts_bytes(
    num_experts: int, spec: ExpertsSpec, double_quantization: bool, scheme: Scheme, slices: int = 1
) -> int:
    """Bytes of an expert layer's two stacks, or of the first of so many slices of each of their buffers."""
    *first, down = spec.projections
    sizes = ((num_experts * len(first), spec.shape(first[0])), (num_experts, spec.shape(down)))
    return sum(stack_bytes(count, shape, double_quantization, scheme, slices) for count, shape in sizes)
