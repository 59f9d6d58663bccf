"""The live configuration of an adapter that PEFT's own calls put on 4-bit experts, and what is written of it."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from expertune.adapt.patterns import by_pattern, leaves, settings
from expertune.adapt.stock.targets import StockTargets
from expertune.checkpoint.adapter_folder import CONFIG_NAME
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank
from expertune.experts.lora import ExpertLoraConfig
from expertune.storage import write_json


class StockLoraConfig(ExpertLoraConfig):
    """An `ExpertLoraConfig` made from a user's LoraConfig, and written in the checkpoint's words.

    `asked` is the user's, or that of the file that the adapter came from; `file` is the config of a file while it is
    read into the adapter.
    """

    file: LoraConfig | None = None

    def remember(self, targets: StockTargets, names: NameMap, asked: LoraConfig) -> None:
        """Keep what it was made from."""
        self.targets, self.names, self.asked = targets, names, asked

    def keep(self, modules: set[str]) -> None:
        """Forget targets that the adapter has no layer for."""
        targets = self.targets
        for kind in (targets.linears, targets.others, targets.experts):
            for name in set(kind) - modules:
                del kind[name]
        self.expert_ranks = {name: ranks for name, ranks in self.expert_ranks.items() if name in targets.experts}
        for name, ranks in self.expert_ranks.items():
            targets.experts[name] = {projection: Rank(*rank) for projection, rank in ranks.items()}
        self.target_modules = {*targets.linears, *targets.others, *targets.experts}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, beside itself and then renamed."""
        values = self.in_file()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(save_directory) / CONFIG_NAME, values)

    def in_file(self) -> dict[str, Any]:
        """The config with names on disk, and without dropout, which stock PEFT refuses on experts even to infer."""
        settings = self.settings()
        return self.asked.to_dict() | {
            "target_modules": sorted({*leaves(name for name, _ in self._on_disk().values()), *self.other_names()}),
            "target_parameters": list(self.targets.parameters) or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": settings["rank_pattern"],
            "alpha_pattern": settings["alpha_pattern"],
            "base_model_name_or_path": self.base_model_name_or_path,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def settings(self) -> dict[str, Any]:
        """Rank and alpha of everything, by patterns of names on disk, as `expertune.adapt.files.Origin` has them."""
        ranks = {pattern: rank for pattern, (_, rank) in self._on_disk().items()}
        return settings(Rank(self.r, self.lora_alpha), self.use_rslora, ranks)

    def other_names(self) -> list[str]:
        """Last parts of the names of what is neither a linear, a router nor an expert."""
        return leaves(self.names.on_disk(name) for name in self.targets.others)

    def _on_disk(self) -> dict[str, tuple[str, Rank]]:
        modules = self.targets.linears | self.targets.others | self.targets.router
        return by_pattern(self.names, modules, self.targets.experts)


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """Rank and alpha of an adapter that is not on experts, in a run file's words."""
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
    }


def exact_names(targets: StockTargets, default: Rank) -> dict[str, Any]:
    """Keys of a LoraConfig of this rank and alpha by which PEFT finds these targets and no others, at their own."""
    modules = targets.linears | targets.others
    parameters = {f"{name}.weight": rank for name, rank in targets.router.items()} | targets.parameters
    everything = modules | parameters
    return {
        "target_modules": [*modules, *targets.experts],
        "target_parameters": list(parameters) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {re.escape(name): own.rank for name, own in everything.items() if own.rank != default.rank},
        "alpha_pattern": {re.escape(name): own.alpha for name, own in everything.items() if own.alpha != default.alpha},
    }


def with_fields(config: LoraConfig, kind: type[LoraConfig], changes: dict[str, Any]) -> LoraConfig:
    """A config as one of another class, with some fields changed."""
    values = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
    return kind(**(values | changes))
