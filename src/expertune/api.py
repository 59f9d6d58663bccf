"""The corridor: config -> plan -> data -> load -> adapt -> train -> evaluate / generate -> report.

`finetune` reads like that sentence. Each step is a function here or in the room of its name, and can be called alone.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from expertune.adapt.attach import attach
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.proof import probe_logits, prove
from expertune.attention import attend_by_batch, require_rows_apart
from expertune.checkpoint.hub import ModelSource, fetch_model
from expertune.checkpoint.load import LoadedModel, load_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, LoraSection, RunConfig, check_training_arguments, load_config, parse_config
from expertune.data import (
    TokenizedRows,
    encode_prompt,
    make_collator,
    make_dataset,
    plot_lengths,
    prepare_rows,
    render_prompt,
)
from expertune.errors import CheckpointError, ConfigError, DataError, ExpertuneError, ProofError
from expertune.evaluation import evaluation_loss, score_task
from expertune.generation import complete
from expertune.kernels import routes
from expertune.placement.device import bound_host_memory, default_device, resolve_compute_dtype, set_up_kernels
from expertune.placement.experts import Place, place_experts, placement_of, reading
from expertune.plan import MicroBatch, make_plan
from expertune.plan.memory import PROOF_TOKENS, uses_checkpointing
from expertune.record import RECORD_NAME, RunRecord, versions
from expertune.report.plots import plot_summary
from expertune.report.summary import render_summary
from expertune.train.callbacks import History, ProgressBar, peak_memory_bytes
from expertune.train.checkpoints import find_resume_point, list_checkpoints
from expertune.train.ladder import Change
from expertune.train.loss import LanguageModelLoss
from expertune.train.offload import has_host_apart
from expertune.train.recover import Recovery
from expertune.train.trainer import ExpertTrainer, training_arguments

__all__ = ["OpenRun", "Run", "evaluate", "finetune", "generate", "make_plan", "open_run"]

ADAPTER_FOLDER = "adapter"

# What a resumed run may set otherwise: nothing here changes a single weight.
_FREE_AT_RESUME = frozenset({"report_to", "run_name", "logging_dir", "save_total_limit", "disable_tqdm", "log_level"})


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        output_dir: the run folder.
        record: what the run did.
    """

    output_dir: Path
    record: RunRecord


@dataclass(frozen=True)
class OpenRun:
    """A run folder opened for use.

    Attributes:
        config: the run file as it was.
        record: what the run did.
        model: the adapted model, in evaluation mode.
        tokenizer: the base model's tokenizer.
    """

    config: RunConfig
    record: RunRecord
    model: ExpertPeftModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def data(self) -> DataConfig:
        """The data section with the layout and template that the training rows settled, so that no row is needed."""
        report = self.record["data"]["train"]
        return self.config.data.model_copy(update={"format": report["format"], "template": report["template"]})


