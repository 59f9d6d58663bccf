"""Models with 4-bit experts for a program of one's own: loaded, given an adapter, and used as any PeftModel is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import PreTrainedModel

from expertune.adapt import attach as adapters
from expertune.adapt.live import without_adapters
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint import load
from expertune.checkpoint.adapter_folder import require_adapter_folder
from expertune.checkpoint.formats.nf4_folder import CALIBRATED, Nf4Folder, is_nf4_folder, read_nf4_folder
from expertune.checkpoint.hf_quantizer import as_loaded
from expertune.checkpoint.hub import fetch_model
from expertune.checkpoint.load import LoadedModel, LoadOptions
from expertune.checkpoint.moments import Moments
from expertune.checkpoint.quantize import SourceOptions
from expertune.checkpoint.quantize import quantize as write_nf4_folder
from expertune.config import QuantizationConfig, parse_lora, parse_quantization
from expertune.config.arguments import checked
from expertune.errors import ConfigError
from expertune.placement.device import device_named, dtype_name, resolve_compute_dtype
from expertune.run.written import TO_LOAD, whole_adapter


class LoraOptions(TypedDict, total=False):
    """The keys of a run file's `lora:` section, with its defaults; see `expertune.config.LoraSection`."""

    r: int
    alpha: float
    dropout: float
    targets: list[str] | str
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    use_dora: bool
    dtype: str
    loraplus_lr_ratio: float | None
    experts: dict[str, Any] | None
    expert_rank: str | None
    init: str
    init_from: str | None
    init_from_other_base: bool


class QuantizeOptions(TypedDict, total=False):
    """How an NF4 folder is written; `quantize` says what they mean."""

    double_quantization: bool | None
    fit: str | None
    calibration: str | Path | None
    layers: dict[str, int] | None
    dtype: str | torch.dtype
    revision: str | None
    trust_remote_code: bool
    progress: Callable[[str, int, int], None] | None


class HeldOptions(TypedDict, total=False):
    """How a model in 16 bits is held in 4; `load_model` says what they mean."""

    scheme: str
    fit: str
    layers: dict[str, int] | None
    calibration: str | Path | None


@checked
def load_model(
    model: str | Path,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **held: Unpack[HeldOptions],
) -> PreTrainedModel:
    """Load a model with its experts and decoder linears in 4 bits.

    Args:
        model: a directory or hub id: 16-bit, in bitsandbytes' nf4, in MXFP4, or an NF4 folder.
        dtype: of everything else and of all matrix products: `auto`, `bfloat16`, `float16` or `float32`, by name, by a
            usual short name (`bf16`, `fp16`, `fp32`) or as torch has it.
        device: where the model lies; None means the current GPU, or the CPU.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python that ships with the model.
        **held: `scheme`, and of a model in 16 bits `fit`, how scales are chosen, and `layers`, which linears stay in 16
            bits, all as under `quantization` of a run file; `calibration`: for the fit `calibrated`, which it then is,
            the `calibration.safetensors` of a run of this model. An NF4 folder has its own: another is refused.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: the model is missing, damaged, or of no kind that is read;
            or a folder, and a revision is given.
    """
    device = device_named(device)
    compute_dtype = resolve_compute_dtype(dtype, device)
    _require_hub_id(model, revision)
    source = fetch_model(str(model), revision, trust_remote_code)
    asked, calibration = _how_held(held)
    moments = None if calibration is None else Moments.load(Path(calibration))
    if moments is not None and is_nf4_folder(source.folder):
        _require_calibration_of(source.folder, moments, calibration)
    options = LoadOptions(importance=moments)
    loaded = load.load_model(source.folder, asked, compute_dtype, device, trust_remote_code, options)
    loaded.source = loaded.source or (str(model), source.revision)
    loaded.model.nf4_loaded = loaded
    return loaded.model


@checked
def attach(
    model: PreTrainedModel | ExpertPeftModel, adapter_name: str = "default", **lora: Unpack[LoraOptions]
) -> ExpertPeftModel:
    """Attach a new adapter to a model from `load_model`, or from `from_pretrained` of an NF4 folder.

    Args:
        model: the model, or one that has adapters already; the new one is then not active until `set_adapter`.
        adapter_name: the new adapter's name.
        **lora: keys of a run file's `lora:` section, e.g. `r=16, targets=["attention", "experts"]`.

    Raises:
        ConfigError: an unknown key, a wrong value, a target that the model does not have, a name that is taken, or an
            `init_from` that is no folder or a run directory.
        CheckpointError: see `load_adapter`, of `init_from`.
    """
    loaded, onto = _loaded(model), model if isinstance(model, ExpertPeftModel) else None
    _require_free(adapter_name, loaded.model, onto)
    section = parse_lora(dict(lora))
    if section.loraplus_lr_ratio is not None:
        raise ConfigError(
            "lora.loraplus_lr_ratio is of a run's optimizer; make your own by "
            "peft.optimizers.create_loraplus_optimizer(model, ..., loraplus_lr_ratio=...)"
        )
    if section.init != "default":
        raise ConfigError(
            f"lora.init: {section.init} is made by a run (expertune.finetune), which keeps what it began with; "
            "load_adapter puts the adapter of a run on a model"
        )
    if section.init_from:
        require_adapter_folder(section.init_from, "init_from")
        whole_adapter(Path(section.init_from), TO_LOAD)
    return adapters.attach(loaded, section, loaded.model.config._name_or_path, None, adapter_name, onto)


