"""Adapter files as stock PEFT reads them, both ways.

Where PEFT on transformers 5 reads it, the layout is the one that PEFT wrote when experts were separate linears, with
names as in the model's own checkpoint: `...block_sparse_moe.experts.3.w1.lora_A.weight`. PEFT on transformers 4, vLLM
and llama.cpp's converter read it too. Where it does not, it is PEFT's own for stacks (see `stock_layout`).
Only adapter tensors are written: PEFT by itself copies a whole output head in when the head is a target.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from expertune.adapt.factors import AdapterFactors, PerExpert, factors_of
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.targets_in_file import require_named
from expertune.adapt.validation import require_valid_config, require_valid_tensors
from expertune.checkpoint.adapter_folder import CONFIG_NAME, LIVE_NAME, SETTINGS, SETTINGS_KEY, WEIGHTS_NAME
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import read_metadata
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.config import LoraSection
from expertune.config.messages import what_is_wrong
from expertune.errors import CheckpointError
from expertune.storage import write_json

# Of adapters that have them. One with `init` began as a correction of the 4-bit base, and is right on that alone.
FURTHER_SETTINGS = ("experts", "expert_rank", "init")

# In the metadata of the weights' file, as JSON: the run's own settings, and the fingerprint of the base model.
_BASE_KEY = "expertune.base"

_COPIES = (".base_layer.weight", "lm_head.weight", "embed_tokens.weight")


def settings_of(lora: LoraSection) -> dict[str, Any]:
    """What of a run file's section an adapter's files keep, as plain values; see `read_adapter_settings`."""
    lora = lora.in_files
    without = {"init"} if lora.init == "default" else set()
    further = lora.model_dump(include=set(FURTHER_SETTINGS) - without, exclude_none=True)
    return {key: getattr(lora, key) for key in SETTINGS} | further


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from.

    Attributes:
        base_model: what `adapter_config.json` names as the base: hub id or path.
        revision: commit of the base.
        settings: see `read_adapter_settings`.
    """

    base_model: str
    revision: str | None
    settings: dict[str, Any]


