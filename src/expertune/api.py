"""The corridor: config -> plan -> data -> load -> adapt -> train -> evaluate / generate -> report.

`finetune` reads like that sentence. Each step is a function here or in the room of its name, and can be called alone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from expertune.adapt.attach import attach, expected_layout
from expertune.adapt.base import require_same_base
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.proof import probe_logits, prove
from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.hub import ModelSource, fetch_model
from expertune.checkpoint.load import fingerprint_of
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import RunConfig, check_training_arguments
from expertune.data import (
    TokenizedRows,
    make_collator,
    make_dataset,
    plot_lengths,
    prepare_run,
)
from expertune.data.preview import preview
from expertune.distributed.processes import require_one_process
from expertune.evaluation.held_out import HeldOut
from expertune.kernels import routes
from expertune.layers.varlen_attention import require_no_leakage
from expertune.objectives.chunked_loss import LanguageModelLoss
from expertune.placement.device import bound_host_memory, training_device
from expertune.placement.experts import Location, placement_of
from expertune.planning import MicroBatch, make_plan
from expertune.planning.disk import require_room
from expertune.planning.memory import PROOF_TOKENS
from expertune.planning.settings import uses_checkpointing
from expertune.report.plots import plot_summary
from expertune.report.preview import render_preview
from expertune.report.summary import render_summary
from expertune.run.directory import (
    ADAPTER_FOLDER,
    finished_line,
    is_finished,
    merged_before,
    open_record,
    stops_recorded,
)
from expertune.run.identity import identify, require_same_identity
from expertune.run.inference import OpenRun, evaluate, generate, load_base, open_run
from expertune.run.lock import hold_run_directory
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from expertune.run.source import load_run
from expertune.storage import storage_errors_named, told_if_it_fails
from expertune.train.callbacks import History, ProgressBar, peak_memory_bytes
from expertune.train.checkpoints import ResumePoint, find_resume_point, require_state_to_go_on
from expertune.train.ladder import Change
from expertune.train.offload import has_separate_host
from expertune.train.recover import Recovery
from expertune.train.schedule import Evaluations, check_schedule, evaluates_at_ends, require_a_batch
from expertune.train.trackers import Trackers
from expertune.train.trainer import ExpertTrainer, training_arguments

__all__ = ["OpenRun", "Run", "evaluate", "finetune", "generate", "make_plan", "open_run"]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        output_dir: the run folder.
        record: what the run did.
    """

    output_dir: Path
    record: RunRecord