def finetune(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Run a whole fine-tuning run and leave its folder behind.

    Args:
        config: a run file or its parsed content.
        overrides: `section.key=value` strings on top of a run file.
        resume: continue from the newest whole checkpoint of the run folder; the result is byte-identical to a run
            that was never interrupted (on the same machine, CPU).
        console: where to tell what happens; None means stderr.

    Raises:
        ExpertuneError: anything that the user can mend; see `expertune.errors`.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    console = console or Console(stderr=True)
    bound_host_memory()
    check_training_arguments(config.training)
    output_dir = Path(config.output_dir)
    record = _open_record(config, output_dir, resume)

    plan = make_plan(config, began_with=_merged_before(record, output_dir))
    plan.require_fit()
    console.print(plan.parameters.line, soft_wrap=True)

    source = fetch_model(config.model, config.revision, config.trust_remote_code)
    tokenizer = load_tokenizer(source.folder, config.trust_remote_code)
    # Nothing has been written so far: a mistake in the run file or in a row leaves no folder behind.
    train_rows, eval_rows = _prepare_data(config, tokenizer, output_dir, record, console)

    device = default_device()
    record.update("model", name=config.model, revision=source.revision, device=str(device))
    record.update("plan", **plan.to_json())
    with _stops_recorded(record):
        model, recovery = _load_and_adapt(
            config, source, tokenizer, train_rows, plan.placement, device, record, console
        )
        if config.task.metric and eval_rows and "before" not in record.values.get("task", {}):
            # A folder to resume from may hold the score already; it was taken on the same bytes.
            score = _score(config, model, tokenizer, eval_rows, recovery, step=0, base_only=True)
            record.update("task", before=score)
            console.print(_score_line("before", record["task"]["before"]))

        _train(config, plan.micro_batch, model, tokenizer, train_rows, eval_rows, recovery, resume, record, console)
        recovery.anew("checkpoint", lambda: model.save_pretrained(str(output_dir / ADAPTER_FOLDER)))

        if config.task.metric and eval_rows:
            score = _score(config, model, tokenizer, eval_rows, recovery, step=record["train"]["steps"])
            record.update("task", after=score)
            console.print(_score_line("after", record["task"]["after"]))
    record.update("memory", peak_bytes=peak_memory_bytes())
    record.update("run", status="finished")
    plot_summary(record.values, output_dir / "summary.png")
    console.print(render_summary(record.values, config.output_dir), soft_wrap=True)
    return Run(output_dir, record)


def open_run(run_dir: str | Path, adapter: str | None = None) -> OpenRun:
    """Load the base model and the adapter of a run.

    Args:
        run_dir: a run folder.
        adapter: `checkpoint-N` for an earlier state; None means the final adapter.

    Raises:
        CheckpointError: not a run folder, or no such adapter in it.
    """
    run_dir = Path(run_dir)
    bound_host_memory()
    record = RunRecord.load(run_dir)
    config = parse_config(record["config"], where=str(record.path))
    folder = run_dir / (adapter or ADAPTER_FOLDER)
    if not folder.is_dir():
        have = ", ".join(sorted(path.name for path in run_dir.glob("checkpoint-*"))) or "none"
        raise CheckpointError(f"{folder}: no such adapter; the run may not have finished. Checkpoints here: {have}")
    source = fetch_model(config.model, record.values.get("model", {}).get("revision"), config.trust_remote_code)
    tokenizer = load_tokenizer(source.folder, config.trust_remote_code)
    loaded = _load(config, source, default_device(), record, record.values.get("placement", {}).get("places", {}))
    model = attach(loaded, LoraSection(init_from=str(folder)), config.model, source.revision)
    model.eval()
    return OpenRun(config, record, model, tokenizer)


def evaluate(
    run_dir: str | Path, adapter: str | None = None, rows: int | None = None, base_only: bool = False
) -> dict[str, Any]:
    """Loss, and the task's metric where the run has one, on the run's evaluation rows.

    Args:
        run_dir: a run folder.
        adapter: `checkpoint-N` for an earlier state.
        rows: how many rows the metric is taken on; None means what the run file says.
        base_only: score the base model without the adapter.

    Returns:
        `adapter`, `loss` in nats per token, `task` as `expertune.evaluation.score_task` returns it where the run has a
        metric, and `recoveries`: what was changed when memory ran out, as in the record.

    Raises:
        ConfigError: the run has no evaluation rows.
        CheckpointError: see `open_run`.
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    run = open_run(run_dir, adapter)
    if run.config.data.eval is None:
        raise ConfigError(f"{run_dir}: the run has no data.eval rows to evaluate on")
    eval_rows = prepare_rows(run.config.data, "eval", run.tokenizer)
    dataset = make_dataset(eval_rows, run.config.data)
    collator = make_collator(run.config.data, run.tokenizer)
    result: dict[str, Any] = {"adapter": "none" if base_only else adapter or ADAPTER_FOLDER}
    step = 0 if base_only else _steps_of(run.record, adapter)
    changes: list[Change] = []

    def tell(change: Change) -> None:
        _say_aside(change)
        changes.append(change)

    recovery = Recovery(run.model, default_device(), tell=tell)
    with _adapter_switched(run.model, off=base_only):
        loss = LanguageModelLoss(run.model, run.config.loss)
        in_parts = partial(recovery.evaluation, step=step)
        result["loss"] = evaluation_loss(run.model, dataset, collator, 8, loss.summed, in_parts)
    if run.config.task.metric:
        result["task"] = _score(run.config, run.model, run.tokenizer, eval_rows, recovery, step, rows, base_only)
    result["recoveries"] = [change.to_json() for change in changes]
    return result


def generate(
    run_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 100,
    base_only: bool = False,
    adapter: str | None = None,
) -> str:
    """Complete a prompt, put through the run's template, greedily.

    Args:
        run_dir: a run folder.
        prompt: the user's text.
        max_new_tokens: the longest answer.
        base_only: answer without the adapter.
        adapter: `checkpoint-N` for an earlier state.

    Raises:
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    run = open_run(run_dir, adapter)
    recovery = Recovery(run.model, default_device(), tell=_say_aside)
    in_parts = partial(recovery.generation, step=0 if base_only else _steps_of(run.record, adapter))
    ids = encode_prompt(render_prompt(prompt, run.data, run.tokenizer), run.tokenizer)
    with _adapter_switched(run.model, off=base_only):
        return complete(run.model, run.tokenizer, [ids], max_new_tokens, in_parts=in_parts)[0]


def _open_record(config: RunConfig, output_dir: Path, resume: bool) -> RunRecord:
    """A fresh record, or the old one of the same configuration; nothing is written yet."""
    record = RunRecord.start(output_dir)
    # A run that stopped before its first checkpoint has left nothing that starting over could lose.
    has_work = bool(list_checkpoints(output_dir)) or (output_dir / ADAPTER_FOLDER).exists()
    if has_work and not resume:
        raise ConfigError(f"{output_dir} already holds a run; continue it with --resume, or choose another output_dir")
    if resume and (output_dir / RECORD_NAME).exists():
        record = RunRecord.load(output_dir)
        _require_same_config(record, config)
        record.values["versions"] = versions()
    record.values["config"] = config.model_dump(mode="json", exclude_unset=True)
    started = record.values.get("run", {}).get("started", time.time())
    record.values["run"] = {"status": "running", "started": started}
    return record


@contextmanager
def _stops_recorded(record: RunRecord) -> Iterator[None]:
    """Keep in the record why a run stopped."""
    try:
        yield
    except ExpertuneError as error:
        if isinstance(error, ProofError):
            record.update("proof", passed=False, failed=str(error))
        record.update("run", status="stopped", error=str(error))
        raise


def _require_same_config(record: RunRecord, config: RunConfig) -> None:
    old, new = record["config"], config.model_dump(mode="json", exclude_unset=True)
    for section in sorted((old.keys() | new.keys()) - {"output_dir", "memory_budget", "task"}):
        before, now = old.get(section), new.get(section)
        if isinstance(before, dict) and isinstance(now, dict):
            changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            changed = [key for key in changed if not (section == "training" and key in _FREE_AT_RESUME)]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"--resume: {section}.{key} was {before.get(key)!r} when the run started and is {now.get(key)!r} "
                    "now; resume with the same values, or start a new output_dir"
                )
        elif before != now:
            raise ConfigError(f"--resume: {section} was {before!r} when the run started and is {now!r} now")