@checked
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
        CheckpointError: it is no adapter, is damaged, is not as its run wrote it, or was trained on another base model.
        ConfigError: there is no such folder, or it is a run directory, which the error names the adapter in.
    """
    require_adapter_folder(str(folder), "folder")
    return attach(model, adapter_name, init_from=str(folder), init_from_other_base=other_base).eval()


@checked
def quantize(model: str | Path, out: str | Path, **options: Unpack[QuantizeOptions]) -> Nf4Folder:
    """Write the NF4 folder of a model, or resume one that was interrupted.

    Args:
        model: a directory or hub id; shards of a hub model are fetched one by one and deleted after use.
        out: the folder to write, new or empty.
        **options: `double_quantization`: hold the scales in 8 bits, where None is that or what a 4-bit checkpoint has;
            `fit`: how scales are chosen, as `quantization.fit` of a run file; `calibration`: for the fit `calibrated`,
            which it then is, the `calibration.safetensors` of a run of this model; `layers`: linears that stay in 16
            bits, as `quantization.layers` of a run file; `dtype`: of what stays unquantized, as for `load_model`, where
            `auto` keeps each tensor's own; `revision`: branch, tag or commit of a hub id; `trust_remote_code`: run
            Python that ships with the model; `progress`: called before and after each file with its name, the bytes
            written so far, and the bytes in all.

    Raises:
        CheckpointError: the source is damaged or incomplete; `out` holds something else, or cannot be written.
        ConfigError, UnsupportedModelError: see `load_model`.
    """
    double, dtype = options.get("double_quantization"), dtype_name(options.get("dtype", "auto"))
    asked, calibration = _how_held(options, double)
    revision, trust = options.get("revision"), options.get("trust_remote_code", False)
    progress = options.get("progress")
    _require_hub_id(model, revision)
    how = SourceOptions(revision=revision, trust_remote_code=trust, calibration=calibration)
    return write_nf4_folder(str(model), out, asked, dtype, progress, **how)


def _require_hub_id(model: str | Path, revision: str | None) -> None:
    """Refuse a revision of a folder, which has none: its files may be of another one."""
    if revision is not None and Path(model).expanduser().is_dir():
        raise ConfigError(f"revision: {revision} is of a hub id, and {model} is a folder; leave one of the two out")


def _how_held(
    options: HeldOptions | QuantizeOptions, double_quantization: bool | None = None
) -> tuple[QuantizationConfig, str | Path | None]:
    """The section `quantization` of what was given, and the calibration.

    Raises:
        ConfigError: a value is none of its key's, or there is a calibration and another fit.
    """
    calibration, fit = options.get("calibration"), options.get("fit")
    if calibration is not None and fit not in (None, CALIBRATED):
        raise ConfigError(f"calibration: it is for fit={CALIBRATED!r}, and fit is {fit!r}; leave one of them out")
    fit = fit or (None if calibration is None else CALIBRATED)
    given = {key: options.get(key) for key in ("scheme", "layers")}
    given |= {"double_quantization": double_quantization, "fit": fit}
    # What is quantized already decides by itself, unless the caller has.
    return parse_quantization({key: value for key, value in given.items() if value is not None}), calibration


def _require_calibration_of(folder: Path, moments: Moments, given: object) -> None:
    """Refuse another calibration than an NF4 folder has been quantized by: its scales are chosen."""
    stored = read_nf4_folder(folder)
    if stored.fit != CALIBRATED or stored.calibration == moments.sha256:  # without one, the fit is refused
        return
    theirs = (
        "it does not say by which" if stored.calibration is None else f"by that of sha256 {stored.calibration[:12]}"
    )
    raise ConfigError(
        f"calibration: the scales of {folder} have been chosen already, {theirs}, and {given} has the sha256 "
        f"{str(moments.sha256)[:12]}; leave calibration out, or give the 16-bit checkpoint"
    )


def _require_free(name: str, base: PreTrainedModel, onto: ExpertPeftModel | None) -> None:
    """Refuse names that PEFT cannot tell apart in a parameter's name, or has on the model."""
    if onto is None and hasattr(base, "peft_config"):
        raise ConfigError(
            "model: it has an adapter already; give what attach or load_adapter returned, and a new adapter_name"
        )
    if onto is not None and name in onto.peft_config:
        raise ConfigError(f"adapter_name: the model has an adapter called {name!r} already; give another name")
    if not re.fullmatch(r"[\w-]+", name) or name in "lora_":
        raise ConfigError(f"adapter_name: {name!r} is no name for an adapter; give letters and digits, such as second")


def _loaded(model: Any) -> LoadedModel:
    base = model.get_base_model() if isinstance(model, ExpertPeftModel) else model
    loaded = getattr(base, "nf4_loaded", None)
    if isinstance(loaded, LoadedModel):
        return loaded
    try:
        # What an adapter of any other call has put around the weights says nothing of them.
        with without_adapters(base):
            loaded = as_loaded(base)
    except ValueError:
        raise ConfigError(
            f"{type(model).__name__}: attach and load_adapter take a model from expertune.load_model, or "
            "from_pretrained of an NF4 folder"
        ) from None
    base.nf4_loaded = loaded
    return loaded