@torch.no_grad()
def write_adapter(
    folder: str | Path,
    tensors: list[Outgoing],
    config: dict[str, Any],
    base: Fingerprint | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, each beside itself and then renamed.

    What other readers know nothing of goes into the metadata of the weights' file, which they pass over; PEFT takes no
    key that it does not know in `adapter_config.json`.

    Args:
        folder: where to; made where it is not there.
        tensors: see `expertune.adapt.live.LiveAdapter.in_file`. The same tensors give the same bytes.
        config: content of `adapter_config.json`.
        base: the base model.
        settings: see `read_adapter_settings`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notes = {_BASE_KEY: base.to_json() if base else None, SETTINGS_KEY: settings}
    metadata = {key: json.dumps(note, sort_keys=True, separators=(",", ":")) for key, note in notes.items() if note}
    write_tensors(folder / WEIGHTS_NAME, tensors, metadata)
    write_json(folder / CONFIG_NAME, config)


def read_adapter_base(folder: str | Path) -> Fingerprint | None:
    """The base model that an adapter was trained on; None where its files do not name it.

    Raises:
        CheckpointError: the file is missing or damaged; see also `Fingerprint.from_json`.
    """
    return Fingerprint.from_json(_read_note(folder, _BASE_KEY), f"{Path(folder) / WEIGHTS_NAME}: {_BASE_KEY}")


def stock_config(origin: Origin, stock: StockLayout) -> dict[str, Any]:
    """An `adapter_config.json` that every PEFT since 0.10 reads: essential keys only, dropout 0.

    Dropout only acts in training, and stock PEFT refuses any other value on fused experts, even to infer.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.base_model,
        "revision": origin.revision,
        **stock.config,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_version": peft.__version__,
    }


@dataclass
class AdapterFile:
    """The content of an adapter folder.

    Attributes:
        config: `adapter_config.json`.
        tensors: tensors by name on disk.
        settings: see `read_adapter_settings`.
        live: see `expertune.adapt.live.LiveAdapter.write_factors`.
        where: the folder, for errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any] | None
    live: dict[str, Tensor]
    where: str

    @property
    def selected(self) -> Mapping[str, Sequence[int]]:
        """The experts of each layer that have an adapter, by the layer's name; empty where all have one."""
        experts = (self.settings or {}).get("experts")
        return experts.layers if experts else {}

    def per_expert(self, names: NameMap) -> PerExpert:
        """The tensors under per-expert names; see `PerExpert`.

        Raises:
            CheckpointError: see `PerExpert`; or the config does not name a module that has tensors.
        """
        plain = PerExpert(self.config, self.tensors, names, self.where)
        require_named(self.config, plain.modules, names, self.where, plain.is_plain)
        return plain

    def factors(self, names: NameMap) -> AdapterFactors:
        """Its factors by live modules; see `read_factors`.

        Raises:
            CheckpointError: see `read_factors` and `per_expert`.
        """
        return factors_of(self.per_expert(names), names, self.selected)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter folder.

    Raises:
        CheckpointError: see `read_adapter_config` and `read_adapter_tensors`; or the two are not of one adapter.
    """
    config, tensors = read_adapter_config(folder), read_adapter_tensors(folder)
    live = Path(folder) / LIVE_NAME
    try:
        factors = load_file(live) if live.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{live}: damaged ({error})") from None
    settings = read_adapter_settings(folder)
    if settings is not None and (config.get("use_rslora") or config["lora_alpha"] != config["r"]):
        found, meant = (
            f"r {config['r']} and lora_alpha {config['lora_alpha']:g}",
            "an r and a lora_alpha that are equal",
        )
        if config.get("use_rslora"):
            found, meant = "use_rslora true", "use_rslora false"
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} has {found}, and its tensors were written for {meant}, with the scale in B: "
            "these are files of two adapters, or one was changed; copy the adapter again"
        )
    return AdapterFile(config, tensors, settings, factors, str(folder))


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not a LoRA with one pair of factors per projection.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_NAME} here; is it an adapter folder?")
    config = read_mapping(path, fix="copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be read")
    for key in ("modules_to_save", "alora_invocation_tokens", "layers_to_transform"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is set, which Expertune does not read")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only adapters without trained biases can be read")
    require_valid_config(path, config)
    return config


def read_adapter_settings(folder: str | Path) -> dict[str, Any] | None:
    """The settings of the run that wrote an adapter, where the file has them: r, alpha, rslora and patterns.

    With them which experts have an adapter (`experts`), how their ranks were chosen, and what the adapter began as
    (`init`), where that was set.

    In `adapter_config.json` the scale is in B, and a rank may be filled up with zeros; these are what it was trained
    with, as keys of the run file's `lora:` section.

    Raises:
        CheckpointError: the file is damaged.
    """
    values = _read_note(folder, SETTINGS_KEY)
    if not isinstance(values, dict) or values.keys() - set(FURTHER_SETTINGS) != set(SETTINGS):
        return None
    try:
        further = LoraSection.model_validate({key: values[key] for key in FURTHER_SETTINGS if key in values})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))[:60]
        path = Path(folder) / WEIGHTS_NAME
        raise CheckpointError(f"{path}: its settings are damaged at {key}: {what_is_wrong(problem)}") from None
    if further.init == "pissa":
        raise CheckpointError(
            f"{Path(folder) / WEIGHTS_NAME}: its settings are damaged at init: files of lora.init: pissa hold an "
            "ordinary adapter"
        )
    values |= {key: getattr(further, key) for key in FURTHER_SETTINGS if key in values}
    named = {"lora_alpha": values["alpha"], "use_rslora": values["rslora"]}
    require_valid_config(Path(folder) / WEIGHTS_NAME, values | named)
    return values


def _read_note(folder: str | Path, key: str) -> Any:
    """What the metadata of the weights' file has under a key; None where it has nothing that is JSON."""
    try:
        return json.loads(read_metadata(Path(folder) / WEIGHTS_NAME).get(key, "null"))
    except (ValueError, RecursionError):
        return None


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder by name on disk.

    Copies of frozen weights, which PEFT adds when the output head is a target, are left out.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS_NAME} here (pickled adapters are never loaded)")
    try:
        tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(_COPIES)}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    require_valid_tensors(path, tensors)
    return tensors
