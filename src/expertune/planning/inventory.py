"""Count a model's parameters and the bytes it takes once its experts and linears are 4-bit, from shapes alone.

Shape suffixes: N out_features, K in_features, E experts, D hidden size, r rank.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.checkpoint.linears import decoder_layers
from expertune.checkpoint.meta import kept_dtype
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.recipe import Recipe
from expertune.checkpoint.targets import Group, ResolvedTargets
from expertune.distributed.parallel import most_owned
from expertune.experts.contract import ExpertsSpec, config_value, experts_per_token
from expertune.experts.router import find_router
from expertune.generation.cache import cached_numbers
from expertune.kernels.nf4 import BLOCK_SIZE, Nf4Stack, Part, Scheme
from expertune.planning.distribution import Distribution


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


@dataclass(frozen=True)
class Inventory:
    """Shapes of a model; everything that the plan computes starts here.

    Attributes:
        model: the model on the meta device, with tied weights tied.
        names: its name map.
        recipe: what of it is held in 4 bits, and how.
        weights: its bytes.
        layers: shapes by decoder layer.
        hidden_size: D.
        vocab_size: output features of the output head.
        top_k: experts per token.
        attention: widths of the attention.
        distribution: how the ranks of a run hold the experts; bytes are those of the rank that has the most.
    """

    model: PreTrainedModel
    names: NameMap
    recipe: Recipe
    weights: FrozenWeights
    layers: tuple[Layer, ...] = field(repr=False)
    hidden_size: int
    vocab_size: int
    top_k: int
    attention: Attention
    distribution: Distribution = field(default_factory=Distribution)

    def on_ranks(self, distribution: Distribution) -> "Inventory":
        """The same model, its experts held by ranks."""
        found = replace(self, distribution=distribution)
        return replace(found, weights=replace(self.weights, experts_bytes=sum(found.expert_bytes.values())))

    @cached_property
    def expert_bytes(self) -> dict[str, int]:
        """Packed bytes that a rank holds of each experts module, in the order of the forward."""
        slices = self.distribution.slices
        return {n: _experts_bytes(self.experts_here(s), s, self.recipe, slices) for n, s in self.names.specs.items()}

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

    @cached_property
    def routers(self) -> dict[str, ExpertsSpec]:
        """Owner of each router's [E, D] weight -> the experts that it routes to."""
        found = {find_router(name, self.model, spec): spec for name, spec in self.names.specs.items()}
        return {name: spec for name, spec in found.items() if name is not None}

    @property
    def takes_logits_to_keep(self) -> bool:
        """Whether the forward can be asked for the last position's logits alone, which generation then does."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @cached_property
    def cached_numbers(self) -> int:
        """Numbers that a token leaves in the cache of a generation; keys and values where a family does not say."""
        keys_and_values = len(self.layers) * (self.attention.key + self.attention.value)
        return cached_numbers(self.model, self.names.specs) or keys_and_values


def take_inventory(model: PreTrainedModel, names: NameMap, recipe: Recipe, compute_dtype: torch.dtype) -> Inventory:
    """Read the shapes of a causal language model, all of it in one process.

    Args:
        model: the model on the meta device, with tied weights tied.
        names: its name map.
        recipe: what of it is held in 4 bits.
        compute_dtype: dtype of everything that is not.
    """
    text_config = model.config.get_text_config()
    attention = _attention(text_config)
    linears = {**recipe.linears, **recipe.whole}
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    layers = tuple(
        Layer(_within(name, names.specs), _within(name, shapes), _norm_widths(layer, attention))
        for name, layer in decoder_layers(model, names.specs)
    )
    head = model.get_output_embeddings()
    return Inventory(
        model=model,
        names=names,
        recipe=recipe,
        weights=_weigh(model, names, recipe, compute_dtype),
        layers=layers,
        hidden_size=next(iter(names.specs.values())).hidden_size,
        vocab_size=head.out_features if isinstance(head, nn.Linear) else int(text_config.vocab_size),
        top_k=experts_per_token(text_config, names.specs),
        attention=attention,
    )


def count_parameters(inventory: Inventory, targets: ResolvedTargets) -> Parameters:
    """Total, trainable and packed numbers of parameters (see `Parameters`)."""
    model, specs = inventory.model, inventory.names.specs
    head = model.get_output_embeddings()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    halved = _stacks(specs) | {f"{name}.weight" for name in linears | inventory.routers.keys()}
    total = packed = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        packed += (parameter.numel() + 1) // 2 if name in halved else parameter.numel()
    trainable = count_adapter(inventory, targets)
    return Parameters(total, trainable, packed + trainable)


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
        linear = inventory.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        yield from (rank * linear.in_features, rank * linear.out_features)
        if targets.use_dora:
            yield linear.out_features
    for spec, size, part in _parts_of_experts(inventory, targets):
        yield math.ceil(size * (experts_of(spec) if experts_of else spec.num_experts) * part)
    for name, (rank, _) in targets.router.items():
        yield from (rank * inventory.routers[name].num_experts, rank * inventory.routers[name].hidden_size)


def count_by_adamw(inventory: Inventory, targets: ResolvedTargets) -> int:
    """Weights of the adapter that Muon leaves to AdamW: those of routers and of the output head."""
    head = inventory.model.get_output_embeddings()
    others = {name: rank for name, rank in targets.linears.items() if inventory.model.get_submodule(name) is head}
    return count_adapter(inventory, ResolvedTargets(linears=others, router=targets.router, experts={}))


def expert_factors(inventory: Inventory, targets: ResolvedTargets) -> Iterator[tuple[ExpertsSpec, int]]:
    """Factors of the experts, with their layer's shapes: r * K, r * N and DoRA's N numbers for each projection."""
    yield from ((spec, size) for spec, size, _ in _parts_of_experts(inventory, targets))


def _parts_of_experts(inventory: Inventory, targets: ResolvedTargets) -> Iterator[tuple[ExpertsSpec, int, float]]:
    """The same, with the part of a layer's experts that has such factors."""
    for name, projections in targets.experts.items():
        spec = inventory.names.specs[name]
        groups = targets.groups.get(name) or [Group(tuple(range(spec.num_experts)))]
        for projection, (rank, _) in projections.items():
            for experts, factor in groups:
                sizes = (max(1, round(rank * factor)) * width for width in spec.shape(projection))
                yield from ((spec, size, len(experts) / spec.num_experts) for size in sizes)
                if targets.use_dora:
                    yield spec, spec.shape(projection)[0], len(experts) / spec.num_experts


