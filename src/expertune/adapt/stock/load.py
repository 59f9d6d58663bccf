"""Adapter files into 4-bit models by PEFT's and transformers' own calls: names and scales of a file as the live ones.

Each public function takes the place of a library's (see `expertune.registration`) and is given that function first.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from expertune.adapt.factors import PREFIX, AdapterFactors, Factors, read_factors, split_key, stacked
from expertune.adapt.live import LiveAdapter, base_of, call_arguments, names_of
from expertune.adapt.scales import unfold
from expertune.adapt.stock.config import StockLoraConfig
from expertune.adapt.stock.inject import refuse_hotswap
from expertune.adapt.stock.targets import rank_by_patterns
from expertune.errors import CheckpointError
from expertune.experts.lora import ExpertsLora, Ranks

Original = Callable[..., Any]


def convert_state_dict(
    original: Original,
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """`convert_peft_adapter_state_dict_for_transformers`: names of a file into names of the live model.

    Layers that the file holds nothing of lose an adapter that has not been trained yet: they were targets only because
    they share the last part of a name with others.

    Raises:
        CheckpointError: what the file holds of the experts does not fit the adapter.
    """
    base, names = base_of(model), names_of(model)
    adapter = LiveAdapter(base, names, adapter_name)
    layers = adapter.layers
    words = (peft_config.file or peft_config.asked) if isinstance(peft_config, StockLoraConfig) else peft_config
    pairs = {key: tensor for key, tensor in adapter_state_dict.items() if split_key(key)[1]}
    factors = read_factors(words.to_dict(), pairs, names, f"adapter {adapter_name!r}")
    _fit(base, layers, adapter_name, peft_config, factors)
    # Trained copies, magnitudes and the like are PEFT's own matter.
    live = {names.on_disk(name): name for name in layers}
    embeddings = adapter.embeddings
    out: dict[str, Tensor] = {}
    for key in adapter_state_dict.keys() - pairs.keys():
        tensor = adapter_state_dict[key]
        module, dot, factor = key.removeprefix(PREFIX).rpartition(".lora_")
        if module in embeddings and factor in ("embedding_A", "embedding_B"):
            name, layer = embeddings[module]
            if factor == "embedding_B":
                tensor = _embedding_at_scale(words, [name, module], tensor, layer.scaling[adapter_name])
            out[f"{PREFIX}{name}.lora_{factor}"] = tensor
        else:
            out[f"{PREFIX}{live[module]}.lora_{factor}" if dot and module in live else key] = tensor
    for name, pair in factors.linears.items():
        scale = layers[name].scaling[adapter_name] if name in layers else pair.scale
        out[f"{PREFIX}{name}.lora_A.weight"] = pair.a
        out[f"{PREFIX}{name}.lora_B.weight"] = _at_scale(pair, scale)
        if pair.magnitude is not None:
            out[f"{PREFIX}{name}.lora_magnitude_vector"] = pair.magnitude
    for name, projections in factors.experts.items():
        experts = layers[name]
        assert isinstance(experts, ExpertsLora)
        for projection, each in projections.items():
            pair, scale = stacked(each), experts.scale(adapter_name, projection)
            out[f"{PREFIX}{name}.lora_A.{projection}"] = pair.a
            out[f"{PREFIX}{name}.lora_B.{projection}"] = _at_scale(pair, scale)
            if pair.magnitude is not None:
                out[f"{PREFIX}{name}.lora_magnitude_vector.{projection}"] = pair.magnitude
    return out


def _at_scale(pair: Factors, scale: float) -> Tensor:
    """B with which a layer of this scale computes what the file describes."""
    return unfold(pair.b, scale / pair.scale, pair.b.dtype) if scale and pair.scale else pair.b


def _embedding_at_scale(words: LoraConfig, keys: list[str], b: Tensor, scale: float) -> Tensor:
    """B [D, r] of an embedding, with which a layer of this scale computes what the file describes."""
    rank = b.shape[1]
    own = rank_by_patterns(words, keys).alpha / (math.sqrt(rank) if words.use_rslora else rank)
    return _at_scale(Factors(b, b, own), scale)


def _fit(
    base: nn.Module, layers: dict[str, LoraLayer], adapter: str, config: PeftConfig, factors: AdapterFactors
) -> None:
    """Give the adapter the layers that its file holds; refused where it has been trained with others."""
    names = names_of(base)
    held: dict[str, Ranks] = {}
    for name, projections in factors.experts.items():
        if name not in layers:
            raise CheckpointError(_not_named(name))
        for projection, (pair, *_) in projections.items():
            rank = len(pair.a)
            alpha = pair.scale * (math.sqrt(rank) if config.use_rslora else rank)
            held.setdefault(name, {})[projection] = (rank, alpha)
    if beyond := next((name for name in factors.linears if name not in layers), None):
        raise CheckpointError(_not_named(beyond))
    is_untrained = _is_untrained(layers.values(), adapter)
    for name, layer in layers.items():
        if isinstance(layer, ExpertsLora):
            live = layer.ranks[adapter]
            same = {key: rank for key, (rank, _) in live.items()} == {k: r for k, (r, _) in held.get(name, {}).items()}
            if live == held.get(name) or (same and not is_untrained):
                continue
        elif name in factors.linears or names.on_disk(name).rpartition(".")[2] not in names.projection_names.values():
            continue
        if not is_untrained:
            raise CheckpointError(
                f"the file holds {held.get(name) or 'nothing'} (rank, alpha) of {name}; the adapter {adapter!r} has "
                "been trained with others"
            )
        if isinstance(layer, ExpertsLora) and name in held:
            config.expert_ranks[name] = held[name]
            layer.update_layer(adapter, config.r, config.lora_alpha, config, target_name=name)
        elif set(layer.lora_A) == {adapter}:
            base.set_submodule(name, layer.get_base_layer())
        else:
            layer.delete_adapter(adapter)
    if isinstance(config, StockLoraConfig):
        config.keep({name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)})


def _not_named(module: str) -> str:
    return f"the file holds an adapter of {module}, which its config does not name; is it this adapter's config?"


def _is_untrained(layers: Iterable[LoraLayer], adapter: str) -> bool:
    """Whether every factor B of an adapter is zero, so that it has no effect yet."""
    factors = [factor for layer in layers for factor in layer.lora_B[adapter].parameters()]
    return all(factor.is_meta or not factor.any() for factor in factors)


def load_into_peft_model(
    original: Original, model: PeftModel, model_id: str, adapter_name: str, *a: Any, **kw: Any
) -> Any:
    """`PeftModel.load_adapter`: by the file's own scales, also into an adapter that is there with other ones.

    PEFT reads a file's config only for a new adapter.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, StockLoraConfig):
        return original(model, model_id, adapter_name, *a, **kw)
    known = ("subfolder", "revision", "cache_dir", "token", "use_auth_token")
    config.file = LoraConfig.from_pretrained(model_id, **{key: kw[key] for key in known if key in kw})
    try:
        return original(model, model_id, adapter_name, *a, **kw)
    finally:
        config.file = None


