"""The base model of a run, with its experts where they belong."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from expertune.adapt.files import read_adapter_base
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.formats import nf4_folder
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.load import LoadedModel, LoadOptions, fingerprint_of, load_model
from expertune.checkpoint.moments import Moments
from expertune.config import RunConfig
from expertune.errors import CheckpointError, option
from expertune.kernels.routes import use_settings
from expertune.layers.varlen_attention import use_sdpa_attention
from expertune.placement import Location
from expertune.placement.device import make_kernel_settings, resolve_compute_dtype
from expertune.placement.experts import expert_reader, place_experts
from expertune.planning.devices import Machine
from expertune.planning.plan import plan_for
from expertune.run.context import RunContext
from expertune.run.directory import CALIBRATION, require_kept
from expertune.run.progress import BYTES
from expertune.storage import hash_file


def recorded_places(context: RunContext, source: ModelSource) -> Mapping[str, Location]:
    """Where a run that is opened has its experts: where its record says, if each of its processes had all of them.

    Otherwise each held a part of what is now held by one process, which is planned anew.
    """
    record, config = context.record, context.config
    train = record.section("train")
    if train.get("experts", "replicate") == "replicate" and train.get("processes_sharing_experts", 1) == 1:
        places: Mapping[str, Location] = record.section("placement").get("places", {})
        return places
    lora = config.lora.model_copy(update={"init_from": None})  # which need not be there any more
    alone = config.model_copy(update={"model": str(source.folder), "lora": lora})
    return plan_for(alone, Machine.of(alone, devices=1), trust_remote_code=source.trust_remote_code).placement


def identify_base(context: RunContext, source: ModelSource, described: PreTrainedModel | None = None) -> Fingerprint:
    """What identifies the base that a run has or is going to have, before a weight is loaded; all ranks call this.

    Args:
        context: the run.
        source: where its base model lies.
        described: that model on the meta device, where it has been built already.

    Raises:
        ExpertuneError: see `fingerprint_of`.
    """
    asked, trust = context.config.quantization, source.trust_remote_code
    found = fingerprint_of(source.folder, trust, context.notify, described, context.ranks, asked)
    if found.held.fit != nf4_folder.CALIBRATED or found.held.calibration:
        return found
    recorded = context.record.section("model").get("calibration", {}).get("sha256")
    return replace(found, held=replace(found.held, calibration=recorded))


def kept_moments(context: RunContext) -> Moments:
    """The calibration that a run has made.

    Raises:
        CheckpointError: it has changed, or is missing, or the run has made none.
    """
    path, recorded = context.output_dir / CALIBRATION, context.record.section("model").get("calibration")
    if recorded is None:
        raise CheckpointError(
            f"{context.output_dir}: this run has made no calibration: its base was an NF4 folder whose scales had been "
            f"chosen by one; give that folder with {option('model', 'MODEL')}"
        )
    require_kept(path, recorded["sha256"])
    return Moments.load(path)


def has_to_calibrate(context: RunContext, source: ModelSource) -> bool:
    """Whether a run passes examples through its base to choose scales: it wants to, and has no calibration yet.

    Raises:
        CheckpointError: see `inherited_calibration`.
    """
    config = context.config
    if not config.is_calibrated or nf4_folder.is_nf4_folder(source.folder):  # whose scales have been chosen
        return False
    return not context.record.section("model").get("calibration") and inherited_calibration(config) is None


def inherited_calibration(config: RunConfig) -> Path | None:
    """The calibration that a run on a 16-bit source continues with; None where it makes its own.

    An adapter to start from belongs to the bytes that it was trained beside, and with a calibration on other examples
    these would be others.

    Raises:
        CheckpointError: it is not beside the adapter any more.
    """
    start, fit = config.lora.init_from, config.quantization.fit
    theirs = read_adapter_base(start) if start and fit == nf4_folder.CALIBRATED else None
    if start is None or theirs is None or theirs.held.fit != fit or config.lora.init_from_other_base:
        return None
    path, wanted = Path(start).parent / CALIBRATION, theirs.held.calibration
    if path.is_file() and wanted in (None, hash_file(path).sha256):
        return path
    if wanted is None:  # an earlier release did not say which
        return None
    raise CheckpointError(
        f"lora.init_from: {start}: this adapter was trained beside weights whose scales are by a calibration (sha256 "
        f"{wanted[:12]}), and {path} is not it; give the adapter in its run directory, or an NF4 folder quantized with "
        "that calibration, or set lora.init_from_other_base: true to calibrate anew"
    )


def note_new_calibration(config: RunConfig) -> str | None:
    """What a user is told of a run that calibrates, and starts from an adapter of another calibration; else None."""
    start = config.lora.init_from
    theirs = read_adapter_base(start) if start and config.quantization.fit == nf4_folder.CALIBRATED else None
    if start is None or theirs is None or theirs.held.fit != nf4_folder.CALIBRATED:
        return None
    why = (
        "as lora.init_from_other_base has it"
        if config.lora.init_from_other_base
        else f"which its files do not name, and there is no {Path(start).parent / CALIBRATION}"
    )
    return (
        f"lora.init_from: {start}: trained beside weights whose scales are by another calibration, {why}; this run "
        "calibrates anew, and continues the adapter beside somewhat other 4-bit weights"
    )


def load_base(context: RunContext, source: ModelSource, places: Mapping[str, Location]) -> LoadedModel:
    """The model with its experts at their locations; a run that is opened again has what its record says."""
    config, device = context.config, context.device
    recorded = context.record.section("kernels")
    settings = make_kernel_settings(config.kernels, recorded.get("crossover"), recorded.get("gemm"))
    dtype = resolve_compute_dtype(config.quantization.compute_dtype, device)
    on_host = [name for name, place in places.items() if place == "host"]
    importance = None
    if config.quantization.fit == nf4_folder.CALIBRATED and not nf4_folder.is_nf4_folder(source.folder):
        importance = kept_moments(context)
    with context.bars.task("loading the model", BYTES) as progress:
        loaded = load_model(
            source.folder,
            config.quantization,
            dtype,
            device,
            source.trust_remote_code,
            LoadOptions(expert_reader(places, device), on_host, context.sharing, progress, importance),
        )
    use_settings(loaded.model, settings)
    place_experts(loaded.model, places, device, source.folder)
    if config.data.packing == "padded":
        use_sdpa_attention(loaded.model)
    return loaded
