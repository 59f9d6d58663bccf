"""Files of an adapter that PEFT's own calls have put on 4-bit experts: what the library writes, made what it reads.

The library's own function writes first: trained copies, embeddings, a model card. The adapter's two files are then
written again, as `expertune.adapt.files` lays them out for this family.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from expertune.adapt.factors import PREFIX, dtype_in_file, fold, pad, split_key
from expertune.adapt.files import live_targets, tensors_in_file, write_adapter
from expertune.adapt.stock_config import StockLoraConfig
from expertune.adapt.stock_layout import stock_layout
from expertune.adapt.stock_trial import StockLayout
from expertune.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.writer import Outgoing

Original = Callable[..., Any]


def save_peft_model(original: Original, model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`: the adapter's files are what stock PEFT reads of this family."""
    original(model, *args, **kwargs)
    given = _given(original, model, args, kwargs)
    if type(model).save_pretrained is not PeftModel.save_pretrained or not given.get("is_main_process", True):
        return
    for adapter in given.get("selected_adapters") or list(model.peft_config):
        folder = Path(given["save_directory"]) / (adapter if adapter != "default" else "")
        _write_again(model.get_base_model(), model.peft_config[adapter], adapter, folder)


def save_pretrained(original: Original, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained` where transformers itself has put an adapter on the model."""
    original(model, *args, **kwargs)
    given = _given(original, model, args, kwargs)
    if getattr(model, "_hf_peft_config_loaded", False) and given.get("is_main_process", True):
        adapter = model.active_adapters()[0]
        _write_again(model, model.peft_config[adapter], adapter, Path(given["save_directory"]))


def _given(original: Original, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(original).bind(model, *args, **kwargs).arguments)


def _write_again(base: PreTrainedModel, config: Any, adapter: str, folder: Path) -> None:
    if not isinstance(config, StockLoraConfig):
        return
    # Whatever is no factor of a matrix: trained copies, embeddings and their factors.
    rest = {key: tensor for key, tensor in load_file(folder / WEIGHTS_NAME).items() if not split_key(key)[1]}
    settings = config.settings()
    layout = stock_layout(base, config.names, live_targets(base, adapter), settings["r"], settings["rank_pattern"])
    tensors = tensors_in_file(base, config.names, adapter, layout)
    embeddings = _embeddings(base, config, adapter)
    for key, tensor in rest.items():
        name, _, factor = key.removeprefix(PREFIX).rpartition(".lora_embedding_")
        tensors.append(
            _factor_in_file(key, tensor, factor, layout, embeddings[name][1].scaling[adapter])
            if name in embeddings
            else Outgoing(key, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        )
    ranks = {re.escape(live): layer.r[adapter] for live, layer in embeddings.values()}
    layout.rank_pattern = {name: rank for name, rank in ranks.items() if rank > layout.r} | layout.rank_pattern
    values = config.in_file() | {"target_parameters": None} | layout.config
    # By these the model's class is found where no task_type says it; the library knows it, and has written it.
    values["auto_mapping"] = read_mapping(folder / CONFIG_NAME, fix="save the adapter again").get("auto_mapping")
    values["target_modules"] = sorted({*layout.target_modules, *config.other_names()})
    write_adapter(folder, sorted(tensors, key=lambda each: each.name), values, settings=settings)


def _embeddings(base: PreTrainedModel, config: StockLoraConfig, adapter: str) -> dict[str, tuple[str, LoraLayer]]:
    """Name in the file of each embedding that an adapter is on -> its live name, and PEFT's layer."""
    return {
        config.names.on_disk(name): (name, layer)
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_embedding_A
    }


def _factor_in_file(key: str, tensor: Tensor, factor: str, layout: StockLayout, scale: float) -> Outgoing:
    """A [r, V] or B [D, r] of an embedding, by the rule of all factors: no smaller than the file's `r`, the scale in B.

    The file's alpha is its `r`, so that what multiplies the update there is r / rank.
    """
    dim = 0 if factor == "A" else 1
    rank = max(tensor.shape[dim], layout.r)
    by = scale * rank / layout.r if factor == "B" else 1.0
    shape = (rank, tensor.shape[1]) if factor == "A" else (tensor.shape[0], rank)
    return Outgoing(key, dtype_in_file(tensor.dtype, by), shape, lambda: fold(pad(tensor, rank, dim), by))
