"""Count a model's parameters and the bytes it takes once its experts and linears are 4-bit, from shapes alone.

Shape suffixes: N out_features, K in_features, E experts, D hidden size, r rank.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from expertune.checkpoint.linears import decoder_layers
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import ResolvedTargets
from expertune.experts.contract import TOP_K_NAMES, ExpertsSpec
from expertune.experts.router import find_router
from expertune.kernels.nf4 import BLOCK_SIZE, MXFP4_BLOCK_SIZE, NESTED_BLOCK_SIZE, Scheme

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
        experts_bytes: NF4 experts; what they hold beside (biases, norms) is not among them.
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
        """What is read at every pass over the layers."""
        return self.experts_bytes + self.linears_bytes

    @property
    def frozen_bytes(self) -> int:
        """Sum of all parts."""
        return self.experts_bytes + self.linears_bytes + self.unquantized_bytes + self.buffers_bytes


@dataclass(frozen=True)
class Layer:
    """Shapes of one decoder layer.

    Attributes:
        experts: shapes of its experts by dotted name; none where the layer is dense.
        linears: (N, K) of its 4-bit linears by dotted name.
        norms: width of each of its norms; one that works on heads is as wide as all of them.
    """

    experts: Mapping[str, ExpertsSpec]
    linears: Mapping[str, tuple[int, int]]
    norms: tuple[int, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Widths of the attention, all heads together.

    Attributes:
        query: of queries.
        key: of keys.
        value: of values.
        output: of what attention gives.
        heads: query heads.
    """

    query: int
    key: int
    value: int
    output: int
    heads: int

    @property
    def widths(self) -> int:
        """Numbers for each token in queries, keys, values and output."""
        return self.query + self.key + self.value + self.output


@dataclass(frozen=True)
class Inventory:
    """Shapes of a model; everything that the plan computes starts here.

    Attributes:
        model: the model on the meta device.
        names: its name map.
        linears: the linears that are held in 4 bits.
        layers: shapes by decoder layer.
        hidden_size: D.
        vocab_size: output features of the output head.
        top_k: experts per token.
        attention: widths of the attention.
        takes_logits_to_keep: its forward can be asked for the last position's logits alone, which generation then does.
        cached_numbers: numbers that a token leaves in the cache of a generation, all layers together; 0 where none is
            planned.
    """

    model: PreTrainedModel
    names: NameMap
    linears: Mapping[str, nn.Linear]
    layers: tuple[Layer, ...] = field(repr=False)
    hidden_size: int
    vocab_size: int
    top_k: int
    attention: Attention
    takes_logits_to_keep: bool = True
    cached_numbers: int = 0


