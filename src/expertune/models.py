"""Models with 4-bit experts for a program of one's own: loaded, given an adapter, and used as any PeftModel is."""

from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import PreTrainedModel

from expertune.adapt import attach as adapters
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint import load
from expertune.checkpoint.hf_quantizer import as_loaded
from expertune.checkpoint.hub import fetch_model
from expertune.checkpoint.load import LoadedModel
from expertune.config import LoraSection, QuantizationConfig, parse_section
from expertune.errors import ConfigError
from expertune.placement.device import default_device, resolve_compute_dtype


class LoraOptions(TypedDict, total=False):
    """The keys of a run file's `lora:` section, with its defaults; see `expertune.config.LoraSection`."""

    r: int
    alpha: float
    dropout: float
    targets: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    dtype: str
    init_from: str | None
    init_from_other_base: bool


def load_model(
    model: str | Path,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model with its experts and decoder linears in 4 bits.

    Args:
        model: a directory or hub id: 16-bit, in bitsandbytes' nf4, in MXFP4, or an NF4 folder.
        dtype: of everything else and of all matrix products: `auto`, `bfloat16`, `float16` or `float32`.
        device: where the model lies; None means the current GPU, or the CPU.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python that ships with the model.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: the model is missing, damaged, or of no kind that is read.
    """
    device = default_device() if device is None else torch.device(device)
    source = fetch_model(str(model), revision, trust_remote_code)
    compute_dtype = resolve_compute_dtype(dtype, device)
    loaded = load.load_model(source.folder, QuantizationConfig(), compute_dtype, device, trust_remote_code)
    loaded.source = loaded.source or (str(model), source.revision)
    loaded.model.nf4_loaded = loaded
    return loaded.model


def attach(
    model: PreTrainedModel | ExpertPeftModel, adapter_name: str = "default", **lora: Unpack[LoraOptions]
) -> ExpertPeftModel:
    """Attach a new adapter to a model from `load_model`, or from `from_pretrained` of an NF4 folder.

    Args:
        model: the model, or one that has adapters already; the new one is then not active until `set_adapter`.
        adapter_name: the new adapter's name.
        **lora: keys of a run file's `lora:` section, e.g. `r=16, targets=["attention", "experts"]`.

    Raises:
        ConfigError: an unknown key, a wrong value, or a target that the model does not have.
    """
    loaded, onto = _loaded(model), model if isinstance(model, ExpertPeftModel) else None
    section = parse_section(LoraSection, dict(lora), "lora")
    return adapters.attach(loaded, section, loaded.model.config._name_or_path, None, adapter_name, onto)


def load_adapter(
    model: PreTrainedModel | ExpertPeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    other_base: bool = False,
) -> ExpertPeftModel:
    """Put a saved adapter on a model, in evaluation mode.

    Args:
        model: as for `attach`.
        folder: the adapter of a run (`runs/first/adapter`), one of its checkpoints, or a PEFT adapter of this model.
        adapter_name: the adapter's name in the model.
        other_base: take it though it was trained on another base model.

    Raises:
        CheckpointError: it is no adapter, is damaged, or was trained on another base model.
    """
    return attach(model, adapter_name, init_from=str(folder), init_from_other_base=other_base).eval()


def _loaded(model: Any) -> LoadedModel:
    base = model.get_base_model() if isinstance(model, ExpertPeftModel) else model
    loaded = getattr(base, "nf4_loaded", None)
    if isinstance(loaded, LoadedModel):
        return loaded
    try:
        return as_loaded(base)
    except ValueError:
        raise ConfigError(
            f"{type(model).__name__}: attach and load_adapter take a model from expertune.load_model, or "
            "from_pretrained of an NF4 folder"
        ) from None
