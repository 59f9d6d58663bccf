"""What a run makes of its weights once: a calibration, a base quantized by it, and an adapter that begins as its
correction, or at its components. A run that goes on from a correction has its first factors too.

All of it is kept in the run directory, so that a resumed run computes none of it again and a run that is opened has the
same bytes: `calibration.safetensors`, the adapter folder `initial_adapter` of a correction, and
`first_factors.safetensors` of components.
"""

import gc
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from expertune.adapt.files import read_adapter_settings
from expertune.adapt.initial import Correction, begin_at_components, read_first_factors, write_first_factors
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.adapter_folder import WEIGHTS_NAME, adapter_digests
from expertune.checkpoint.formats.nf4_folder import is_nf4_folder
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.matrices import SourceMatrices
from expertune.checkpoint.moments import Moments, collect_moments
from expertune.data import TokenizedExamples
from expertune.data.collate import PaddingFreeCollator
from expertune.errors import CheckpointError
from expertune.placement import Location
from expertune.run.base_model import inherited_calibration, kept_moments, load_base
from expertune.run.context import RunContext
from expertune.run.directory import (
    ADAPTER_FOLDER,
    CALIBRATION,
    FIRST_FACTORS,
    INITIAL_ADAPTER,
    require_kept,
    require_kept_adapter,
)
from expertune.run.progress import BYTES
from expertune.run.record import RECORD_NAME, RunRecord
from expertune.storage import hash_file
from expertune.train.arguments import BATCH_SIZE, training_argument
from expertune.train.exchange import write_adapter

# Tokens that pass through the model at once, if a micro-batch of the run is as large.
_MOST_TOKENS = 4096


def load_to_train(
    context: RunContext, source: ModelSource, places: Mapping[str, Location], train: TokenizedExamples
) -> tuple[LoadedModel, Moments | None]:
    """The base model, calibrated first where the run file asks for it, and the calibration.

    A run that goes on from an adapter of calibrated weights has that adapter's calibration.

    Raises:
        CheckpointError: a resumed run's calibration is not there any more.
    """
    config = context.config
    if not config.is_calibrated or is_nf4_folder(source.folder):  # whose scales have been chosen
        return load_base(context, source, places), None
    path = context.output_dir / CALIBRATION
    if not context.record.section("model").get("calibration") and (theirs := inherited_calibration(config)):
        if context.ranks.writes:
            shutil.copyfile(theirs, path)
        context.ranks.wait()
        context.record.update("model", calibration={"sha256": hash_file(path).sha256})
        context.notify(f"calibration: taken over from {theirs}, with the adapter of lora.init_from")
    if context.record.section("model").get("calibration"):
        moments = kept_moments(context)
        return load_base(context, source, places), moments
    plain = config.quantization.model_copy(update={"fit": "mse"}) if config.quantization.fit == "calibrated" else None
    first = context if plain is None else replace(context, config=config.model_copy(update={"quantization": plain}))
    loaded = load_base(first, source, places)
    started = time.monotonic()
    with context.record.phase("calibrating"), context.bars.task("calibrating", "tokens") as progress:
        wanted = config.quantization.calibration_tokens
        batches = _sample(context, train, wanted)
        moments = collect_moments(loaded.model, batches, lambda done: progress(min(done, wanted), wanted))
    if context.ranks.writes:
        moments.save(path)
    context.ranks.wait()
    found = {"tokens": wanted, "sha256": hash_file(path).sha256, "seconds": round(time.monotonic() - started, 1)}
    context.record.update("model", calibration=found)
    if plain is not None:  # the same weights again, with scales by what has been found
        del loaded
        gc.collect()
        loaded = load_base(context, source, places)
    return loaded, moments


