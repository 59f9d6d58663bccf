"""Load a model with 4-bit experts: swap on the meta device, then stream the shards, one matrix at a time.

At no moment is there a fused 16-bit stack of experts or a whole 16-bit model: what is resident is the 4-bit model so
far, its 16-bit rest (embeddings, router, norms, lm_head), and the one tensor being read.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from expertune.checkpoint.fingerprint import Fingerprint, read_fingerprint
from expertune.checkpoint.formats.nf4_folder import Nf4Folder, is_nf4_folder, read_nf4_folder
from expertune.checkpoint.held import held_by
from expertune.checkpoint.loader import Loader
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.moments import Moments
from expertune.checkpoint.names import NameMap, first_names, read_names
from expertune.checkpoint.reader import CheckpointIndex, open_checkpoint, read_ahead
from expertune.checkpoint.recipe import Recipe, read_recipe, recipe_of_folder
from expertune.checkpoint.restore import ReadExperts, fill, missing_tensors
from expertune.checkpoint.verified import require_verified
from expertune.config import QuantizationConfig
from expertune.distributed.mesh import Ranks
from expertune.distributed.sharded import Sharing
from expertune.errors import CheckpointError, ExportError
from expertune.experts.contract import find_experts
from expertune.experts.module import Nf4Experts
from expertune.layers.dense_linear import use_dense_linear
from expertune.layers.varlen_attention import use_varlen_attention


@dataclass
class LoadedModel:
    """A model whose experts are NF4.

    Attributes:
        model: the transformers model; every experts module is an `Nf4Experts`, every decoder linear a `Linear4bit`.
        names: both directions between checkpoint names and live names.
        unexpected: names of checkpoint tensors that the model has no place for.
        fingerprint: what identifies the weights; adapters carry it.
        source: of an NF4 folder, (path or hub id, commit) of the checkpoint that it was made of.
    """

    model: PreTrainedModel
    names: NameMap
    unexpected: list[str] = field(default_factory=list)
    fingerprint: Fingerprint | None = None
    source: tuple[str, str | None] | None = None


@dataclass(frozen=True)
class LoadOptions:
    """Which experts are not loaded onto the device, and who is told how far it is.

    Attributes:
        read: of an NF4 folder, gives an experts module its bytes (see `expertune.checkpoint.restore`).
        on_host: of another folder, experts modules whose bytes stay in the host's memory.
        sharing: the ranks that hold the experts together, each of which loads its part; None loads all.
        progress: called with (bytes placed, bytes in all).
        importance: what the scales of `quantization.fit: calibrated` are chosen by.
    """

    read: ReadExperts | None = None
    on_host: Collection[str] = ()
    sharing: Sharing | None = None
    progress: Callable[[int, int], None] = lambda *_: None
    importance: Moments | None = None


@torch.inference_mode(False)  # a model that is loaded in inference mode may be trained after it
def load_model(
    folder: str | Path,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    options: LoadOptions | None = None,
) -> LoadedModel:
    """Load a model folder with NF4 experts and NF4 decoder linears onto a device.

    Args:
        folder: config.json and safetensors, per-expert or fused, in any number of shards; 16-bit, in bitsandbytes'
            nf4, in MXFP4, or an NF4 folder.
        quantization: how frozen weights are held; what is quantized already stays as it is.
        dtype: dtype of the 16-bit rest and of all products.
        device: where everything lives.
        trust_remote_code: run Python that ships with the model.
        options: which experts are not loaded onto the device, and who is told how far it is.

    Raises:
        CheckpointError: a tensor is missing, stored twice, truncated, of another shape, or not finite; names it.
        ConfigError, UnsupportedModelError: see `build_meta_model`, `read_names` and `read_recipe`.
    """
    options = options or LoadOptions()
    if is_nf4_folder(folder):
        stored = read_nf4_folder(folder)
        return _load_nf4_folder(stored, quantization, dtype, device, trust_remote_code, options)
    index = open_checkpoint(folder)
    model = build_meta_model(folder, dtype, trust_remote_code)
    use_varlen_attention(model)
    names = read_names(model)
    _require_enough_bytes(model, index)
    recipe = read_recipe(model, names, index.tensors, quantization, index.folder)
    swap_experts(model, recipe, device, options)
    loader = Loader(model, names, replace(recipe, importance=options.importance), dtype, torch.device(device))
    loader.progress = options.progress
    unexpected = loader.stream(index)
    model.tie_weights()
    loader.check_complete(index.folder)
    held = held_by(recipe, model, names, options.importance.sha256 if options.importance else None)
    fingerprint = read_fingerprint(index.folder, index.tensors, model, names, held)
    return LoadedModel(_finish(model, names, device), names, unexpected, fingerprint)


def fingerprint_of(
    folder: str | Path,
    trust_remote_code: bool = False,
    notify: Callable[[str], None] | None = None,
    model: PreTrainedModel | None = None,
    ranks: Ranks | None = None,
    quantization: QuantizationConfig | None = None,
) -> Fingerprint:
    """What identifies the base that a folder becomes, before it is loaded: from headers and a few output features.

    An NF4 folder is verified first, where it has not been on this machine. Of what is calibrated when it is loaded, the
    calibration is not known yet.

    Args:
        folder: the model folder, with its weights.
        trust_remote_code: run Python that ships with the model.
        notify: called with one line where that takes a while.
        model: its model on the meta device, where it has been built already.
        ranks: the processes that all call this, and verify a part each.
        quantization: how frozen weights are going to be held.

    Raises:
        CheckpointError: weights are missing or damaged.
        ConfigError, UnsupportedModelError: see `build_meta_model`, `read_names`, `read_recipe` and `recipe_of_folder`.
    """
    folder, asked = Path(folder), quantization or QuantizationConfig()
    stored = None
    if is_nf4_folder(folder):
        require_verified(folder, notify, ranks)
        stored = read_nf4_folder(folder)
    index = stored.index if stored else open_checkpoint(folder)
    if model is None:
        model = build_meta_model(folder, torch.bfloat16, trust_remote_code, shapes_only=True)
    names = read_names(model)
    if stored:
        held = held_by(recipe_of_folder(stored, model, names, asked), model, names, stored.calibration)
    else:
        held = held_by(read_recipe(model, names, index.tensors, asked, folder), model, names)
    return read_fingerprint(folder, index.tensors, model, names, held)


def _load_nf4_folder(
    stored: Nf4Folder,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool,
    options: LoadOptions,
) -> LoadedModel:
    require_verified(stored.folder)
    # Of what is mapped, or of which other ranks hold a part, not all is read here.
    whole = stored.index.tensors.values() if options.read is None and options.sharing is None else ()
    with read_ahead(dict.fromkeys(entry.shard for entry in whole)):
        model = build_meta_model(stored.folder, dtype, trust_remote_code)
        use_varlen_attention(model)
        names = read_names(model)
        recipe = recipe_of_folder(stored, model, names, quantization)
        swap_experts(model, recipe, "meta", options)
        unexpected = fill(model, stored, dtype, torch.device(device), options.read, options.progress)
    model.tie_weights()
    missing = missing_tensors(model, stored)
    if missing:
        raise CheckpointError(f"{stored.folder}: missing tensors: {first_names(missing)}; quantize the model again")
    held = held_by(recipe, model, names, stored.calibration)
    fingerprint = read_fingerprint(stored.folder, stored.index.tensors, model, names, held)
    return LoadedModel(_finish(model, names, device), names, unexpected, fingerprint, stored.source)


def _finish(model: PreTrainedModel, names: NameMap, device: torch.device | str) -> PreTrainedModel:
    if getattr(model.config, "quantization_config", None) is not None:
        # It said how the file was packed; transformers would take the model for one of that kind.
        del model.config.quantization_config
    model.to(device)
    model.requires_grad_(False)
    use_dense_linear(model)
    # It would write a folder that nothing can read.
    model.save_pretrained = refuse_to_save
    prepare_for_adapters(model, names)
    return model.eval()


def prepare_for_adapters(model: PreTrainedModel, names: NameMap) -> None:
    """What PEFT, and whoever attaches and writes adapters, reads from a model with 4-bit experts."""
    # By this flag PEFT adapts `Linear4bit` layers as 4-bit ones.
    model.is_loaded_in_4bit = True
    model.nf4_names = names


def refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """What `save_pretrained` of a model with 4-bit experts does.

    Raises:
        ExportError: always; says what is saved instead.
    """
    raise ExportError(
        "a model with 4-bit experts is not written by save_pretrained: copy its NF4 folder (`expertune quantize MODEL "
        "OUT` writes one). Adapters are saved by save_pretrained of the PeftModel around it, into a folder of their own"
    )


def _require_enough_bytes(model: PreTrainedModel, index: CheckpointIndex) -> None:
    """Refuse a config whose model is far larger than what the files can hold, before memory is taken for it."""
    head = model.get_output_embeddings()
    tied = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
    count = sum(parameter.numel() for parameter in model.parameters()) - tied
    if count > 2 * index.nbytes:  # two to a byte, if all were in 4 bits
        raise CheckpointError(
            f"{index.folder}: config.json describes a model of {count} weights, and the files hold {index.nbytes} "
            "bytes: they do not belong together; copy the folder again from where it came"
        )


def swap_experts(
    model: nn.Module,
    recipe: Recipe,
    device: torch.device | str,
    options: LoadOptions | None = None,
) -> None:
    """Put an `Nf4Experts` without bytes in the place of every experts module; those on the host are to stay there."""
    options = options or LoadOptions()
    for name, experts in list(find_experts(model)):
        stays = name in options.on_host
        to = "cpu" if stays else device
        swapped = Nf4Experts(experts, name, recipe.double_quantization, to, recipe.scheme, options.sharing)
        swapped.gate_up.stays = swapped.down.stays = stays
        model.set_submodule(name, swapped)