@torch.inference_mode(False)  # a caller may be in inference mode, or without gradients: training is not
@torch.enable_grad()
def finetune(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Run a whole fine-tuning run and leave its folder behind.

    Args:
        config: a run file, a record of a run or a run folder; or a run file's parsed content.
        overrides: `section.key=value` strings on top of a run file.
        resume: continue from the newest whole checkpoint of the run folder; the result is byte-identical to a run
            that was never interrupted (on the same machine, CPU). A finished run is left as it is.
        console: where to tell what happens; None means stderr.
        trust_remote_code: run Python that ships with the model. No run file can ask for it.

    Raises:
        ExpertuneError: anything that the user can mend; see `expertune.errors`.
    """
    if not isinstance(config, RunConfig):
        config = load_run(config, overrides, resume)
    require_one_process()
    console = console or Console(stderr=True)
    output_dir = Path(config.output_dir)
    with hold_run_directory(output_dir):
        record = open_record(config, output_dir, resume)
        if is_finished(record):
            console.print(finished_line(record), soft_wrap=True)
            return Run(output_dir, record)
        with stops_recorded(record), storage_errors_named(output_dir):
            return _finetune(config, output_dir, record, resume, console, trust_remote_code)


def _finetune(
    config: RunConfig, output_dir: Path, record: RunRecord, resume: bool, console: Console, trust_remote_code: bool
) -> Run:
    """The corridor, in a run directory that nobody else writes to."""
    bound_host_memory()
    device = training_device()
    check_training_arguments(config.training, config.where)
    check_schedule(config)
    # Values that do not go together are refused by transformers itself: now, and not after the model is loaded.
    training_arguments(config.training, str(output_dir), device)

    plan = make_plan(config, began_with=merged_before(record, output_dir), trust_remote_code=trust_remote_code)
    plan.require_fit()
    console.print(plan.parameters.line, soft_wrap=True)

    source = fetch_model(config.model, config.revision, trust_remote_code)
    base = fingerprint_of(source.folder, trust_remote_code, say=partial(console.print, soft_wrap=True))
    if config.lora.init_from and not config.lora.init_from_other_base:
        require_same_base(config.lora.init_from, base, config.model)
    expected = expected_layout(source.folder, config.lora, trust_remote_code)
    _tell_if_not_read(expected.refusal, console)
    if expected.merging:
        console.print(f"adapter: {expected.merging}", soft_wrap=True)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    # Nothing but a lock has been written so far: a mistake in the run file or in a row leaves no folder behind.
    context = context_length(read_config(source.folder, trust_remote_code))
    train_rows, eval_rows = _prepare_data(config, tokenizer, base, context, record, console)

    require_room(plan.disk, config.training, len(make_dataset(train_rows, config.data)), output_dir)
    point = (
        find_resume_point(output_dir, bool(config.training.get("load_best_model_at_end")))
        if resume
        else ResumePoint(None)
    )
    if point.checkpoint:
        require_state_to_go_on(point.checkpoint)
    record.update("model", name=config.model, revision=source.revision, device=str(device), base=base.to_json())
    record.update("plan", **plan.to_json())
    bars = Bars(console)
    model, recovery = _load_and_adapt(config, source, tokenizer, train_rows, plan.placement, device, record, bars)
    refusal = model.stock_layout().refusal
    record.update("adapter", stock_peft=refusal is None, stock_peft_refusal=refusal)
    if refusal != expected.refusal:
        _tell_if_not_read(refusal, console)
    held_out = HeldOut(config, model, tokenizer, eval_rows, recovery, bars) if eval_rows else None
    if config.task.metric and held_out and "before" not in record.values.get("task", {}):
        # A folder to resume from may hold the score already; it was taken on the same bytes.
        record.update("task", before=held_out.score(step=0, base_only=True))
        console.print(_score_line("before", record["task"]["before"]))

    resumed = point if resume else None
    _train(config, plan.micro_batch, model, tokenizer, train_rows, held_out, recovery, resumed, record, bars)
    recovery.anew("checkpoint", partial(_write_adapter, model, output_dir / ADAPTER_FOLDER))

    if config.task.metric and held_out:
        record.update("task", after=held_out.score(step=record["train"]["steps"]))
        console.print(_score_line("after", record["task"]["after"]))
    record.update("memory", peak_bytes=peak_memory_bytes())
    told_if_it_fails("summary.png", lambda: plot_summary(record.values, output_dir / "summary.png"), console.print)
    record.update("run", status="finished")
    console.print(render_summary(record.values, config.output_dir), soft_wrap=True)
    return Run(output_dir, record)


def _write_adapter(model: ExpertPeftModel, folder: Path) -> None:
    model.save_pretrained(str(folder))
    # Opened again, the run gives the very numbers that it recorded.
    model.save_live_factors(folder)


def _tell_if_not_read(refusal: str | None, console: Console) -> None:
    if refusal:
        console.print(
            f"adapter: stock PEFT {peft.__version__} will not read all of it: {refusal}. Expertune reads it; for a "
            "file that others read too, leave that out of lora.targets",
            soft_wrap=True,
        )


def _prepare_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: Fingerprint,
    context: int | None,
    record: RunRecord,
    console: Console,
) -> tuple[TokenizedRows, TokenizedRows | None]:
    train_rows, eval_rows = prepare_run(config.data, tokenizer, record.values.get("data", {}), context)
    reports = {"train": train_rows.report, "eval": eval_rows.report if eval_rows else None}
    inputs = identify(config, tokenizer, {"train": train_rows, "eval": eval_rows})
    require_same_identity(record, config, base, inputs, reports)
    require_a_batch(len(make_dataset(train_rows, config.data)), config.training)
    record.values["inputs"] = inputs
    record.update("data", **reports)
    lengths = [row.uncut_length for part in (train_rows, eval_rows) if part for row in part.rows]
    histogram = Path(config.output_dir) / "lengths.png"
    told_if_it_fails("lengths.png", lambda: plot_lengths(lengths, histogram, config.data.max_length), console.print)
    shown = preview(train_rows, config.data, tokenizer, num_examples=1)
    console.print(render_preview("train", shown), soft_wrap=False)
    if eval_rows:
        shown = preview(eval_rows, config.data, tokenizer, num_examples=0)
        console.print(render_preview("eval", shown), soft_wrap=False)
    report = train_rows.report
    console.print(
        f"data: {report['num_rows']} training rows, {report['num_truncated']} cut at {config.data.max_length} tokens, "
        f"{report['num_skipped']} skipped; lengths in {histogram}",
        soft_wrap=True,
    )
    return train_rows, eval_rows


def _load_and_adapt(
    config: RunConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenizedRows,
    places: Mapping[str, Location],
    device: torch.device,
    record: RunRecord,
    bars: Bars,
) -> tuple[ExpertPeftModel, Recovery]:
    """Load, attach and prove; from here on, what is done when memory runs out."""
    console = bars.console
    started = time.monotonic()
    loaded = load_base(config, source, device, record, places)
    console.print(f"loaded with 4-bit experts in {time.monotonic() - started:.1f} s")
    for note in config.notes:
        console.print(note, soft_wrap=True)
    kernels = routes.describe(device, loaded.model.dtype)
    record.update("kernels", **kernels)
    console.print(f"kernels: {routes.say(kernels)}", soft_wrap=True)
    if config.data.packing != "padded":
        require_no_leakage(loaded.model)
    probe = _probe_batch(config, tokenizer, rows, device)
    recovery = _recovery(config, loaded.model, device, record, console)
    base_logits, probe = recovery.proof_batch(partial(probe_logits, loaded.model), probe)
    set_seed(config.training.get("seed", 42))
    model = attach(loaded, config.lora, config.model, source.revision)
    if uses_checkpointing(config.training) and model.get_base_model().supports_gradient_checkpointing:
        # As the training that follows: otherwise the proof could need more memory than a step does.
        model.activation_checkpointing_enable()
    # Nothing that changes a logit may give way between the two looks at the base model.
    with bars.task("preflight check", "passes") as progress:
        proof = recovery.anew("proof", lambda: prove(model, probe, base_logits, progress))
    record.update("model", dtype=str(model.dtype), unexpected_tensors=loaded.unexpected)
    record.update("proof", **proof)
    learning = proof["learning"]
    console.print(
        f"proof: experts at {proof['four_bit']['bits_per_expert_weight']:.2f} bits a weight, "
        f"{learning['factors_learning']} adapter factors learn "
        f"({learning['factors_without_tokens']} saw no token), forward repeatable, adapter effective",
        soft_wrap=True,
    )
    return model, recovery


def _recovery(
    config: RunConfig, model: nn.Module, device: torch.device, record: RunRecord, console: Console
) -> Recovery:
    """A run's recovery: each change is told, and kept in the record."""
    recoveries = record.values.get("train", {}).get("recoveries", [])
    record.update("train", recoveries=recoveries)

    def tell(change: Change) -> None:
        console.print(change.line, soft_wrap=True)
        recoveries.append(change.to_json())
        record.update("train", recoveries=recoveries)

    recovery = Recovery(model, device, config.offload_activations, earlier=recoveries, tell=tell)
    recovery.ladder.run_dir = config.output_dir
    return recovery


def _probe_batch(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: TokenizedRows, device: torch.device
) -> dict[str, Any]:
    """The first training rows, as many as the proof's tokens allow, collated as in training."""
    dataset = make_dataset(rows, config.data)
    chosen: list[Any] = []
    tokens = 0
    for row in dataset:
        # Of a long row its beginning is enough; whole, it could need more memory than the run itself.
        row = {key: value if key == "row_ids" else value[:PROOF_TOKENS] for key, value in row.items()}
        length = config.data.max_length if config.data.packing == "padded" else len(row["input_ids"])
        if chosen and tokens + length > PROOF_TOKENS:
            break
        chosen.append(row)
        tokens += length
    batch = make_collator(config.data, tokenizer)(chosen)
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}


