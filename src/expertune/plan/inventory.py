"""Count a model's parameters and the bytes it takes once its experts and linears are 4-bit, from shapes alone.

Shape suffixes: N out_features, K in_features, E experts, D hidden size, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from expertune.checkpoint.linears import decoder_layers, linears_to_quantize
from expertune.checkpoint.names import NameMap, read_names
from expertune.checkpoint.targets import ResolvedTargets
from expertune.experts.contract import ExpertsSpec
from expertune.experts.router import find_router
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

_FLOAT32_BYTES = 4


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
    """Bytes of the base model as Expertune holds it; exact.

    The 16-value codebooks of NF4 and the 256-value one of its scales are constants that matrices share, and are left
    out (below 10 kB for a whole model).

    Attributes:
        experts_bytes: NF4 experts.
        linears_bytes: NF4 linears of the decoder layers, with their 16-bit biases.
        unquantized_bytes: embeddings, output head, routers, norms and whatever else stays in the compute dtype.
        buffers_bytes: buffers in their own dtype, such as rotary frequencies.
    """

    experts_bytes: int
    linears_bytes: int
    unquantized_bytes: int
    buffers_bytes: int

    @property
    def frozen_bytes(self) -> int:
        """Sum of all parts."""
        return self.experts_bytes + self.linears_bytes + self.unquantized_bytes + self.buffers_bytes


@dataclass(frozen=True)
class Layer:
    """Shapes of one decoder layer.

    Attributes:
        experts: its experts, if it is a sparse layer.
        linears: (N, K) of its 4-bit linears by dotted name.
    """

    experts: tuple[ExpertsSpec, ...]
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Inventory:
    """Shapes of a model; everything that the plan computes starts here.

    Attributes:
        model: the model on the meta device.
        names: its name map.
        linears: the linears that are held in 4 bits.
        layers: shapes by decoder layer.
        hidden_size: D.
        vocab_size: rows of the output head.
        top_k: experts per token.
    """

    model: nn.Module
    names: NameMap
    linears: Mapping[str, nn.Linear]
    layers: tuple[Layer, ...] = field(repr=False)
    hidden_size: int
    vocab_size: int
    top_k: int


def take_inventory(model: nn.Module) -> Inventory:
    """Read the shapes of a causal language model on the meta device.

    Raises:
        UnsupportedModelError: it has no experts that can be packed.
    """
    # Creating parameters on the meta device parts those that the config ties.
    model.tie_weights()  # type: ignore[operator]
    names = read_names(model)
    linears = linears_to_quantize(model, names.specs)
    layers = tuple(
        Layer(
            tuple(spec for experts, spec in names.specs.items() if experts.startswith(f"{name}.")),
            {
                linear: (module.out_features, module.in_features)
                for linear, module in linears.items()
                if linear.startswith(f"{name}.")
            },
        )
        for name, _ in decoder_layers(model, names.specs)
    )
    head = model.get_output_embeddings()  # type: ignore[operator]
    text_config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return Inventory(
        model=model,
        names=names,
        linears=linears,
        layers=layers,
        hidden_size=next(iter(names.specs.values())).hidden_size,
        vocab_size=head.out_features if isinstance(head, nn.Linear) else int(text_config.vocab_size),
        top_k=_top_k(model, names.specs),
    )


def count_parameters(inventory: Inventory, targets: ResolvedTargets) -> Parameters:
    """Total, trainable and packed numbers of parameters (see `Parameters`)."""
    halved = _linear_weights(inventory)
    total = packed = 0
    for name, parameter in inventory.model.named_parameters():
        total += parameter.numel()
        packed += (parameter.numel() + 1) // 2 if name in halved else parameter.numel()
    trainable = count_adapter(inventory, targets)
    return Parameters(total, trainable, packed + trainable)


def count_adapter(inventory: Inventory, targets: ResolvedTargets) -> int:
    """Weights of the adapter: r * (K + N) for each matrix, experts counted one by one."""
    count = 0
    for name, (rank, _) in targets.linears.items():
        linear = inventory.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        count += rank * (linear.in_features + linear.out_features)
    for name, projections in targets.experts.items():
        spec = inventory.names.specs[name]
        count += sum(spec.num_experts * rank * sum(spec.shape(part)) for part, (rank, _) in projections.items())
    routed = {
        find_router(name, inventory.model, spec): spec.num_experts + spec.hidden_size
        for name, spec in inventory.names.specs.items()
    }
    return count + sum(rank * routed[name] for name, (rank, _) in targets.router.items())


def weigh(inventory: Inventory, compute_dtype: torch.dtype, double_quantization: bool) -> FrozenWeights:
    """Bytes of the base model as Expertune holds it.

    Args:
        inventory: the model's shapes.
        compute_dtype: dtype of everything that is not 4-bit.
        double_quantization: absmax values are held in 8 bits.
    """
    experts = sum(
        spec.num_experts * quantized_bytes(*spec.shape(part), double_quantization)
        for spec in inventory.names.specs.values()
        for part in spec.projections
    )
    linears = sum(
        quantized_bytes(linear.out_features, linear.in_features, double_quantization)
        + (linear.bias.numel() * compute_dtype.itemsize if linear.bias is not None else 0)
        for linear in inventory.linears.values()
    )
    quantized = set(inventory.names.specs) | set(inventory.linears)
    unquantized = sum(
        parameter.numel() * compute_dtype.itemsize
        for name, parameter in inventory.model.named_parameters()
        if name.rpartition(".")[0] not in quantized
    )
    return FrozenWeights(experts, linears, unquantized, sum(buffer.nbytes for buffer in inventory.model.buffers()))


def quantized_bytes(num_rows: int, num_columns: int, double_quantization: bool = True) -> int:
    """Bytes of one NF4 matrix [N, K]: two weights to a byte and one absmax for each block of 64.

    With double quantization an absmax takes a byte, each 256 of them a float32 scale, and all of them a float32 offset
    (QLoRA, Dettmers et al. 2023, section 3).
    """
    weights = num_rows * num_columns
    blocks = -(-weights // BLOCK_SIZE)
    if not double_quantization:
        return weights // 2 + blocks * _FLOAT32_BYTES
    return weights // 2 + blocks + (-(-blocks // NESTED_BLOCK_SIZE) + 1) * _FLOAT32_BYTES


def _linear_weights(inventory: Inventory) -> set[str]:
    """Parameters that count half in the packed convention."""
    model, specs = inventory.model, inventory.names.specs
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    stacks = {f"{name}.{leaf}" for name in specs for leaf in ("gate_up_proj", "up_proj", "down_proj")}
    routers = {f"{router}.weight" for name, spec in specs.items() if (router := find_router(name, model, spec))}
    return linears | stacks | routers


def _top_k(model: nn.Module, specs: Mapping[str, ExpertsSpec]) -> int:
    """Experts per token by config, under the names that families use; all of them where none is found."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"):
        value = getattr(config, name, None)
        value = max(value, default=None) if isinstance(value, list) else value
        if isinstance(value, int) and value > 0:
            return value
    return max(spec.num_experts for spec in specs.values())
