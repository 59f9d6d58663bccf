"""Recognize the experts of any transformers model by their contract, not by their name.

transformers 5 holds the experts of an MoE block behind one decorator, `use_experts_implementation`: the instance then
carries `has_gate`, `has_bias`, `is_transposed`, `is_concatenated` and `has_post_expert_norm`, a `gate_up_proj` (or
`up_proj`) and a `down_proj` parameter stacked over experts, with biases of the same names and `_bias`, perhaps a module
`post_expert_norm`, and a forward of `(hidden_states, top_k_index, top_k_weights)`. Whatever fulfils this is an experts
module here. How its tensors are laid out is `layout.py`'s.

Shape suffixes: E experts, D hidden size, F intermediate size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts.spec import ExpertsSpec
from expertune.kernels.amounts import BLOCK_SIZE

# Experts per token, as configs and the modules that route name it.
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_ROUTER_TOP_K_NAMES = (*TOP_K_NAMES, "top_k", "topk")


def is_experts(module: nn.Module) -> bool:
    """Whether the module's class went through `use_experts_implementation`."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "_apply_gate"))


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every experts module of a model with its dotted name, in layer order."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield name, module


def read_spec(name: str, module: nn.Module) -> ExpertsSpec:
    """Shapes and switches of an experts module; works on the meta device.

    Args:
        name: dotted module name, for errors.
        module: an experts module for which `is_experts` holds.

    Raises:
        UnsupportedModelError: the module holds its experts otherwise than the contract says, or its sizes are no
            multiple of the quantization block.
    """
    has_gate, has_bias = bool(module.has_gate), bool(getattr(module, "has_bias", False))
    first_name = "gate_up_proj" if has_gate else "up_proj"
    try:
        first, down = module.get_parameter(first_name), module.get_parameter("down_proj")
        biases = [module.get_parameter(f"{stack}_bias") for stack in (first_name, "down_proj") if has_bias]
    except AttributeError as error:
        raise UnsupportedModelError(f"{name}: experts are held otherwise than stacked ({error})") from None
    if first.ndim != 3:
        raise UnsupportedModelError(f"{name}: {first_name} has shape {tuple(first.shape)}, expected three dimensions")
    parts = 2 if has_gate else 1
    is_transposed = bool(module.is_transposed)
    num_experts, rows, hidden_size = first.mT.shape if is_transposed else first.shape
    intermediate_size = rows // parts
    spec = ExpertsSpec(
        num_experts,
        hidden_size,
        intermediate_size,
        has_gate,
        has_bias,
        is_transposed,
        bool(module.is_concatenated) or not has_gate,
        bool(getattr(module, "has_post_expert_norm", False)),
    )
    down_shape = (hidden_size, intermediate_size)[:: -1 if is_transposed else 1]
    _require_shape(name, "down_proj", down, (num_experts, *down_shape))
    for bias, leaf, size in zip(biases, spec.weight_names, (parts * intermediate_size, hidden_size), strict=False):
        _require_shape(name, f"{leaf}_bias", bias, (num_experts, size))
    if spec.has_post_expert_norm and not isinstance(getattr(module, "post_expert_norm", None), nn.Module):
        raise UnsupportedModelError(f"{name}: has_post_expert_norm is set, but there is no module post_expert_norm")
    for what, size in (("hidden size", hidden_size), ("intermediate size", intermediate_size)):
        if size % BLOCK_SIZE or not size:
            raise UnsupportedModelError(
                f"{name}: {what} {size} is no multiple of {BLOCK_SIZE}, the number of weights that share one scale, so "
                "its experts cannot be held in 4 bits; choose a model of other sizes, or tune this one with plain PEFT"
            )
    return spec


def _require_shape(name: str, leaf: str, parameter: nn.Parameter, expected: tuple[int, ...]) -> None:
    if tuple(parameter.shape) != expected:
        raise UnsupportedModelError(f"{name}: {leaf} has shape {tuple(parameter.shape)}, expected {expected}")


def require_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """Specs of all experts modules by name.

    Raises:
        UnsupportedModelError: there are none, or one cannot be packed.
        CheckpointError: tokens are to be routed to more experts than there are, or to none.
    """
    specs = {name: read_spec(name, module) for name, module in find_experts(model)}
    if specs:
        for name, spec in specs.items():
            _require_routes(model, name, spec)
        return specs
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts"):
            raise UnsupportedModelError(
                f"{name}: {type(module).__name__} holds experts outside transformers' experts contract; with "
                "trust_remote_code, try without it: transformers may have this family itself. Else plain PEFT remains"
            )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no experts behind transformers' experts contract; Expertune tunes "
        "mixture-of-experts models (use plain PEFT with bitsandbytes for a dense one)"
    )


def _require_routes(model: nn.Module, name: str, spec: ExpertsSpec) -> None:
    for what, value in _experts_per_token(model, name).items():
        if not 1 <= value <= spec.num_experts:
            raise CheckpointError(
                f"config.json: {what} (experts for each token) is {value}, but {name} has {spec.num_experts} experts; "
                f"set it to a number from 1 to {spec.num_experts}, as the model was trained with"
            )


def _experts_per_token(model: nn.Module, name: str) -> dict[str, int]:
    """Experts for each token by the key of the config, as far as what routes to an experts module says it.

    What routes lies in the experts' own block: a module beside them, a part of it, or the block itself. Most keep the
    number; others ask their config each time.
    """
    parent, _, leaf = name.rpartition(".")
    block = model.get_submodule(parent)
    beside = [child for child_name, child in block.named_children() if child_name != leaf]
    modules = [block, *(part for child in beside for part in child.modules())]
    text = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator, union-attr]
    # As the config keeps them: one that differs by layer refuses to say one value for all.
    by_key = _numbers(text, TOP_K_NAMES)
    kept: dict[str, int] = {}
    for module in modules:
        for attribute, value in _numbers(module, _ROUTER_TOP_K_NAMES).items():
            kept[next((key for key, number in by_key.items() if number == value), attribute)] = value
    # Of several keys of a config, nothing says which one is used.
    return kept or (by_key if len(by_key) == 1 else {})


def _numbers(holder: object, names: tuple[str, ...]) -> dict[str, int]:
    held = vars(holder) if holder is not None else {}
    return {name: held[name] for name in names if type(held.get(name)) is int}


def config_value(config: Any, name: str) -> Any:
    """A value of a config; where layers have values of their own, the largest; None where there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers refuses to say one value for all layers
        layers = config.per_layer_config
        values = [getattr(each, name, None) for each in (layers.values() if isinstance(layers, dict) else layers)]
        return max((value for value in values if isinstance(value, int | float)), default=None)


def experts_per_token(text_config: Any, specs: Mapping[str, ExpertsSpec]) -> int:
    """Experts per token by config, under the names that families use; all of them where none is found."""
    for name in TOP_K_NAMES:
        value = config_value(text_config, name)
        value = max(value, default=None) if isinstance(value, list) else value
        if isinstance(value, int) and value > 0:
            return value
    return max(spec.num_experts for spec in specs.values())
