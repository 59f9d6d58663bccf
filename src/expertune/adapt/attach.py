"""Attach LoRA as the run file says: resolve names, build the PeftModel, start from an existing adapter if asked."""

import re
from typing import Any

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES

from expertune.adapt.files import load_adapter_tensors, read_adapter_config, read_adapter_tensors, stock_config
from expertune.adapt.peft_model import ExpertPeftModel, leaf_is_rewritten
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import ResolvedTargets, resolve_targets
from expertune.config import LoraSection
from expertune.errors import ConfigError
from expertune.experts.lora import ExpertLoraConfig


def attach(
    loaded: LoadedModel,
    lora: LoraSection,
    base_model: str,
    revision: str | None = None,
    adapter_name: str = "default",
    onto: ExpertPeftModel | None = None,
) -> ExpertPeftModel:
    """Attach an adapter to a loaded model.

    Args:
        loaded: the base model with 4-bit experts, and its names.
        lora: the run file's adapter section.
        base_model: what `adapter_config.json` names as the base: hub id or path.
        revision: commit of the base.
        adapter_name: name of the adapter.
        onto: a model that already has adapters; None makes a new one.

    Raises:
        ConfigError: a target fits nothing, or `init_from` disagrees with a value that the run file sets.
        CheckpointError: `init_from` is no adapter of this model.
    """
    if lora.init_from:
        lora = adopt(lora)
    targets = resolve_targets(loaded.model, loaded.names, lora)
    config = _live_config(targets, lora)
    stock = stock_config(
        r=lora.r,
        alpha=lora.alpha,
        target_modules=sorted(_names_on_disk(targets, loaded.names)),
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        rslora=lora.rslora,
        base_model=base_model,
        revision=revision,
    )
    dtype = torch.bfloat16 if lora.dtype == "bfloat16" else torch.float32
    if onto is None:
        model = ExpertPeftModel(loaded.model, targets, config, stock, loaded.names, adapter_name, dtype)
    else:
        model = onto
        model.attach(adapter_name, targets, config, stock, dtype)
    if lora.init_from:
        tensors = read_adapter_tensors(lora.init_from)
        load_adapter_tensors(loaded.model, loaded.names, adapter_name, tensors, where=lora.init_from)
    return model


def adopt(lora: LoraSection) -> LoraSection:
    """The adapter section with the shape of the adapter at `init_from`.

    Raises:
        ConfigError: the run file sets a value that the adapter contradicts.
        CheckpointError: the folder is no adapter.
    """
    assert lora.init_from is not None
    stock = read_adapter_config(lora.init_from)
    found: dict[str, Any] = {
        "r": stock["r"],
        "alpha": stock["lora_alpha"],
        "targets": stock["target_modules"],
        "rank_pattern": stock.get("rank_pattern") or {},
        "alpha_pattern": stock.get("alpha_pattern") or {},
        "rslora": bool(stock.get("use_rslora")),
    }
    for key in ("r", "alpha", "rslora"):
        if key in lora.model_fields_set and getattr(lora, key) != found[key]:
            raise ConfigError(
                f"lora.{key} is {getattr(lora, key)}, but the adapter at {lora.init_from} has {found[key]}; "
                "remove the key to take the adapter's"
            )
    return lora.model_copy(update=found)


def _live_config(targets: ResolvedTargets, lora: LoraSection) -> ExpertLoraConfig:
    plain = [name for name in targets.linears if not leaf_is_rewritten(name)]
    matched = [*plain, *targets.experts]
    config = ExpertLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=matched or DUMMY_TARGET_MODULES,
        rank_pattern={re.escape(name): rank.rank for name, rank in targets.linears.items() if rank.rank != lora.r},
        alpha_pattern={
            re.escape(name): rank.alpha for name, rank in targets.linears.items() if rank.alpha != lora.alpha
        },
        use_rslora=lora.rslora,
        bias="none",
    )
    config.expert_ranks = {
        module: {projection: (rank.rank, rank.alpha) for projection, rank in projections.items()}
        for module, projections in targets.experts.items()
    }
    return config


def _names_on_disk(targets: ResolvedTargets, names: NameMap) -> set[str]:
    """Projection names as PEFT's `target_modules` has them: the last part of each name on disk."""
    modules = [*targets.linears, *targets.router]
    leaves = {names.on_disk(name).rpartition(".")[2] for name in modules}
    return leaves | {names.projection_names[p] for projections in targets.experts.values() for p in projections}
