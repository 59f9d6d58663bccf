"""Read what a plan starts from of a model on the meta device: its checkpoint, and its shapes as plain values."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.checkpoint.linears import decoder_layers
from expertune.checkpoint.meta import build_meta_model, kept_dtype
from expertune.checkpoint.names import NameMap, read_names
from expertune.checkpoint.recipe import Recipe
from expertune.checkpoint.targets import Candidates
from expertune.config import RunConfig
from expertune.experts.contract import config_value, experts_per_token
from expertune.experts.router import find_router
from expertune.experts.spec import ExpertsSpec
from expertune.generation.cache import cached_numbers
from expertune.kernels.amounts import Dtype, stack_bytes
from expertune.planning.inventory import Attention, FrozenWeights, Inventory, Layer, experts_bytes
from expertune.planning.shapes import Shapes, find_config
from expertune.planning.source import known_base, read_source
from expertune.train.merging import Traits


def read_shapes(config: RunConfig, compute_dtype: Dtype, trust_remote_code: bool = False) -> Shapes:
    """Read a run's model; see `plan_for`."""
    folder, on_hub = find_config(config.model, config.revision, trust_remote_code)
    dtype: torch.dtype = getattr(torch, compute_dtype.name)
    model = build_meta_model(folder, dtype, trust_remote_code, shapes_only=True)
    # Creating parameters on the meta device separates those that the config ties.
    model.tie_weights()
    names = read_names(model)
    recipe, source = read_source(config, folder, on_hub, model, names)
    begun = None
    if config.lora.init_from:
        from expertune.adapt.attach import expected_targets  # which imports PEFT's tuners
        from expertune.adapt.base_model import require_same_base

        if not config.lora.init_from_other_base:
            base = known_base(folder, on_hub, model, names, recipe if source.saw_headers else None)
            require_same_base(config.lora.init_from, base, config.model)
        begun = expected_targets(model, names, config.lora)
    return Shapes(source, take_inventory(model, names, recipe, dtype), begun)


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
    stacks, routers = _stacks(names.specs), _routers(model, names.specs)
    every_linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    halved = {
        f"{name}.weight" for name in routers.keys() | {n for n, module in every_linear.items() if module is not head}
    }
    numbers = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    # What a token leaves in the cache where a family does not say.
    keys_and_values = len(layers) * (attention.key + attention.value)
    return Inventory(
        architecture=type(model).__name__,
        specs=names.specs,
        candidates=Candidates.of(model, names),
        linears={name: (linear.out_features, linear.in_features) for name, linear in every_linear.items()},
        routers=routers,
        total=sum(count for _, count in numbers),
        packed=sum((count + 1) // 2 if name in halved | stacks else count for name, count in numbers),
        scheme=recipe.scheme,
        double_quantization=recipe.double_quantization,
        weights=_weigh(model, names, recipe, compute_dtype),
        layers=layers,
        hidden_size=next(iter(names.specs.values())).hidden_size,
        vocab_size=head.out_features if isinstance(head, nn.Linear) else int(text_config.vocab_size),
        top_k=experts_per_token(text_config, names.specs),
        attention=attention,
        takes_logits_to_keep="logits_to_keep" in inspect.signature(model.forward).parameters,
        traits=Traits.of(model),
        count_cached=cache(lambda: cached_numbers(model, names.specs) or keys_and_values),
    )


def _routers(model: PreTrainedModel, specs: Mapping[str, ExpertsSpec]) -> dict[str, ExpertsSpec]:
    found = {find_router(name, model, spec): spec for name, spec in specs.items()}
    return {name: spec for name, spec in found.items() if name is not None}


def _weigh(model: PreTrainedModel, names: NameMap, recipe: Recipe, compute_dtype: torch.dtype) -> FrozenWeights:
    stacks, saved = _stacks(names.specs), model.state_dict().keys()
    # Some families keep a part in float32 whatever the dtype, such as a router's correction bias.
    kept: dict[str, torch.dtype] = model._get_dtype_plan(compute_dtype)

    def held_bytes(name: str, tensor: Tensor) -> int:
        return tensor.numel() * kept_dtype(kept, name, tensor.dtype).itemsize

    return FrozenWeights(
        experts_bytes=sum(
            experts_bytes(spec.num_experts, spec, recipe.double_quantization, recipe.scheme)
            for spec in names.specs.values()
        ),
        linears_bytes=sum(
            stack_bytes(1, (linear.out_features, linear.in_features), recipe.double_quantization)
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
