"""The corridor: config -> plan -> data -> load -> adapt -> train -> evaluate / generate -> report.

`finetune` reads like that sentence. Each step is a function here or in the room of its name, and can be called alone.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed

from expertune.adapt.amounts import preflight_tokens
from expertune.adapt.attach import attach
from expertune.adapt.comparison import base_forward
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.preflight import preflight
from expertune.checkpoint.adapter_folder import adapter_digests
from expertune.config import RunConfig, check_training_arguments
from expertune.config.arguments import checked
from expertune.distributed.mesh import open_ranks
from expertune.distributed.output import console_of
from expertune.evaluation.held_out import HeldOut
from expertune.experts.balance import RouterLosses
from expertune.experts.module import experts_passed_by
from expertune.kernels import routes
from expertune.layers.varlen_attention import require_no_leakage
from expertune.objectives.rewards import Rewards
from expertune.objectives.sft import SupervisedFineTuning
from expertune.placement import Location
from expertune.placement.device import training_device
from expertune.planning import MicroBatch
from expertune.planning.disk import require_room
from expertune.planning.plan import plan_for
from expertune.report.card import CARD_NAME
from expertune.report.figures import summary_figure, write_png
from expertune.report.page import PAGE_NAME
from expertune.report.summary import render_summary
from expertune.run.agreement import (
    choose_experts,
    kept_by_all,
    kept_in_words,
    machine_for_all,
    record_kept,
    require_same_start,
    share_batch,
    share_experts,
    started_with,
)
from expertune.run.beside import write_card, write_tokenizer
from expertune.run.context import RunContext
from expertune.run.correction import begin_adapter, load_to_train, require_first_factors, warn_of_correction
from expertune.run.directory import (
    finished_line,
    is_finished,
    open_record,
    stops_recorded,
    write_report,
)
from expertune.run.inference import OpenOptions, Run, after_training
from expertune.run.inputs import Inputs, note_stock_refusal, probe_batch, read_inputs
from expertune.run.lock import hold_run_directory
from expertune.run.progress import Bars, folds
from expertune.run.selection import with_selected_experts
from expertune.run.source import load_config
from expertune.run.training import Learning, make_objective, make_recovery, read_rewards, train
from expertune.run.written import ADAPTER_FOLDER, TO_RESUME, TO_START_FROM, whole_adapter
from expertune.storage import storage_errors_named
from expertune.text import counted
from expertune.train.arguments import training_arguments, uses_checkpointing
from expertune.train.callbacks import peak_memory_bytes
from expertune.train.checkpoints import ResumePoint, find_resume_point, require_state_to_go_on
from expertune.train.exchange import write_adapter
from expertune.train.offload import has_separate_host
from expertune.train.oom import OutOfMemory
from expertune.train.router import take_router_losses
from expertune.train.schedule import check_schedule, evaluates_at_ends, lower_is_better


@checked
@torch.inference_mode(False)  # a caller may be in inference mode, or without gradients: training is not
@torch.enable_grad()
def finetune(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    resume: bool = False,
    console: Console | None = None,
    trust_remote_code: bool = False,
    trust_rewards: bool = False,
) -> Run:
    """Run a whole fine-tuning run and leave its directory behind.

    Args:
        config: a run file, a record of a run or a run directory; or a run file's content as a mapping or RunConfig.
        overrides: `section.key=value` strings on top of it.
        resume: continue from the newest whole checkpoint of the run directory; the result is byte-identical to a run
            that was never interrupted (on the same machine, CPU). A finished run is left as it is.
        console: where messages and progress go; None means stderr.
        trust_remote_code: run Python that ships with the model. No run file can ask for it.
        trust_rewards: run Python that the run file names as a reward, which is not run otherwise.

    Raises:
        ExpertuneError: anything that the user can fix; see `expertune.errors`.
    """
    config = load_config(config, overrides, resume)
    output_dir = Path(config.output_dir)
    with open_ranks(config.training.get("ddp_timeout")) as ranks:
        bars = Bars(console_of(ranks.rank, console))
        with hold_run_directory(output_dir) if ranks.writes else nullcontext():
            ranks.wait()  # of a directory that another run writes to, rank 0 speaks and nobody else
            record = open_record(config, output_dir, resume)
            record.is_kept = ranks.writes
            device = training_device(ranks.several)
            context = RunContext(config, record, device, bars, ranks, resume, trust_remote_code, trust_rewards)
            if is_finished(record):
                whole_adapter(output_dir / ADAPTER_FOLDER, TO_RESUME)
                bars.print(finished_line(record))
                return Run(context, options=OpenOptions(trust_remote_code=trust_remote_code))
            with (
                bars.in_one_output(),
                stops_recorded(record, bars.print),
                ranks.failing_together(),
                storage_errors_named(output_dir),
            ):
                return _finetune(context)


def _finetune(context: RunContext) -> Run:
    """The corridor, in a run directory that nobody else writes to."""
    check_training_arguments(context.config.training, context.config.origin, context.config.objective)
    rewards = read_rewards(context)
    require_same_start(context)
    started = started_with(context)
    context, reason = choose_experts(share_batch(context))
    context = share_experts(context)
    config, record, output_dir = context.config, context.record, context.output_dir
    check_schedule(config)
    with record.phase("planning"), context.bars.task("planning"):
        made = plan_for(config, machine_for_all(context), started, context.trust_remote_code)
    if made.ranks and reason:
        made = replace(made, ranks=replace(made.ranks, reason=reason))
    # Values that do not go together are refused by transformers itself: before anything is loaded.
    context = _with_arguments(context, made.micro_batch)
    made.require_fit()
    context.notify(made.parameters.line)

    start = None
    if config.lora.init_from:  # of which a resumed run has all but the hashes in its directory
        folder = Path(config.lora.init_from)
        start = adapter_digests(folder) if context.resume else whole_adapter(folder, TO_START_FROM)
        if not context.resume:
            require_first_factors(config.lora.init_from)
    # Nothing but a lock has been written so far: a mistake in the run file or in an example leaves no directory behind.
    with record.phase("data"):
        inputs = read_inputs(context, start)
    require_room(made.disk, config.training, len(inputs.dataset), output_dir)
    made = made.timed(inputs.lengths(config.data))
    if made.run_time:
        context.tell(f"expected: {made.run_time.line}")
    point = _resume_point(context)
    record.add(
        "model",
        name=config.model,
        revision=inputs.source.revision,
        device=str(context.device),
        base=inputs.fingerprint.to_json(),
    )
    record.update("plan", **made.to_json())
    model, recovery, router_losses = _load_and_adapt(context, inputs, made.placement)
    objective = rewards or make_objective(context, model)
    held_out = None
    if inputs.eval:
        held_out = HeldOut(config, model, inputs.tokenizer, inputs.eval, recovery, context.bars)
        held_out.rewards = rewards
        held_out.preference = None if isinstance(objective, SupervisedFineTuning | Rewards) else objective
    if config.task.metric and config.task.before and held_out and "before" not in record.section("task"):
        # A resumed run may have recorded the score already; it was taken on the same bytes.
        context.tell(
            f"before training, the base model answers {counted(held_out.num_answered, 'example')} for "
            f"{config.task.metric}; task.before: false leaves that out"
        )
        with record.phase("answers"):
            record.add("task", before=held_out.score(step=0, base_only=True))
        record.save()
        context.show_score("before")

    kept = kept_by_all(context, made.kept)
    if kept.note:
        context.notes.append(kept.note)
    if line := kept_in_words(record, kept):
        context.tell(line)
    record_kept(record, kept, started)
    _record_notes(context, made.micro_batch, point)
    write_report(record, context.notify)
    with record.phase("training"), recovery.keeping(kept.layers):
        train(context, inputs, model, Learning(objective, held_out, recovery, router_losses), point)
    write = partial(write_adapter, model, output_dir / ADAPTER_FOLDER, context.ranks)
    if context.sharing:
        write()  # which all take part in
    else:
        context.ranks.on_main(lambda: recovery.retry("checkpoint", write))
    context.ranks.on_main(lambda: record.update("adapter", sha256=adapter_digests(output_dir / ADAPTER_FOLDER)))

    if config.task.metric and held_out:
        with record.phase("answers"):
            record.add("task", after=held_out.score(step=record["train"]["steps"]))
        record.save()
        context.show_score("after")
    record.keep_peak(max(context.ranks.gather(peak_memory_bytes())))
    context.write_beside("summary.png", lambda path: write_png(summary_figure(record.values), path))
    adapter, template = output_dir / ADAPTER_FOLDER, record["data"]["train"]["template"]
    context.write_beside(
        f"{ADAPTER_FOLDER}'s tokenizer", lambda _: write_tokenizer(template, inputs.tokenizer, adapter)
    )
    context.write_beside(f"{ADAPTER_FOLDER}/{CARD_NAME}", lambda _: write_card(record.values, config, adapter))
    record.update("run", status="finished")
    write_report(record, context.notify)
    if context.bars.in_notebook:  # where the run shows itself
        context.notify(f"report: {output_dir / PAGE_NAME}")
    else:
        summary = render_summary(record.values, config.output_dir)
        whole = not folds(context.console)
        context.console.print(summary, soft_wrap=whole, crop=False, markup=False, highlight=False)
    warn_of_correction(context)
    context.ranks.wait()  # until the run directory is whole
    options = OpenOptions(trust_remote_code=context.trust_remote_code)
    if context.sharing:  # no process has the whole model: it is opened again
        return Run(replace(context, sharing=None), options=options)
    return Run(context, (after_training(model), inputs.tokenizer), options)


def _with_arguments(context: RunContext, micro_batch: MicroBatch) -> RunContext:
    """The context with transformers' arguments, whose micro-batch is the plan's."""
    config = context.config
    training = micro_batch.apply(config.training)
    if not context.ranks.writes:
        training |= {"report_to": "none", "log_level_replica": "error"}
    if evaluates_at_ends(config):
        training.setdefault("eval_on_start", True)
    if lower_is_better(config):
        training.setdefault("greater_is_better", False)
    arguments, notes = training_arguments(training, str(config.output_dir), context.device, config.objective)
    if line := micro_batch.line(context.ranks.world_size):
        notes.append(line)
    return replace(context, arguments=arguments, notes=notes)


def _resume_point(context: RunContext) -> ResumePoint | None:
    """Where a resumed run continues; None for a run that starts."""
    if not context.resume:
        return None
    ends_with_best = bool(context.config.training.get("load_best_model_at_end"))
    point = context.ranks.share(lambda: find_resume_point(context.output_dir, ends_with_best))
    if point.checkpoint:
        require_state_to_go_on(point.checkpoint)
    return point


def _record_notes(context: RunContext, micro_batch: MicroBatch, point: ResumePoint | None) -> None:
    """Show and record what of the run file is not used as it stands, and where a resumed run continues."""
    if point:
        context.notes.extend(f"not resumed from: {reason}" for reason in point.refused)
        context.notes.append(f"resuming from {point.checkpoint or 'the first step: no whole checkpoint yet'}")
    if context.config.offload_activations and not has_separate_host(context.device):
        device = context.device.type
        context.notes.append(f"offload_activations: on this {device} memory is the host's, and nothing is moved")
    if context.config.revision is not None and Path(context.config.model).expanduser().is_dir():
        decides_nothing = f"decides nothing: {context.config.model} is a folder, and no hub id"
        context.notes.append(f"revision: {context.config.revision} {decides_nothing}")
    for note in context.notes:
        context.notify(note)
    context.record.update("train", notes=context.notes, micro_batch=asdict(micro_batch))


def _load_and_adapt(
    context: RunContext, inputs: Inputs, placement: Mapping[str, Location]
) -> tuple[ExpertPeftModel, OutOfMemory, RouterLosses | None]:
    """Load, attach and check; with what is done when memory runs out from here on, and the losses of routers."""
    config, record, source = context.config, context.record, inputs.source
    started = time.monotonic()
    with record.phase("loading"):
        loaded, moments = load_to_train(context, source, placement, inputs.train)
    context.tell(f"loaded with 4-bit experts in {time.monotonic() - started:.1f} s")
    for note in config.notes:
        context.notify(note)
    kernels = routes.settings_of(loaded.model).describe(context.device, loaded.model.dtype)
    record.add("kernels", **kernels)
    context.tell(f"kernels: {routes.summarize(kernels)}")
    if config.data.packing != "padded":
        with experts_passed_by(loaded.model):  # which see each token alone
            require_no_leakage(loaded.model)
    probe = probe_batch(context, inputs, preflight_tokens(loaded.names.specs))
    recovery = make_recovery(context, loaded.model)
    with record.phase("preflight"), context.bars.task("preflight check"):
        base, probe = recovery.preflight(partial(base_forward, loaded.model), probe)
        lora = with_selected_experts(context, loaded.model, inputs, recovery)
        set_seed(context.seed)
        model = attach(loaded, lora, config.model, source.revision)
    if uses_checkpointing(config.training) and model.get_base_model().supports_gradient_checkpointing:
        # As in the training that follows: otherwise the check could need more memory than a step does.
        model.activation_checkpointing_enable()
    router_losses = take_router_losses(model, config)
    # Nothing that changes a logit may change between the two forwards of the base model.
    is_begun = lora.init == "pissa"
    if is_begun:  # of which the check has to see what training computes: the first factors taken away, and not zero
        begin_adapter(context, source, model, moments)
    with record.phase("preflight"), context.bars.task("preflight check", "layers") as progress:
        found, _ = recovery.preflight(lambda part: preflight(model, dict(part), base, progress, router_losses), probe)
    if not is_begun:  # a correction changes what the base computes, which the check compares with
        begin_adapter(context, source, model, moments)
    if loaded.fingerprint:  # which by now knows the calibration too
        record.add("model", base=loaded.fingerprint.to_json())
    record.add("model", dtype=str(model.dtype), unexpected_tensors=loaded.unexpected)
    record.add("preflight", **found)
    learning, effective = found["learning"], found["effective"]
    reached, experts = effective["experts_compared"], effective["experts"]
    context.tell(
        f"preflight check: experts at {found['four_bit']['bits_per_expert_weight']:.2f} bits a weight, "
        f"{learning['factors_learning']} adapter factors learn "
        f"({learning['factors_without_tokens']} saw no token), forward repeatable, adapter effective"
        + (f", compared on {reached} of {experts} experts" if reached < experts else "")
    )
    refusal = model.stock_layout().refusal
    record.update("adapter", stock_peft=refusal is None, stock_peft_refusal=refusal)
    if config.lora.selects:  # of which the plan knows the most that can be
        record.update("adapter", trainable=model.get_nb_trainable_parameters()[0])
    if refusal != inputs.stock_refusal:
        note_stock_refusal(context, refusal)
    return model, recovery, router_losses
