"""A run directory, or an adapter and its base, read as an `ExportSource`: the one is held to the other."""

from dataclasses import replace
from pathlib import Path

import torch

from expertune.adapt.base_model import require_same_base
from expertune.adapt.factors import difference
from expertune.adapt.files import AdapterFile, read_adapter, read_adapter_base
from expertune.checkpoint.fingerprint import read_fingerprint
from expertune.checkpoint.formats.nf4_folder import CALIBRATED, is_nf4_folder, read_nf4_folder
from expertune.checkpoint.held import held_by
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.reader import open_checkpoint
from expertune.checkpoint.verified import require_verified
from expertune.config import LoraSection, QuantizationConfig
from expertune.errors import CheckpointError, ConfigError
from expertune.exporting.source import ExportSource, recipe_of
from expertune.run.base_model import kept_moments
from expertune.run.context import RunContext
from expertune.run.directory import INITIAL_ADAPTER, require_kept_adapter
from expertune.run.inference import find_run


def open_source(
    run_dir: str | Path,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    model: str | Path | None = None,
    base: str = "source",
) -> ExportSource:
    """Read what is exported; the arguments are those of `expertune.open_run`, and `base`, what it is to be right on.

    An adapter that began as a correction of 4 bits (`lora.init`) is right on the weights that it was made for. On
    16-bit weights there is nothing to correct: then its difference to where it began is exported, of twice the rank.
    So it is of an NF4 folder, in whose place readers load its source; other 4-bit checkpoints they load as they are.

    Raises:
        CheckpointError: the run has no such adapter or has not written it, the model is gone, or is another one than
            the adapter's.
        ConfigError: `adapter` is a path.
    """
    found = find_run(run_dir, adapter, trust_remote_code, model)
    source = read_source(found.context, found.adapter, found.base, base)
    _require_own(found.context.config.lora, source.adapter)
    begun = source.context.record.section("adapter").get("init")
    if begun is None or base != "source" or (source.is_packed and not is_nf4_folder(source.base.folder)):
        return source
    folder = source.context.output_dir / INITIAL_ADAPTER
    require_kept_adapter(folder, begun["sha256"])
    initial = read_adapter(folder)
    began = initial.factors(source.names)
    # What it has learned is on the source, and corrects no 4-bit weights.
    return replace(source, factors=difference(source.factors, began), fingerprint=source.fingerprint.of_source)


def read_source(context: RunContext, adapter: Path, base: ModelSource, onto: str = "source") -> ExportSource:
    """Read an adapter and its base, and hold the one to the other.

    On the 16-bit source (`onto`) none of the base's 4-bit weights are in the export, and an adapter of any of them is
    taken; on their values (`dequantized`), or as a correction of a 4-bit checkpoint of others, they must be its own.

    Raises:
        CheckpointError: a file is damaged, or the adapter is another base's.
        ConfigError, UnsupportedModelError: the base is not quantized as the run file has it.
    """
    folder = base.folder
    if is_nf4_folder(folder):
        require_verified(folder, context.notify)
    stored = read_nf4_folder(folder) if is_nf4_folder(folder) else None
    index = stored.index if stored else open_checkpoint(folder)
    described = build_meta_model(folder, torch.bfloat16, base.trust_remote_code, shapes_only=True)
    names = read_names(described)
    trained_on = read_adapter_base(adapter)
    # An NF4 folder is what it is, whatever the run was trained on; that is compared below.
    asked = QuantizationConfig() if stored else context.config.quantization
    recipe = recipe_of(stored or index, described, names, asked)
    is_packed = stored is not None or any(piece.format for piece in recipe.pieces)
    takes_bytes = onto != "source" or (is_packed and not stored and "init" in context.record.section("adapter"))
    if takes_bytes and trained_on and not is_packed:
        asked = trained_on.held.completed(asked)
        try:
            recipe = recipe_of(index, described, names, asked)
        except ConfigError as error:  # which the run file's own values did not raise
            raise CheckpointError(f"{adapter}: its 4-bit weights are not of this base: {error}") from None
    if takes_bytes and not is_packed and recipe.fit == CALIBRATED:
        kept_moments(context)  # refused where there are none, before anything is written
    made = context.record.section("model").get("calibration", {}).get("sha256")
    held = held_by(recipe, described, names, stored.calibration if stored else made)
    fingerprint = read_fingerprint(folder, index.tensors, described, names, held)
    compared = fingerprint if takes_bytes else fingerprint.of_source
    require_same_base(adapter, compared, context.config.model, allowed_by=None)
    if not (stored and takes_bytes):
        context = replace(context, config=context.config.model_copy(update={"quantization": asked}))
    if trained_on:
        fingerprint = replace(fingerprint, held=trained_on.held)
    file = read_adapter(adapter)
    factors = file.factors(names)
    for key, tensor in file.tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file.where}: {key} holds NaN or infinite values; export another state of the run")
    return ExportSource(context, file, base, index, described, names, fingerprint, factors)


def _require_own(lora: LoraSection, file: AdapterFile) -> None:
    """Refuse an adapter that another run has written: the recipe and scores on its card would not be its own.

    Raises:
        CheckpointError: it was trained with other settings than the record has.
    """
    if file.settings is None or lora.init_from:
        return
    lora = lora.in_files
    if lora.use_dora != bool(file.config.get("use_dora")):
        raise CheckpointError(
            f"{file.where}: was trained with{'out' if lora.use_dora else ''} lora.use_dora, and the record of this run "
            "says otherwise; put the run's own adapter back, or export the run that it is of"
        )
    for key in ("r", "alpha", "rslora"):
        written, recorded = file.settings[key], getattr(lora, key)
        if written != recorded:
            raise CheckpointError(
                f"{file.where}: was trained with lora.{key} {written}, and the record of this run says {recorded}; put "
                "the run's own adapter back, or export the run that it is of"
            )
