"""What PEFT's and transformers' adapter calls do on a model with 4-bit experts (see `expertune.registration`).

Each function here takes the place of a library's for such a model; its first argument is that function. An adapter of
such a model has an `ExpertLoraConfig`, made from the user's `LoraConfig`, so that `Nf4Experts` get `ExpertsLora` and
everything else gets PEFT's own layers, by the names of the live model. Files have the checkpoint's names.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from expertune.adapt.attach import without_adapters
from expertune.adapt.factors import PREFIX, AdapterFactors, Factors, read_factors, split_key, unfold
from expertune.adapt.stock_config import StockLoraConfig
from expertune.adapt.stock_targets import (
    exact_names,
    rank_by_patterns,
    read_targets,
    refuse_other_methods,
    refuse_whole_experts,
    require_possible,
    with_fields,
)
from expertune.checkpoint.names import NameMap
from expertune.errors import CheckpointError, ConfigError, ExportError
from expertune.experts.lora import NO_MERGE, ExpertLoraConfig, ExpertsLora, Ranks
from expertune.experts.module import Nf4Experts

Original = Callable[..., Any]


class ExpertLoraModel(LoraModel):
    """PEFT's tuner, in what it does otherwise where `ExpertsLora` is among its layers."""

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused where one of the adapters is on experts: PEFT would mix the other layers and leave these out.

        Raises:
            ExportError: it is.
        """
        self._refuse_on_experts(
            adapters,
            "add_weighted_adapter does not mix adapters of 4-bit experts; set both active with "
            "base_model.set_adapter([...]), which adds them up, or mix them on the 16-bit model",
        )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        self._refuse_on_experts(self.active_adapters, NO_MERGE)
        super()._check_merge_allowed()

    def _refuse_on_experts(self, adapters: list[str], message: str) -> None:
        for module in self.model.modules():
            if isinstance(module, ExpertsLora) and any(adapter in module.lora_A for adapter in adapters):
                raise ExportError(message)

    def _inject_parameters(self, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> list[str]:
        # PEFT has no dropout on a wrapped parameter; the other layers of the adapter keep theirs.
        dropout, peft_config.lora_dropout = peft_config.lora_dropout, 0.0
        try:
            return super()._inject_parameters(peft_config, *args, **kwargs)
        finally:
            peft_config.lora_dropout = dropout


# ---- new adapters


def inject_adapter(
    original: Original, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """`BaseTuner.inject_adapter`: experts that a LoraConfig names get `ExpertsLora`.

    Raises:
        ConfigError: the experts cannot have what the config asks for, the method is none that can adapt them, or the
            model is a PeftModel itself.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "this model is a PeftModel already, and on 4-bit experts no second one goes around it: add an adapter "
            "with model.add_adapter('second', config), or take the first one off with model.unload()"
        )
    config, names = tuner.peft_config[adapter_name], names_of(model)
    if type(tuner) is LoraModel:
        tuner.__class__ = ExpertLoraModel
    if isinstance(tuner, ExpertLoraModel) and not isinstance(config, ExpertLoraConfig):
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is not None:
            # Only its names count, which say what is adapted.
            adapted = _adapted_names(config, state_dict, names)
            config = with_fields(config, LoraConfig, {"target_modules": adapted, "target_parameters": None})
        config = tuner._prepare_adapter_config(config, BaseTuner.get_model_config(model))
        tuner.peft_config[adapter_name] = _live_config(model, names, config)
    elif not isinstance(tuner, ExpertLoraModel):
        with without_adapters(model):
            refuse_whole_experts(model, names, config)
            refuse_other_methods(model, names, config, tuner)
    with warnings.catch_warnings():
        # PEFT looks for patterns among modules alone; those of wrapped parameters are used all the same.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match any")
        original(tuner, model, adapter_name, *args, **kwargs)
    if getattr(model, "hf_quantizer", None) is not None:
        setattr(model.hf_quantizer, "has_adapters", True)  # noqa: B010 - a module to the type checker


