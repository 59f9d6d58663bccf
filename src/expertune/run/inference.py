"""A finished run in use: its model with the adapter, the score on its evaluation rows, an answer to a prompt."""

import gc
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from accelerate.utils import extract_model_from_parallel
from pydantic import PositiveInt
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from expertune.adapt.attach import attach
from expertune.adapt.base_model import require_same_base
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.hub import ModelSource, fetch_model
from expertune.checkpoint.load import LoadedModel, OffloadedExperts, fingerprint_of, load_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, LoraSection, RunConfig, recorded_config
from expertune.config.arguments import checked
from expertune.data import encode_prompt, prepare_examples, render_prompt, settled
from expertune.errors import CheckpointError, ConfigError, DataError, option
from expertune.evaluation.harness import Harness
from expertune.evaluation.harness_tasks import TaskFiles
from expertune.evaluation.held_out import HeldOut
from expertune.evaluation.metrics import METRICS
from expertune.generation.greedy import Batches, complete
from expertune.kernels.routes import use_settings
from expertune.layers.varlen_attention import use_sdpa_attention
from expertune.placement.device import default_device, make_kernel_settings, resolve_compute_dtype
from expertune.placement.experts import Location, expert_reader, place_experts
from expertune.planning.devices import Machine
from expertune.planning.plan import plan_for
from expertune.report.summary import render_summary
from expertune.run.beside import write_card
from expertune.run.context import RunContext
from expertune.run.directory import ADAPTER_FOLDER, adapter_in
from expertune.run.lock import hold_run_directory
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from expertune.run.source import recorded_values
from expertune.storage import notify_if_it_fails
from expertune.train.oom import Change, OutOfMemory


class OpenOptions(TypedDict, total=False):
    """How a run directory is opened: the arguments of `open_run`."""

    adapter: str | None
    model: str | Path | None
    other_base: bool
    trust_remote_code: bool


class EvaluateOptions(OpenOptions, total=False):
    """The arguments of `open_run`, and of `evaluate` those that go with `tasks`."""

    include_path: str | Path | None
    task_code: bool
    download: bool


_TASK_OPTIONS = ("include_path", "task_code", "download")

Opened = tuple[ExpertPeftModel, PreTrainedTokenizerBase]