def _sample(context: RunContext, train: TokenizedExamples, wanted: int) -> Iterator[dict[str, Any]]:
    """Training examples, drawn by the run's seed until there are so many tokens, as batches for the model."""
    examples, config = train.examples, context.config
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(context.seed)).tolist()
    padded = config.data.packing == "padded"  # its attention does not keep sequences apart by their positions
    most = min(_MOST_TOKENS, int(training_argument(config.training, BATCH_SIZE)) * config.data.max_length)
    collate, chosen, count, total = PaddingFreeCollator(), [], 0, 0
    for number, index in enumerate(order):
        ids = examples[index].input_ids[: wanted - total]
        chosen.append({"input_ids": ids, "labels": ids})
        count, total = count + len(ids), total + len(ids)
        following = examples[order[number + 1]].input_ids if total < wanted else []
        if not following or padded or count + len(following) > most:
            batch = {"input_ids": torch.tensor([ids])} if padded else collate(chosen)
            batch = {key: value for key, value in batch.items() if key not in ("labels", "use_cache")}
            yield {key: value.to(context.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            chosen, count = [], 0
        if total >= wanted:
            return


def begin_adapter(context: RunContext, source: ModelSource, model: ExpertPeftModel, moments: Moments | None) -> None:
    """Set the adapter's first factors as `lora.init` says; a resumed run has them in its directory.

    An adapter to start from that began as a correction has its own first factors kept: exports need them.

    Raises:
        CheckpointError: they are not there any more.
    """
    config, record = context.config, context.record
    folder, start = context.output_dir / INITIAL_ADAPTER, config.lora.init_from
    if known := record.section("adapter").get("init"):
        require_kept_adapter(folder, known["sha256"])
        if start is None:
            model.load_adapter(str(folder), "default")
        return
    if start is not None and (how := _began_as(start)):
        if context.ranks.writes:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(Path(start).parent / INITIAL_ADAPTER, folder)
        context.ranks.wait()
        record.update("adapter", init={"how": how, "sha256": adapter_digests(folder)})
        return
    if config.lora.init == "pissa":
        _begin_at_components(context, model)
        return
    if config.lora.init == "default":
        return
    started = time.monotonic()
    by = moments if config.lora.init == "qera" else None
    correction = Correction(model.get_base_model(), model.names, context.seed, by)
    with record.phase("initializing"), context.bars.task("correcting what 4 bits lost", BYTES) as progress:
        SourceMatrices(source.folder, config.quantization, source.trust_remote_code).stream(correction.take, progress)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its record knew of it
        write_adapter(model, folder, context.ranks)
    found = correction.to_json()
    seconds, digests = round(time.monotonic() - started, 1), adapter_digests(folder)
    record.update("adapter", init={"how": config.lora.init, **found, "seconds": seconds, "sha256": digests})
    shown = [
        f"{what} {each['error_before']:.5f} -> {each['error_after']:.5f}"
        for what, each in found.items()
        if each["matrices"]
    ]
    context.tell(
        f"the adapter begins as the correction of 4 bits ({config.lora.init}); squared error: {', '.join(shown)}"
    )


def _begin_at_components(context: RunContext, model: ExpertPeftModel) -> None:
    record, path, base = context.record, context.output_dir / FIRST_FACTORS, model.get_base_model()
    if known := record.section("adapter").get("components"):
        require_kept(path, known["sha256"])
        read_first_factors(path, base, model.names)
        return
    started = time.monotonic()
    with record.phase("initializing"), context.bars.task("principal components", "matrices") as progress:
        found = begin_at_components(base, model.names, context.seed, progress=progress)
        write_first_factors(path, base, model.names)
    seconds, digest = round(time.monotonic() - started, 1), hash_file(path).sha256
    record.update("adapter", components={**found, "seconds": seconds, "sha256": digest})
    shown = [f"{what} {each['share']:.1%}" for what, each in found.items() if each["matrices"]]
    context.tell(f"the adapter begins at the principal components (pissa); of the squared weights: {', '.join(shown)}")


def require_first_factors(start: str) -> None:
    """Refuse an adapter to start from that began as a correction, where the factors that it began with are not there.

    Where its run's record lies beside them, they must be the ones that the record knows.

    Raises:
        CheckpointError: says how to have them, or do without.
    """
    if (how := _began_as(start)) is None:
        return
    folder = Path(start).parent / INITIAL_ADAPTER
    if not (folder / WEIGHTS_NAME).is_file() or read_adapter_settings(folder) != read_adapter_settings(start):
        raise CheckpointError(
            f"lora.init_from: {start}: this adapter began as a correction of 4 bits (lora.init: {how}), and what it "
            f"began as is not at {folder}, without which no export to 16 bits would be right; give the adapter in its "
            "run directory, or what `expertune export` made of it for the 16-bit base"
        )

    if changed := _changed_since(Path(start).parent, folder):
        raise CheckpointError(
            f"lora.init_from: {start}: this adapter began as a correction of 4 bits (lora.init: {how}), and "
            f"{folder / changed} is not what {RECORD_NAME} says it began as; exports to 16 bits would be wrong. "
            "Restore it from a copy, or start from what `expertune export` made of the adapter for the 16-bit base"
        )


def _changed_since(run_dir: Path, folder: Path) -> str | None:
    """The first file of a run's first factors that is not the recorded one; None where all are, or nothing says."""
    try:
        recorded = (RunRecord.load(run_dir).section("adapter").get("init") or {}).get("sha256")
    except CheckpointError:
        return None  # the adapter was taken out of its run, or the record is lost
    if isinstance(recorded, str):  # earlier records have the weights' alone
        return WEIGHTS_NAME if hash_file(folder / WEIGHTS_NAME).sha256 != recorded else None
    if not isinstance(recorded, Mapping):
        return None
    found = adapter_digests(folder)
    return next((name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)), None)


def warn_of_correction(context: RunContext) -> None:
    """One line where a run's adapter is right on its own 4-bit base alone."""
    if "init" in context.record.section("adapter"):
        context.notify(
            f"adapter: {context.output_dir / ADAPTER_FOLDER} holds a correction of 4 bits and is right on this run's "
            f"4-bit base alone; for a 16-bit base: expertune export {shlex.quote(str(context.output_dir))} --to peft"
        )


def _began_as(folder: str) -> str | None:
    """What an adapter began as (`lora.init`), where that was a correction."""
    return (read_adapter_settings(folder) or {}).get("init")
