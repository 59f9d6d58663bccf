"""Adapters that PEFT's own calls have put on 4-bit experts into files that stock PEFT reads.

The library's own function writes first: trained copies, embeddings, a model card. The adapter's two files are then
written again, as `expertune.adapt.file_layout` lays them out for this family. Each public function takes the place of a
library's (see `expertune.registration`) and is given that function first.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.adapt.factors import PREFIX, split_key
from expertune.adapt.files import write_adapter
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.live import LiveAdapter, base_of, call_arguments, names_of
from expertune.adapt.scales import dtype_in_file, fold
from expertune.adapt.stacks import pad
from expertune.adapt.stock.config import StockLoraConfig
from expertune.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.writer import Outgoing
from expertune.experts.lora import ExpertLoraConfig, ExpertsLora, projection_of

Original = Callable[..., Any]


def adapter_state_dict(
    original: Original,
    kind: type[LoraModel],
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """`LoraModel._get_adapter_state_dict`: tensors under the checkpoint's names, which still hold the adapter's."""
    held = original(kind, model, config, adapter_name, **kwargs)
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
            which, _, stack = factor.partition(f".{adapter_name}.")
            for expert, matrix in zip(layer.experts_of(adapter_name, stack), tensor, strict=True):
                expert_name = names.expert_on_disk(module, expert, projection_of(stack))
                ending = "" if which == "magnitude_vector" else ".weight"
                out[f"{prefix}{expert_name}.lora_{which}.{adapter_name}{ending}"] = matrix
        elif layer is not None:
            out[f"{prefix}{names.on_disk(module)}.lora_{factor}"] = tensor
        else:
            out[key] = tensor
    return out


def save_peft_model(original: Original, model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`: the adapter's files are what stock PEFT reads of this family."""
    original(model, *args, **kwargs)
    given = call_arguments(original, model, args, kwargs)
    if type(model).save_pretrained is not PeftModel.save_pretrained or not given.get("is_main_process", True):
        return
    for adapter in given.get("selected_adapters") or list(model.peft_config):
        folder = Path(given["save_directory"]) / (adapter if adapter != "default" else "")
        _write_again(model.get_base_model(), model.peft_config[adapter], adapter, folder)


def save_pretrained(original: Original, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained` where transformers itself has put an adapter on the model."""
    original(model, *args, **kwargs)
    given = call_arguments(original, model, args, kwargs)
    if getattr(model, "_hf_peft_config_loaded", False) and given.get("is_main_process", True):
        adapter = model.active_adapters()[0]
        _write_again(model, model.peft_config[adapter], adapter, Path(given["save_directory"]))


def _write_again(base: PreTrainedModel, config: Any, adapter: str, folder: Path) -> None:
    if not isinstance(config, StockLoraConfig):
        return
    # Whatever is no factor of a matrix: trained copies, embeddings and their factors.
    rest = {key: tensor for key, tensor in load_file(folder / WEIGHTS_NAME).items() if not split_key(key)[1]}
    settings = config.settings()
    live = LiveAdapter(base, config.names, adapter)
    layout, embeddings = live.layout(settings), live.embeddings
    tensors = live.in_file(layout)
    for key, tensor in rest.items():
        name, _, factor = key.removeprefix(PREFIX).rpartition(".lora_embedding_")
        tensors.append(
            _factor_in_file(key, tensor, factor, layout, embeddings[name][1].scaling[adapter])
            if name in embeddings
            else Outgoing(key, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        )
    ranks = {re.escape(live): layer.r[adapter] for live, layer in embeddings.values()}
    own_ranks = {name: rank for name, rank in ranks.items() if rank > layout.r}
    layout = replace(layout, rank_pattern=own_ranks | layout.rank_pattern)
    values = config.in_file() | {"target_parameters": None} | layout.config
    # These name the model's class where no task_type does; the library has written them.
    values["auto_mapping"] = read_mapping(folder / CONFIG_NAME, fix="save the adapter again").get("auto_mapping")
    values["target_modules"] = sorted({*layout.target_modules, *config.other_names()})
    write_adapter(folder, sorted(tensors, key=lambda each: each.name), values, settings=settings)


def _factor_in_file(key: str, tensor: Tensor, factor: str, layout: StockLayout, scale: float) -> Outgoing:
    """A [r, V] or B [D, r] of an embedding, by the rule of all factors: no smaller than the file's `r`, the scale in B.

    The file's alpha is its `r`, so that what multiplies the update there is r / rank.
    """
    dim = 0 if factor == "A" else 1
    rank = max(tensor.shape[dim], layout.r)
    by = scale * rank / layout.r if factor == "B" else 1.0
    shape = (rank, tensor.shape[1]) if factor == "A" else (tensor.shape[0], rank)
    return Outgoing(key, dtype_in_file(tensor.dtype, by), shape, lambda: fold(pad(tensor, rank, dim), by))