def _require_same_files(record: RunRecord, reports: dict[str, Any]) -> None:
    """A resumed run must read the rows that it started with: their order and text decide every step."""
    for part, before in record.values.get("data", {}).items():
        now = reports[part]
        if before and now and before["sha256"] != now["sha256"]:
            changed = [name for name in now["sha256"] if before["sha256"].get(name) != now["sha256"][name]]
            raise DataError(
                f"--resume: data.{part}: {', '.join(changed) or 'a file'} has changed since the run started; restore "
                "it, or start a new output_dir"
            )


def _prepare_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, output_dir: Path, record: RunRecord, console: Console
) -> tuple[TokenizedRows, TokenizedRows | None]:
    train_rows = prepare_rows(config.data, "train", tokenizer)
    eval_rows = prepare_rows(config.data, "eval", tokenizer) if config.data.eval else None
    reports = {"train": train_rows.report, "eval": eval_rows.report if eval_rows else None}
    _require_same_files(record, reports)
    record.update("data", **reports)
    lengths = [row.uncut_length for part in (train_rows, eval_rows) if part for row in part.rows]
    plot_lengths(lengths, output_dir / "lengths.png", config.data.max_length)
    report = train_rows.report
    console.print(
        f"data: {report['num_rows']} training rows, {report['num_truncated']} cut at {config.data.max_length} tokens, "
        f"{report['num_skipped']} skipped; lengths in {output_dir / 'lengths.png'}",
        soft_wrap=True,
    )
    return train_rows, eval_rows


def _load_and_adapt(
    config: RunConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenizedRows,
    places: Mapping[str, Place],
    device: torch.device,
    record: RunRecord,
    console: Console,
) -> tuple[ExpertPeftModel, Recovery]:
    """Load, attach and prove; from here on, what is done when memory runs out."""
    started = time.monotonic()
    loaded = _load(config, source, device, record, places)
    console.print(f"loaded with 4-bit experts in {time.monotonic() - started:.1f} s")
    kernels = routes.describe(device, loaded.model.dtype)
    record.update("kernels", **kernels)
    console.print(f"kernels: {routes.say(kernels)}", soft_wrap=True)
    if config.data.packing != "padded":
        require_rows_apart(loaded.model)
    probe = _probe_batch(config, tokenizer, rows, device)
    recovery = _recovery(config, loaded.model, device, record, console)
    base_logits, probe = recovery.proof_batch(partial(probe_logits, loaded.model), probe)
    set_seed(config.training.get("seed", 42))
    model = attach(loaded, config.lora, config.model, source.revision)
    if uses_checkpointing(config.training) and model.get_base_model().supports_gradient_checkpointing:
        # As the training that follows: otherwise the proof could need more memory than a step does.
        model.activation_checkpointing_enable()
    # Nothing that changes a logit may give way between the two looks at the base model.
    proof = recovery.anew("proof", lambda: prove(model, probe, base_logits))
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