def _train(
    config: RunConfig,
    micro_batch: MicroBatch,
    model: ExpertPeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: TokenizedRows,
    held_out: HeldOut | None,
    recovery: Recovery,
    resumed: ResumePoint | None,
    record: RunRecord,
    bars: Bars,
) -> None:
    console = bars.console
    output_dir, device = Path(config.output_dir), recovery.ladder.device
    training = micro_batch.apply(config.training)
    if evaluates_at_ends(config):
        training.setdefault("eval_on_start", True)
    args, notes = training_arguments(training, str(output_dir), device)
    if micro_batch.line:
        notes.append(micro_batch.line)
    checkpoint = None
    if resumed:
        checkpoint = str(resumed.checkpoint) if resumed.checkpoint else None
        notes += [f"not resumed from: {reason}" for reason in resumed.refused]
        notes.append(f"resuming from {checkpoint or 'the first step: no whole checkpoint yet'}")
    if config.offload_activations and not has_separate_host(device):
        notes.append(f"offload_activations: on this {device.type} memory is the host's, and nothing is moved")
    for note in notes:
        console.print(note, soft_wrap=True)
    record.update("train", notes=notes, micro_batch=asdict(micro_batch))

    def say(line: str) -> None:
        notes.append(line)
        console.print(line, soft_wrap=True)
        record.update("train", notes=notes)

    trainer = ExpertTrainer(
        model=model,
        args=args,
        train_dataset=make_dataset(train_rows, config.data),
        held_out=held_out,
        collator=make_collator(config.data, tokenizer, keep_row_ids=True),
        history=History(),
        row_places=lambda row_id: train_rows.rows[row_id].place,
        loss=LanguageModelLoss(model, config.loss, say=say),
        recovery=recovery,
    )
    bar = ProgressBar(lambda: trainer.history, bars)
    trainer.add_callback(Evaluations(at_end=evaluates_at_ends(config)))
    trainer.add_callback(bar)
    trackers = Trackers(trainer, output_dir, resumed=resumed is not None)
    try:
        with trackers.open(named="run_name" in config.training):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()
        history = trainer.history
        record.update("train", loss=history.losses, steps=trainer.state.global_step)
        record.update("eval", loss=history.eval_losses, scores=history.eval_scores)
        record.update("throughput", tokens_per_second=history.tokens_per_second, tokens=history.tokens)
        record.update("memory", peak_bytes=peak_memory_bytes())
        record.update("kernels", ran=routes.describe(device, model.dtype)["ran"])
        if placement := placement_of(model):
            record.update("placement", places=placement.locations, **placement.describe())
    origin = trainer.adapter_origin
    record.update("adapter", **origin)
    # An adapter to start from is not the base model, and neither is a first evaluation after some steps.
    losses = {int(step): loss for step, loss in history.eval_losses}
    before = None if config.lora.init_from else losses.get(0)
    record.update("eval", before=before, after=losses.get(origin["step"]))
    if origin["checkpoint"]:
        chosen = f"{origin['checkpoint']}, the best of the evaluated by {origin['metric']} ({origin['value']:.4f})"
        console.print(f"the adapter is that of {chosen}", soft_wrap=True)
    elif args.load_best_model_at_end:
        say("load_best_model_at_end: no checkpoint was found to be the best; the adapter is that of the last step")


def _score_line(when: str, score: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {score[name]:.3f}" for name in ("slot_f1", "exact_match") if name in score)
    return f"{when}: {figures} on {score['rows']} evaluation rows"