def load_adapter(original: Original, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.load_adapter`: as PEFT would load it, since transformers' own way knows stacked weights only.

    Returns:
        transformers' `LoadStateDictInfo`.

    Raises:
        ValueError: the adapter's name is taken, or there is nothing to load.
        ConfigError: `hotswap`.
    """
    from transformers.modeling_utils import LoadStateDictInfo

    given = call_arguments(original, model, args, kwargs)
    hotswap, peft_config = given["hotswap"], given["peft_config"]
    if hotswap is True or (hotswap == "auto" and getattr(model, "_hotswap_enabled", False)):
        refuse_hotswap(original)
    name = given["adapter_name"] or "default"
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
    load_config = given.get("load_config")
    where = given["peft_model_id"] or getattr(load_config, "pretrained_model_name_or_path", None)
    download = dict(getattr(load_config, "download_kwargs", None) or {}) | given.get("kwargs", {})
    download |= given["adapter_kwargs"] or {}
    known = ("cache_dir", "force_download", "token", "revision", "subfolder")
    download = {key: value for key, value in download.items() if key in known and value is not None}
    if given["local_files_only"]:
        download["local_files_only"] = True
    if where is None and (peft_config is None or given["adapter_state_dict"] is None):
        raise ValueError("pass a peft_model_id, or a peft_config and an adapter_state_dict")
    if isinstance(peft_config, dict):
        peft_config = PeftConfig.from_peft_type(**peft_config)
    config: Any = peft_config or PeftConfig.from_pretrained(where, **download)
    config.inference_mode = not given["is_trainable"]
    tensors = given["adapter_state_dict"] or load_peft_weights(where, device="cpu", **download)
    inject_adapter_in_model(config, model, name)
    setattr(model, "_hf_peft_config_loaded", True)  # noqa: B010 - as transformers' own method sets it
    result = set_peft_model_state_dict(model, tensors, name)
    if not given["is_trainable"]:
        model.eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.requires_grad_(False)
    # Its fields differ from release to release; those that are not set here stay empty.
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    info = {each.name: empty.get(each.name, set()) for each in fields(LoadStateDictInfo)}
    info["missing_keys"] = {key for key in result.missing_keys if ".lora_" in key and f".{name}" in key}
    info["unexpected_keys"] = set(result.unexpected_keys)
    return LoadStateDictInfo(**info)