def _live_config(model: nn.Module, names: NameMap, config: LoraConfig) -> LoraConfig:
    with without_adapters(model):
        refuse_whole_experts(model, names, config)
        targets = read_targets(model, names, config)
    if targets.experts:
        require_possible(config)
    if not (targets.experts or targets.router):
        # PEFT's own matter, its own message where nothing fits included.
        return config
    live = with_fields(config, StockLoraConfig, exact_names(targets, config))
    assert isinstance(live, StockLoraConfig)
    live.expert_ranks = {
        module: {projection: (rank.rank, rank.alpha) for projection, rank in ranks.items()}
        for module, ranks in targets.experts.items()
    }
    live.remember(targets, names, config)
    return live


def names_of(model: nn.Module) -> NameMap:
    """The name map that was stored on a model when it got its 4-bit experts, whatever is wrapped around it.

    Raises:
        ConfigError: the model was built by hand.
    """
    names = getattr(base_of(model), "nf4_names", None)
    if not isinstance(names, NameMap):
        raise ConfigError(
            f"{type(model).__name__} holds 4-bit experts but was not loaded by expertune or from an NF4 folder"
        )
    return names


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def convert_config(original: Original, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
    """`convert_peft_config_for_transformers`: nothing, since 4-bit experts are no stacked parameters."""


# ---- files into adapters


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
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    words = (peft_config.file or peft_config.asked) if isinstance(peft_config, StockLoraConfig) else peft_config
    pairs = {key: tensor for key, tensor in adapter_state_dict.items() if split_key(key)[1]}
    factors = read_factors(words.to_dict(), pairs, names, f"adapter {adapter_name!r}")
    _fit(base, layers, adapter_name, peft_config, factors)
    # Trained copies, magnitudes and the like are PEFT's own matter.
    live = {names.on_disk(name): name for name in layers}
    embeddings = {
        names.on_disk(name): (name, module)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_embedding_A
    }
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
    for name, projections in factors.experts.items():
        experts = layers[name]
        assert isinstance(experts, ExpertsLora)
        for projection, pair in projections.items():
            scale = experts.scale(adapter_name, projection)
            out[f"{PREFIX}{name}.lora_A.{projection}"] = pair.a
            out[f"{PREFIX}{name}.lora_B.{projection}"] = _at_scale(pair, scale)
    return out


def _at_scale(pair: Factors, scale: float) -> Tensor:
    """B by which a layer of this scale computes what the file says."""
    return unfold(pair.b, scale / pair.scale, pair.b.dtype) if scale and pair.scale else pair.b


def _embedding_at_scale(words: LoraConfig, keys: list[str], b: Tensor, scale: float) -> Tensor:
    """B [D, r] of an embedding, by which a layer of this scale computes what the file says."""
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
            raise CheckpointError(
                f"the file holds an adapter of {name}, which its config does not name; is it this adapter's config?"
            )
        for projection, pair in projections.items():
            rank = pair.a.shape[1]
            alpha = pair.scale * (math.sqrt(rank) if config.use_rslora else rank)
            held.setdefault(name, {})[projection] = (rank, alpha)
    is_untrained = _is_untrained(layers.values(), adapter)
    for name, layer in layers.items():
        if isinstance(layer, ExpertsLora):
            live = layer.ranks[adapter]
            same = {key: rank for key, (rank, _) in live.items()} == {k: r for k, (r, _) in held.get(name, {}).items()}
            if live == held.get(name) or (same and not is_untrained):
                continue
        elif name in factors.linears or _leaf_on_disk(names, name) not in names.projection_names.values():
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


def _leaf_on_disk(names: NameMap, name: str) -> str:
    return names.on_disk(name).rpartition(".")[2]


def _is_untrained(layers: Iterable[LoraLayer], adapter: str) -> bool:
    """Whether every factor B of an adapter is zero, so that it has no effect yet."""
    factors = [factor for layer in layers for factor in layer.lora_B[adapter].parameters()]
    return all(factor.is_meta or not factor.any() for factor in factors)


def _adapted_names(config: LoraConfig, state_dict: dict[str, Tensor], names: NameMap) -> list[str]:
    pairs = {key: tensor for key, tensor in state_dict.items() if split_key(key)[1]}
    factors = read_factors(config.to_dict(), pairs, names, "state_dict")
    experts = (
        f"{module}.{names.projection_names[projection]}"
        for module, held in factors.experts.items()
        for projection in held
    )
    return [*factors.linears, *experts]


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


def load_adapter(
    original: Original,
    model: nn.Module,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: PeftConfig | dict[str, Any] | None = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    local_files_only: bool = False,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: Any = None,
    **kwargs: Any,
) -> Any:
    """`PreTrainedModel.load_adapter`: as PEFT would load it, since transformers' own way knows stacked weights only.

    Returns:
        transformers' `LoadStateDictInfo`.

    Raises:
        ValueError: the adapter's name is taken, or there is nothing to load.
        ConfigError: `hotswap`.
    """
    from transformers.modeling_utils import LoadStateDictInfo

    if hotswap is True or (hotswap == "auto" and getattr(model, "_hotswap_enabled", False)):
        refuse_hotswap(original)
    name = adapter_name or "default"
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
    where = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    download = dict(getattr(load_config, "download_kwargs", None) or {}) | kwargs | (adapter_kwargs or {})
    known = ("cache_dir", "force_download", "token", "revision", "subfolder")
    download = {key: value for key, value in download.items() if key in known and value is not None}
    if local_files_only:
        download["local_files_only"] = True
    if where is None and (peft_config is None or adapter_state_dict is None):
        raise ValueError("pass a peft_model_id, or a peft_config and an adapter_state_dict")
    given = PeftConfig.from_peft_type(**peft_config) if isinstance(peft_config, dict) else peft_config
    config: Any = given or PeftConfig.from_pretrained(where, **download)
    config.inference_mode = not is_trainable
    tensors = adapter_state_dict or load_peft_weights(where, device="cpu", **download)
    inject_adapter_in_model(config, model, name)
    setattr(model, "_hf_peft_config_loaded", True)  # noqa: B010 - as transformers' own method sets it
    result = set_peft_model_state_dict(model, tensors, name)
    if not is_trainable:
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


# ---- adapters into files


def adapter_state_dict(
    original: Original,
    kind: type[LoraModel],
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    unwanted_adapter_names: list[str],
) -> dict[str, Tensor]:
    """`LoraModel._get_adapter_state_dict`: tensors under the checkpoint's names, which still hold the adapter's."""
    held = original(kind, model, config, adapter_name, state_dict, unwanted_adapter_names)
    if not isinstance(config, ExpertLoraConfig):
        return held
    names, base = names_of(model), base_of(model)
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    out = {}
    for key, tensor in held.items():
        module, _, factor = key.removeprefix(prefix).rpartition(".lora_")
        layer = layers.get(module)
        if isinstance(layer, ExpertsLora):
            which, _, projection = factor.partition(f".{adapter_name}.")
            for expert, matrix in enumerate(tensor):
                expert_name = names.expert_on_disk(module, expert, projection)
                out[f"{prefix}{expert_name}.lora_{which}.{adapter_name}.weight"] = matrix
        elif layer is not None:
            out[f"{prefix}{names.on_disk(module)}.lora_{factor}"] = tensor
        else:
            out[key] = tensor
    return out


# ---- the rest


def num_parameters(original: Original, model: PeftModel) -> tuple[int, int]:
    """`PeftModel.get_nb_trainable_parameters`: with the weights of 4-bit experts, not the bytes that hold them."""
    trainable, everything = original(model)
    for module in model.modules():
        if isinstance(module, Nf4Experts):
            stored = sum(stack.packed.numel() for stack in (module.gate_up, module.down))
            everything += module.spec.num_parameters - stored
    return trainable, everything


def refuse_hotswap(original: Original, *args: Any, **kwargs: Any) -> None:
    """Hotswapping pads ranks and copies layer by layer, which it knows of linears only.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "hotswap: adapters of 4-bit experts cannot be swapped in place; load the other adapter under a name of its own "
        "with load_adapter, and switch with set_adapter"
    )
