"""A finished run in use: its model with the adapter, the score on its evaluation rows, an answer to a prompt."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from expertune.adapt.attach import attach
from expertune.adapt.base_model import require_same_base
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.hub import ModelSource, fetch_model
from expertune.checkpoint.load import LoadedModel, OffloadedExperts, fingerprint_of, load_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, LoraSection, RunConfig, recorded_config
from expertune.data import (
    encode_prompt,
    prepare_rows,
    render_prompt,
    settled,
)
from expertune.errors import CheckpointError, ConfigError
from expertune.evaluation.held_out import HeldOut
from expertune.generation.chat import complete
from expertune.layers.varlen_attention import use_sdpa_attention
from expertune.placement.device import default_device, resolve_compute_dtype, set_up_kernels
from expertune.placement.experts import Location, expert_reader, place_experts
from expertune.run.context import RunContext
from expertune.run.directory import ADAPTER_FOLDER
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from expertune.run.source import recorded_values
from expertune.train.oom import Change, OutOfMemory


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
        return settled(self.config.data, self.record["data"]["train"])


def open_run(
    run_dir: str | Path,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    model: str | None = None,
) -> OpenRun:
    """Load the base model and the adapter of a run.

    Args:
        run_dir: a run folder.
        adapter: `checkpoint-N` for an earlier state; None means the final adapter.
        trust_remote_code: run Python that ships with the model; what the run was started with does not count.
        other_base: put the adapter on the model though its weights are not those that it was trained on.
        model: folder or hub id of the base model, where it lies elsewhere by now than the record says.

    Raises:
        CheckpointError: not a run folder, no such adapter in it, or the model's weights are others by now.
    """
    run_dir = Path(run_dir)
    record = RunRecord.load(run_dir)
    values = recorded_values(record)
    config = recorded_config(values if model is None else values | {"model": model}, where=str(record.path))
    folder = run_dir / (adapter or ADAPTER_FOLDER)
    if not folder.is_dir():
        have = ", ".join(sorted(path.name for path in run_dir.glob("checkpoint-*"))) or "none"
        raise CheckpointError(f"{folder}: no such adapter; the run may not have finished. Checkpoints here: {have}")
    for part, rows in (("train", config.data.train), ("eval", config.data.eval)):
        if rows is not None and not record.values.get("data", {}).get(part):
            raise CheckpointError(
                f"{record.path}: it holds no data.{part}, which says how the rows were read; take the record as the "
                "run wrote it"
            )
    revision = record.values.get("model", {}).get("revision") if model is None else None
    try:
        source = fetch_model(config.model, revision, trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. If the model has moved, give --model (model=)") from None
    if not other_base:
        base = fingerprint_of(source.folder, trust_remote_code, notify=_say_line)
        require_same_base(folder, base, config.model, allowed_by="give --other-base")
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    context = RunContext(config, record, default_device(), Bars(Console(stderr=True)))
    loaded = load_base(context, source, record.values.get("placement", {}).get("places", {}))
    lora = LoraSection(init_from=str(folder), init_from_other_base=other_base)
    adapted = attach(loaded, lora, config.model, source.revision)
    adapted.eval()
    return OpenRun(config, record, adapted, tokenizer)


def evaluate(
    run_dir: str | Path,
    adapter: str | None = None,
    rows: int | None = None,
    base_only: bool = False,
    trust_remote_code: bool = False,
    other_base: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Loss, and the task's metric where the run has one, on the run's evaluation rows.

    Args:
        run_dir: a run folder.
        adapter: `checkpoint-N` for an earlier state.
        rows: how many rows the metric is taken on; None means what the run file says.
        base_only: score the base model without the adapter.
        trust_remote_code: see `open_run`.
        other_base: see `open_run`.
        model: see `open_run`.

    Returns:
        `adapter`, `loss` in nats per token, `task` as `expertune.evaluation.scoring.score_task` returns it where the
        run has a metric, and `recoveries`: what was changed when memory ran out, as in the record.

    Raises:
        ConfigError: the run has no evaluation rows.
        CheckpointError: see `open_run`.
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    run = open_run(run_dir, adapter, trust_remote_code, other_base, model)
    if run.config.data.eval is None:
        raise ConfigError(f"{run_dir}: the run has no data.eval rows to evaluate on")
    eval_rows = prepare_rows(settled(run.config.data, run.record["data"]["eval"]), "eval", run.tokenizer)
    result: dict[str, Any] = {"adapter": "none" if base_only else adapter or ADAPTER_FOLDER}
    step = 0 if base_only else _steps_of(run.record, adapter)
    changes: list[Change] = []

    def tell(change: Change) -> None:
        _say_aside(change)
        changes.append(change)

    recovery = OutOfMemory(run.model, default_device(), notify=tell)
    held_out = HeldOut(run.config, run.model, run.tokenizer, eval_rows, recovery, Bars(Console(stderr=True)))
    result["loss"] = held_out.loss(step, base_only)
    if run.config.task.metric:
        result["task"] = held_out.score(step, rows, base_only)
    result["recoveries"] = [change.to_json() for change in changes]
    return result


def generate(
    run_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 100,
    base_only: bool = False,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    model: str | None = None,
) -> str:
    """Complete a prompt, put through the run's template, greedily.

    Args:
        run_dir: a run folder.
        prompt: the user's text.
        max_new_tokens: the longest answer.
        base_only: answer without the adapter.
        adapter: `checkpoint-N` for an earlier state.
        trust_remote_code: see `open_run`.
        other_base: see `open_run`.
        model: see `open_run`.

    Raises:
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    run = open_run(run_dir, adapter, trust_remote_code, other_base, model)
    recovery = OutOfMemory(run.model, default_device(), notify=_say_aside)
    in_parts = partial(recovery.in_parts, "generation", step=0 if base_only else _steps_of(run.record, adapter))
    ids = encode_prompt(render_prompt(prompt, run.data, run.tokenizer), run.tokenizer)
    with run.model.disable_adapter() if base_only else nullcontext():
        return complete(run.model, run.tokenizer, [ids], max_new_tokens, in_parts=in_parts)[0]


def load_base(context: RunContext, source: ModelSource, places: Mapping[str, Location]) -> LoadedModel:
    """The model with its experts at their locations; a run that is opened again has what its record says."""
    config, device = context.config, context.device
    recorded = context.record.values.get("kernels", {})
    set_up_kernels(config.kernels, recorded.get("crossover"), recorded.get("gemm"))
    dtype = resolve_compute_dtype(config.quantization.compute_dtype, device)
    loaded = load_model(
        source.folder,
        config.quantization,
        dtype,
        device,
        source.trust_remote_code,
        OffloadedExperts(expert_reader(places, device), [name for name, place in places.items() if place == "host"]),
    )
    place_experts(loaded.model, places, device, source.folder)
    if config.data.packing == "padded":
        use_sdpa_attention(loaded.model)
    return loaded


def _steps_of(record: RunRecord, adapter: str | None) -> int:
    """How many optimizer steps an adapter has taken."""
    at = (adapter or "").removeprefix("checkpoint-")
    return int(at) if at.isdigit() else int(record.values.get("train", {}).get("steps", 0))


def _say_aside(change: Change) -> None:
    _say_line(change.line)


def _say_line(line: str) -> None:
    """On stderr: stdout is for results."""
    Console(stderr=True).print(line, soft_wrap=True)