def _load(
    config: RunConfig, source: ModelSource, device: torch.device, record: RunRecord, places: Mapping[str, Place]
) -> LoadedModel:
    """The model with its experts where they are to wait; a run that is opened again has what its record says."""
    kept = record.values.get("kernels", {})
    set_up_kernels(config.kernels, kept.get("crossover"), kept.get("gemm"))
    dtype = resolve_compute_dtype(config.quantization.compute_dtype, device)
    loaded = load_model(
        source.folder,
        config.quantization,
        dtype,
        device,
        config.trust_remote_code,
        read_experts=reading(places, device),
        on_host=[name for name, place in places.items() if place == "host"],
    )
    place_experts(loaded.model, places, device, source.folder)
    if config.data.packing == "padded":
        attend_by_batch(loaded.model)
    return loaded


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


def _merged_before(record: RunRecord, output_dir: Path) -> int | None:
    """How many micro-batches ran as one until the newest checkpoint; None where there is none to go on from."""
    if not list_checkpoints(output_dir):
        return None
    return int(record.values.get("train", {}).get("micro_batch", {}).get("merged", 1))


def _train(
    config: RunConfig,
    micro_batch: MicroBatch,
    model: ExpertPeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: TokenizedRows,
    eval_rows: TokenizedRows | None,
    recovery: Recovery,
    resume: bool,
    record: RunRecord,
    console: Console,
) -> None:
    output_dir, device = Path(config.output_dir), recovery.ladder.device
    args, notes = training_arguments(micro_batch.apply(config.training), str(output_dir), device)
    if micro_batch.line:
        notes.append(micro_batch.line)
    checkpoint = None
    if resume:
        point = find_resume_point(output_dir)
        checkpoint = str(point.checkpoint) if point.checkpoint else None
        notes += [f"not resumed from: {reason}" for reason in point.refused]
        notes.append(f"resuming from {checkpoint or 'the first step: no whole checkpoint yet'}")
    if config.offload_activations and not has_host_apart(device):
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
        eval_dataset=make_dataset(eval_rows, config.data) if eval_rows else None,
        collator=make_collator(config.data, tokenizer, keep_row_ids=True),
        history=History(),
        row_places=lambda row_id: train_rows.rows[row_id].place,
        loss=LanguageModelLoss(model, config.loss, say=say),
        recovery=recovery,
    )
    bar = ProgressBar(lambda: trainer.history, console)
    trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        bar.close()
        history = trainer.history
        record.update("train", loss=history.losses, steps=trainer.state.global_step)
        record.update("eval", loss=history.eval_losses)
        record.update("throughput", tokens_per_second=history.tokens_per_second, tokens=history.tokens)
        record.update("memory", peak_bytes=peak_memory_bytes())
        record.update("kernels", ran=routes.describe(device, model.dtype)["ran"])
        if placement := placement_of(model):
            record.update("placement", places=placement.places, **placement.describe())


def _score(
    config: RunConfig,
    model: ExpertPeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_rows: TokenizedRows,
    recovery: Recovery,
    step: int,
    rows: int | None = None,
    base_only: bool = False,
) -> dict[str, Any]:
    task = config.task if rows is None else config.task.model_copy(update={"rows": rows})
    with _adapter_switched(model, off=base_only):
        in_parts = partial(recovery.generation, step=step)
        return score_task(model, tokenizer, eval_rows.rows, task, in_parts=in_parts)


def _say_aside(change: Change) -> None:
    """On stderr: stdout is for results."""
    Console(stderr=True).print(change.line, soft_wrap=True)


def _steps_of(record: RunRecord, adapter: str | None) -> int:
    """How many optimizer steps an adapter has taken."""
    at = (adapter or "").removeprefix("checkpoint-")
    return int(at) if at.isdigit() else int(record.values.get("train", {}).get("steps", 0))


def _score_line(when: str, score: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {score[name]:.3f}" for name in ("slot_f1", "exact_match") if name in score)
    return f"{when}: {figures} on {score['rows']} evaluation rows"


@contextmanager
def _adapter_switched(model: ExpertPeftModel, off: bool) -> Iterator[None]:
    if off:
        with model.disable_adapter():
            yield
    else:
        yield