def take_inventory(
    model: PreTrainedModel, names: NameMap, linears: Mapping[str, nn.Linear], generates: bool = False
) -> Inventory:
    """Read the shapes of a causal language model on the meta device, with tied weights tied.

    Args:
        model: the model.
        names: its name map.
        linears: those of its linears that are held in 4 bits.
        generates: whether answers are generated, so that the cache's numbers matter.
    """
    text_config = model.config.get_text_config()
    attention = _attention(text_config)
    layers = tuple(
        Layer(
            {experts: spec for experts, spec in names.specs.items() if experts.startswith(f"{name}.")},
            {
                linear: (module.out_features, module.in_features)
                for linear, module in linears.items()
                if linear.startswith(f"{name}.")
            },
            _norm_widths(layer, attention),
        )
        for name, layer in decoder_layers(model, names.specs)
    )
    head = model.get_output_embeddings()
    return Inventory(
        model=model,
        names=names,
        linears=linears,
        layers=layers,
        hidden_size=next(iter(names.specs.values())).hidden_size,
        vocab_size=head.out_features if isinstance(head, nn.Linear) else int(text_config.vocab_size),
        top_k=_top_k(text_config, names.specs),
        attention=attention,
        takes_logits_to_keep="logits_to_keep" in inspect.signature(model.forward).parameters,
        cached_numbers=cached_numbers(model, names.specs, attention, len(layers)) if generates else 0,
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
    count = count_low_rank(inventory, targets, lambda spec: spec.num_experts)
    routed = {
        find_router(name, inventory.model, spec): spec.num_experts + spec.hidden_size
        for name, spec in inventory.names.specs.items()
    }
    return count + sum(rank * routed[name] for name, (rank, _) in targets.router.items())


def count_low_rank(inventory: Inventory, targets: ResolvedTargets, experts_of: Callable[[ExpertsSpec], int]) -> int:
    """The adapter's weights on linears, and on as many experts of each layer as `experts_of` says; routers left out."""
    count = 0
    for name, (rank, _) in targets.linears.items():
        linear = inventory.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        count += rank * (linear.in_features + linear.out_features)
    for name, projections in targets.experts.items():
        spec = inventory.names.specs[name]
        count += experts_of(spec) * sum(rank * sum(spec.shape(part)) for part, (rank, _) in projections.items())
    return count


def weigh(
    inventory: Inventory, compute_dtype: torch.dtype, double_quantization: bool, scheme: Scheme = "nf4"
) -> FrozenWeights:
    """Bytes of the base model as Expertune holds it.

    Args:
        inventory: the model's shapes.
        compute_dtype: dtype of everything that is not 4-bit.
        double_quantization: absmax values are held in 8 bits.
        scheme: how experts are held.
    """
    model, specs = inventory.model, inventory.names.specs
    linears = sum(
        quantized_bytes(linear.out_features, linear.in_features, double_quantization)
        + (linear.bias.nbytes if linear.bias is not None else 0)
        for linear in inventory.linears.values()
    )
    stacks = _stacks(inventory)
    # Some families keep a part in float32 whatever the dtype, such as a router's correction bias.
    kept: dict[str, torch.dtype] = model._get_dtype_plan(compute_dtype)
    saved = model.state_dict().keys()

    def held_bytes(name: str, tensor: Tensor) -> int:
        dtypes = (dtype for part, dtype in kept.items() if fnmatchcase(name, f"*{part}*"))
        return tensor.numel() * next(dtypes, tensor.dtype).itemsize

    return FrozenWeights(
        experts_bytes=sum(experts_bytes(spec, double_quantization, scheme) for spec in specs.values()),
        linears_bytes=linears,
        unquantized_bytes=sum(
            held_bytes(name, parameter)
            for name, parameter in model.named_parameters()
            if name not in stacks and name.rpartition(".")[0] not in inventory.linears
        ),
        buffers_bytes=sum(
            held_bytes(name, buffer) if name in saved else buffer.nbytes for name, buffer in model.named_buffers()
        ),
    )


def experts_bytes(spec: ExpertsSpec, double_quantization: bool, scheme: Scheme = "nf4") -> int:
    """Packed bytes of one experts module: NF4, or MXFP4 with a scale of 8 bits for each 32 weights."""
    if scheme == "mxfp4":
        return spec.num_parameters // 2 + spec.num_parameters // MXFP4_BLOCK_SIZE
    each = (quantized_bytes(*spec.shape(projection), double_quantization) for projection in spec.projections)
    return spec.num_experts * sum(each)


def quantized_bytes(out_features: int, in_features: int, double_quantization: bool = True) -> int:
    """Bytes of one NF4 matrix [N, K]: two weights to a byte and one absmax for each block of 64.

    With double quantization an absmax takes a byte, each 256 of them a float32 scale, and all of them a float32 offset
    (QLoRA, Dettmers et al. 2023, section 3).
    """
    weights = out_features * in_features
    blocks = -(-weights // BLOCK_SIZE)
    if not double_quantization:
        return weights // 2 + blocks * _FLOAT32_BYTES
    return weights // 2 + blocks + (-(-blocks // NESTED_BLOCK_SIZE) + 1) * _FLOAT32_BYTES


def cached_numbers(model: nn.Module, experts: Iterable[str], attention: Attention, num_layers: int) -> int:
    """How many numbers a token leaves in the cache of a generation, in all layers together.

    Two tokens pass through a copy of the model on the meta device, whose experts return what they are given. So latents
    count where a family caches these, and layers that hold a state in place of keys count nothing. Where a family
    cannot run like this, it is keys and values of every layer.

    Args:
        model: a causal language model on the meta device.
        experts: names of its experts modules.
        attention: its widths.
        num_layers: its decoder layers.
    """
    tried: Any = copy.deepcopy(model).to("meta").eval()
    for name in experts:
        tried.get_submodule(name).forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        cache = DynamicCache(config=tried.config.get_text_config())
        with torch.no_grad():
            tried(input_ids=tokens, use_cache=True, **{cache_argument(tried): cache})
        held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        numbers = sum(tensor.numel() for tensor in held if isinstance(tensor, Tensor)) // tokens.numel()
    except Exception:  # whatever a family's own code does not do without values
        numbers = 0
    return numbers or num_layers * (attention.key + attention.value)


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def config_value(config: Any, name: str) -> Any:
    """A value of a config; where layers have values of their own, the largest; None where there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to say one value for all layers
        layers = config.per_layer_config
        values = [getattr(each, name, None) for each in (layers.values() if isinstance(layers, dict) else layers)]
        return max((value for value in values if isinstance(value, int | float)), default=None)


def _stacks(inventory: Inventory) -> set[str]:
    return {f"{name}.{stack}" for name, spec in inventory.names.specs.items() for stack in spec.weight_names}


def _linear_weights(inventory: Inventory) -> set[str]:
    """Parameters that count half in the packed convention."""
    model, specs = inventory.model, inventory.names.specs
    head = model.get_output_embeddings()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    routers = {router for name, spec in specs.items() if (router := find_router(name, model, spec))}
    return _stacks(inventory) | {f"{name}.weight" for name in linears | routers}


def _top_k(text_config: Any, specs: Mapping[str, ExpertsSpec]) -> int:
    """Experts per token by config, under the names that families use; all of them where none is found."""
    for name in TOP_K_NAMES:
        value = config_value(text_config, name)
        value = max(value, default=None) if isinstance(value, list) else value
        if isinstance(value, int) and value > 0:
            return value
    return max(spec.num_experts for spec in specs.values())


def _attention(config: Any) -> Attention:
    """Widths by config; as wide as the hidden states where it does not say."""
    heads = int(config_value(config, "num_attention_heads") or 1)
    pairs = int(config_value(config, "num_key_value_heads") or heads)
    head = int(config_value(config, "head_dim") or config.hidden_size // heads)
    rotated, plain = config_value(config, "qk_rope_head_dim"), config_value(config, "qk_nope_head_dim")
    size = int(rotated) + int(plain) if isinstance(rotated, int) and isinstance(plain, int) else head
    value = int(config_value(config, "v_head_dim") or size)
    return Attention(heads * size, pairs * size, pairs * value, heads * value, heads)


def _norm_widths(layer: nn.Module, attention: Attention) -> tuple[int, ...]:
    """Widths of a layer's norms: modules of that name with a weight of one dimension."""
    norms = (module for module in layer.modules() if "norm" in type(module).__name__.lower())
    weights = (getattr(norm, "weight", None) for norm in norms)
    widths = [weight.numel() for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 1]
    return tuple(attention.query if width == attention.query // attention.heads else width for width in widths)