def _experts_bytes(num_experts: int, spec: ExpertsSpec, recipe: Recipe, slices: int = 1) -> int:
    """Bytes of an expert layer's two stacks, or of the first of so many slices of each of their buffers."""
    *first, down = spec.projections
    sizes = ((num_experts * len(first), spec.shape(first[0])), (num_experts, spec.shape(down)))
    stacks = [_stack(*size, recipe, recipe.scheme) for size in sizes]
    if slices == 1:
        return sum(stack.nbytes for stack in stacks)
    return sum(Part(0, slices).each(buffer) for stack in stacks for buffer in stack.bytes)


def _stack(num_matrices: int, shape: tuple[int, int], recipe: Recipe, scheme: Scheme = "nf4") -> Nf4Stack:
    """Matrices [N, K] and their scales as buffers without memory, in whole blocks."""
    num_blocks = -(-shape[0] * shape[1] // BLOCK_SIZE)
    return Nf4Stack(num_matrices, num_blocks, BLOCK_SIZE, recipe.double_quantization, "meta", scheme)


def _weigh(model: PreTrainedModel, names: NameMap, recipe: Recipe, compute_dtype: torch.dtype) -> FrozenWeights:
    stacks, saved = _stacks(names.specs), model.state_dict().keys()
    # Some families keep a part in float32 whatever the dtype, such as a router's correction bias.
    kept: dict[str, torch.dtype] = model._get_dtype_plan(compute_dtype)

    def held_bytes(name: str, tensor: Tensor) -> int:
        return tensor.numel() * kept_dtype(kept, name, tensor.dtype).itemsize

    return FrozenWeights(
        experts_bytes=sum(_experts_bytes(spec.num_experts, spec, recipe) for spec in names.specs.values()),
        linears_bytes=sum(
            _stack(1, (linear.out_features, linear.in_features), recipe).nbytes
            + (linear.bias.nbytes if linear.bias is not None else 0)
            for linear in recipe.linears.values()
        ),
        unquantized_bytes=sum(
            held_bytes(name, parameter)
            for name, parameter in model.named_parameters()
            if name not in stacks and name.rpartition(".")[0] not in recipe.linears
        ),
        buffers_bytes=sum(
            held_bytes(name, buffer) if name in saved else buffer.nbytes for name, buffer in model.named_buffers()
        ),
    )


def _within(layer: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shape for name, shape in shapes.items() if name.startswith(f"{layer}.")}


def _stacks(specs: Mapping[str, ExpertsSpec]) -> set[str]:
    return {f"{name}.{stack}" for name, spec in specs.items() for stack in spec.weight_names}


def _attention(config: Any) -> Attention:
    """Widths by config; as wide as the hidden states where it does not say."""
    heads = int(config_value(config, "num_attention_heads") or 1)
    pairs = int(config_value(config, "num_key_value_heads") or heads)
    head = int(config_value(config, "head_dim") or config.hidden_size // heads)
    rotated, plain = config_value(config, "qk_rope_head_dim"), config_value(config, "qk_nope_head_dim")
    size = int(rotated) + int(plain) if isinstance(rotated, int) and isinstance(plain, int) else head
    value = int(config_value(config, "v_head_dim") or size)
    eager = config._attn_implementation == "eager"
    return Attention(heads * size, pairs * size, pairs * value, heads * value, heads, eager)


def _norm_widths(layer: nn.Module, attention: Attention) -> tuple[int, ...]:
    """Widths of a layer's norms: modules of that name with a weight of one dimension."""
    norms = (module for module in layer.modules() if "norm" in type(module).__name__.lower())
    weights = (getattr(norm, "weight", None) for norm in norms)
    widths = [weight.numel() for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 1]
    return tuple(attention.query if width == attention.query // attention.heads else width for width in widths)