class Run:
    """A run: what it did, and its model.

    Args:
        context: what the run was made with, or opened with.
        opened: the model and its tokenizer where they are in memory; None means that they are loaded when first used.
        options: how the run directory is opened then.
    """

    def __init__(self, context: RunContext, opened: Opened | None = None, options: OpenOptions | None = None) -> None:
        self.context = context
        self._opened, self._options = opened, options or OpenOptions()

    @property
    def config(self) -> RunConfig:
        """The run file."""
        return self.context.config

    @property
    def record(self) -> RunRecord:
        """What the run did; `run.record["eval"]["loss"]`."""
        return self.context.record

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return self.context.output_dir

    @property
    def adapter(self) -> str:
        """The name of the adapter that the model has: `adapter`, or `checkpoint-N`."""
        return self._options.get("adapter") or ADAPTER_FOLDER

    @property
    def model(self) -> ExpertPeftModel:
        """The adapted model in evaluation mode, a `PeftModel`. It stays in memory until `close` or the run's end."""
        return self._open()[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self._open()[1]

    @property
    def data(self) -> DataConfig:
        """The data section with the layout and template of the training examples, so that none of these is needed."""
        return settled(self.config.data, self.record["data"]["train"])

    @property
    def steps(self) -> int:
        """How many optimizer steps the adapter has taken."""
        at = self.adapter.removeprefix("checkpoint-")
        return int(at) if at.isdigit() else int(self.record.section("train").get("steps", 0))

    def close(self) -> None:
        """Free the model's memory; it is loaded again when it is used again."""
        self._opened = None

    def _open(self) -> Opened:
        if self._opened is None:
            self._opened = open_run(self.output_dir, **self._options)._opened
            assert self._opened is not None
        return self._opened

    def __repr__(self) -> str:
        return f"Run({str(self.output_dir)!r}, {self.record.status})"

    def _repr_html_(self) -> str:
        """The summary that ends a run, for a notebook."""
        if self.record.status != "finished":
            return f"<pre>{html.escape(repr(self))}</pre>"
        console = Console(file=io.StringIO(), record=True, width=100)
        console.print(render_summary(self.record.values, str(self.output_dir)))
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def after_training(model: ExpertPeftModel) -> ExpertPeftModel:
    """A model that was trained just now, as `open_run` gives it."""
    extract_model_from_parallel(model, keep_fp32_wrapper=False)  # accelerate's autocast around its forward
    base = model.get_base_model()
    if base.supports_gradient_checkpointing:
        # transformers before 5.21 has the older name only.
        old = base.gradient_checkpointing_disable
        getattr(base, "activation_checkpointing_disable", old)()
    model.zero_grad(set_to_none=True)
    gc.collect()  # the trainer refers to itself, and holds the optimizer's states
    return model.eval()


@dataclass(frozen=True)
class FoundRun:
    """A run directory that has been read, and nothing loaded.

    Attributes:
        context: its run file and its record.
        adapter: the folder of the adapter.
        base: where the base model lies.
    """

    context: RunContext
    adapter: Path
    base: ModelSource


def find_run(
    run_dir: str | Path,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    model: str | Path | None = None,
) -> FoundRun:
    """Read a run directory; the arguments are those of `open_run`.

    Raises:
        CheckpointError: not a run directory, no such adapter in it, or the model is gone.
        ConfigError: `adapter` is a path.
    """
    run_dir = Path(run_dir)
    record = RunRecord.load(run_dir)
    values = recorded_values(record)
    config = recorded_config(values if model is None else values | {"model": str(model)}, str(record.path), opened=True)
    folder = adapter_in(run_dir, adapter)
    for part, examples in (("train", config.data.train), ("eval", config.data.eval)):
        if examples is not None and not record.section("data").get(part):
            raise CheckpointError(
                f"{record.path}: it holds no data.{part}, which says how the examples were read; take the record as "
                "the run wrote it"
            )
    revision = record.section("model").get("revision") if model is None else None
    try:
        source = fetch_model(config.model, revision, trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. If the model has moved, give {option('model', 'MODEL')}") from None
    # On stderr: stdout is for results.
    return FoundRun(RunContext(config, record, default_device(), Bars(Console(stderr=True))), folder, source)


@checked
def open_run(
    run_dir: str | Path,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    model: str | Path | None = None,
) -> Run:
    """Load the base model and the adapter of a run.

    Args:
        run_dir: a run directory.
        adapter: `checkpoint-N` for an earlier state; None means the final adapter.
        trust_remote_code: run Python that ships with the model; what the run was started with does not count.
        other_base: put the adapter on the model though its weights are not those that it was trained on.
        model: directory or hub id of the base model, where it lies elsewhere by now than the record says.

    Raises:
        CheckpointError: not a run directory, no such adapter in it, or the model's weights are others by now.
        ConfigError: `adapter` is a path; an adapter elsewhere is loaded with `load_adapter`.
    """
    found = find_run(run_dir, adapter, trust_remote_code, model)
    context, source, folder = found.context, found.base, found.adapter
    config = context.config
    if not other_base:
        base = fingerprint_of(source.folder, trust_remote_code, notify=context.notify)
        require_same_base(folder, base, config.model, allowed_by=f"give {option('other-base')}")
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    loaded = load_base(context, source, _places(context, source))
    lora = LoraSection(init_from=str(folder), init_from_other_base=other_base)
    adapted = attach(loaded, lora, config.model, source.revision)
    options = OpenOptions(adapter=adapter, trust_remote_code=trust_remote_code, other_base=other_base, model=model)
    return Run(context, (adapted.eval(), tokenizer), options)


@checked
def evaluate(
    run: Run | str | Path,
    rows: PositiveInt | None = None,
    base_only: bool = False,
    tasks: str | Sequence[str] | None = None,
    **options: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Loss, and the task's metric where the run has one that is registered here, on the run's evaluation examples.

    With `tasks`, instead of these, tasks of lm-evaluation-harness with the adapter and without it, which the run's
    record then holds as well.

    Args:
        run: a run directory, or a run.
        rows: how many examples the metric, or each task, is taken on; None means what the run file says, or all.
        base_only: score the base model without the adapter.
        tasks: names of tasks, as a list or separated by commas.
        **options: how a run directory is opened, see `open_run`; and with `tasks` `include_path`, a folder of task
            files, `task_code`, which runs the Python that these name, and `download`, which fetches what a task needs
            from the hub.

    Returns:
        `adapter`, `loss` in nats per token, `task` as `expertune.evaluation.scoring.score_task` returns it, and
        `recoveries`: what was changed when memory ran out, as in the record. With `tasks`: `adapter`, and `tasks` as
        the record has it.

    Raises:
        ConfigError: the run has no evaluation examples, or a task cannot be run.
        CheckpointError: see `open_run`.
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    of_tasks = {name: options.pop(name) for name in _TASK_OPTIONS if name in options}  # type: ignore[misc]
    if tasks is not None:
        names = tasks.split(",") if isinstance(tasks, str) else tasks
        files = TaskFiles([name.strip() for name in names], **of_tasks)  # before a model is loaded
        return _evaluate_tasks(_opened_run(run, options), files, rows, base_only)
    if of_tasks:
        raise ConfigError(f"{', '.join(of_tasks)}: of use with {option('tasks', 'NAME')} only")
    run = _opened_run(run, options)
    if run.config.data.eval is None:
        raise ConfigError(f"{run.output_dir}: the run has no data.eval examples to evaluate on")
    examples = prepare_examples(settled(run.config.data, run.record["data"]["eval"]), "eval", run.tokenizer)
    result: dict[str, Any] = {"adapter": "none" if base_only else run.adapter}
    step = 0 if base_only else run.steps
    changes: list[Change] = []
    recovery = _recovery(run, changes)
    held_out = HeldOut(run.config, run.model, run.tokenizer, examples, recovery, run.context.bars)
    result["loss"] = held_out.loss(step, base_only)
    metric = run.config.task.metric
    if metric in METRICS:
        result["task"] = held_out.score(step, rows, base_only)
    elif metric:
        run.context.notify(
            f"task.metric: {metric} is not registered in this process, and only the loss is taken; import the module "
            f"that registers it under @metric({metric!r}, ...), from expertune.evaluation.metrics"
        )
    result["recoveries"] = [change.to_json() for change in changes]
    return result


def _evaluate_tasks(run: Run, files: TaskFiles, rows: int | None, base_only: bool) -> dict[str, Any]:
    """Score tasks of the harness, and add the scores to the run's record."""
    harness = Harness(run.model, run.tokenizer, files, run.config.task.batch_size, run.context.notify)
    found: dict[str, dict[str, Any]] = {}
    for which in ["none"] if base_only else ["none", run.adapter]:
        with run.model.disable_adapter() if which == "none" else nullcontext():
            for name, score in harness.scores(rows).items():
                found.setdefault(name, {})[which] = score
    notify_if_it_fails("the scores in record.json", lambda: _record_tasks(run, found), run.context.notify)
    return {"adapter": "none" if base_only else run.adapter, "tasks": found}


def _record_tasks(run: Run, found: dict[str, dict[str, Any]]) -> None:
    with hold_run_directory(run.output_dir):
        record = RunRecord.load(run.output_dir)  # as it is by now
        for name, scores in found.items():
            record.add("tasks", **{name: {**record.section("tasks").get(name, {}), **scores}})
        record.save()
    run.record.values["tasks"] = record.values["tasks"]
    write_card(record.values, run.config, run.output_dir / ADAPTER_FOLDER)


@checked
def generate(
    run: Run | str | Path,
    prompt: str | Mapping[str, Any],
    max_new_tokens: PositiveInt = 100,
    base_only: bool = False,
    **opening: Unpack[OpenOptions],
) -> str:
    """Answer a prompt, put through the run's template, greedily; white space around the answer is taken off.

    Args:
        run: a run directory, or a run.
        prompt: the user's text; or the columns of an example without its answer, e.g. `instruction` and `context`.
        max_new_tokens: the longest answer.
        base_only: answer without the adapter.
        **opening: how a run directory is opened; see `open_run`.

    Raises:
        ConfigError: the prompt holds no text.
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise ConfigError("generate: the prompt holds no text; write one")
    run = _opened_run(run, opening)
    in_parts = partial(_recovery(run, []).in_parts, "generation", step=0 if base_only else run.steps)
    try:
        text = render_prompt(prompt, run.data, run.tokenizer)
    except DataError as error:
        raise DataError(f"prompt: {error}; give an example of this run without its answer, or its text alone") from None
    ids = encode_prompt(text, run.tokenizer)
    with run.model.disable_adapter() if base_only else nullcontext():
        return complete(run.model, run.tokenizer, [ids], max_new_tokens, batches=Batches(in_parts))[0].strip()


def _opened_run(run: Run | str | Path, opening: OpenOptions) -> Run:
    if not isinstance(run, Run):
        return open_run(run, **opening)
    if opening:
        raise ConfigError(f"{', '.join(opening)}: {run!r} is made already; give its directory to open it otherwise")
    return run


def _recovery(run: Run, changes: list[Change]) -> OutOfMemory:
    def keep(change: Change) -> None:
        run.context.notify(change.line)
        changes.append(change)

    return OutOfMemory(run.model, run.context.device, notify=keep)


def _places(context: RunContext, source: ModelSource) -> Mapping[str, Location]:
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


def load_base(context: RunContext, source: ModelSource, places: Mapping[str, Location]) -> LoadedModel:
    """The model with its experts at their locations; a run that is opened again has what its record says."""
    config, device = context.config, context.device
    recorded = context.record.section("kernels")
    settings = make_kernel_settings(config.kernels, recorded.get("crossover"), recorded.get("gemm"))
    dtype = resolve_compute_dtype(config.quantization.compute_dtype, device)
    loaded = load_model(
        source.folder,
        config.quantization,
        dtype,
        device,
        source.trust_remote_code,
        OffloadedExperts(
            expert_reader(places, device),
            [name for name, place in places.items() if place == "host"],
            context.sharing,
        ),
    )
    use_settings(loaded.model, settings)
    place_experts(loaded.model, places, device, source.folder)
    if config.data.packing == "padded":
        use_sdpa_attention(loaded.model)
    return loaded
