"""The base model of a run, with its experts where they belong."""

from collections.abc import Mapping

from expertune.checkpoint.formats import nf4_folder
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.load import LoadedModel, LoadOptions, load_model
from expertune.checkpoint.moments import Moments
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


def kept_moments(context: RunContext) -> Moments:
    """The calibration that a run has made.

    Raises:
        CheckpointError: it has changed, or is missing.
    """
    path = context.output_dir / CALIBRATION
    require_kept(path, context.record.section("model")["calibration"]["sha256"])
    return Moments.load(path)


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
