"""A finished run in use: its model with the adapter."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedTokenizerBase

from expertune.adapt.attach import attach
from expertune.adapt.base_model import note_other_base, require_same_base
from expertune.adapt.files import read_adapter_base
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.formats.nf4_folder import is_nf4_folder
from expertune.checkpoint.hub import ModelSource, fetch_model
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, LoraSection, QuantizationConfig, RunConfig, recorded_config
from expertune.config.arguments import checked
from expertune.data import settled
from expertune.distributed.output import console_of
from expertune.errors import CheckpointError, ConfigError, option
from expertune.placement.device import default_device
from expertune.report.notebook import run_html
from expertune.run.base_model import identify_base, load_base, recorded_places
from expertune.run.context import RunContext
from expertune.run.directory import adapter_in
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from expertune.run.source import recorded_values
from expertune.run.written import ADAPTER_FOLDER, TO_OPEN, whole_adapter
from expertune.train.oom import Change, OutOfMemory


class OpenOptions(TypedDict, total=False):
    """How a run directory is opened: the arguments of `open_run`."""

    adapter: str | None
    model: str | Path | None
    other_base: bool
    trust_remote_code: bool


_OF_FOLDERS = frozenset({"scheme", "double_quantization", "fit", "layers"})
"""Keys of `quantization` that an NF4 folder has been made with."""

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
        """What came out, the losses, and where the report is, for a notebook."""
        return run_html(self.record.values, self.output_dir)


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
    whole_adapter(folder, TO_OPEN)
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
    return FoundRun(
        RunContext(config, record, default_device(), Bars(console_of(rank=0, console=None))), folder, source
    )


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
    options = OpenOptions(adapter=adapter, trust_remote_code=trust_remote_code, other_base=other_base, model=model)
    found = find_run(run_dir, adapter, trust_remote_code, model)
    return load_run(found, load_tokenizer(found.base.folder, trust_remote_code), options)


def load_run(found: FoundRun, tokenizer: PreTrainedTokenizerBase, options: OpenOptions) -> Run:
    """Load the base model and the adapter of a run directory that has been read; see `open_run`.

    Args:
        found: the run directory.
        tokenizer: the base model's.
        options: what `found` was found with, and `other_base`.
    """
    context, source, folder = found.context, found.base, found.adapter
    config, other_base = context.config, options.get("other_base", False)
    if is_nf4_folder(source.folder) and (other_base or read_adapter_base(folder) is not None):
        loading = replace(context, config=_held_as_stored(config))
    else:
        loading = context
    with context.bars.task("looking at the model's files"):
        base = identify_base(loading, source)
    if other_base:
        if note := note_other_base(folder, base):
            context.notify(note)
    else:
        require_same_base(folder, base, config.model, allowed_by=f"give {option('other-base')}")
    loaded = load_base(loading, source, recorded_places(loading, source))
    lora = LoraSection(init_from=str(folder), init_from_other_base=other_base)
    adapted = attach(loaded, lora, config.model, source.revision)
    return Run(context, (adapted.eval(), tokenizer), options)


def _held_as_stored(config: RunConfig) -> RunConfig:
    """The run file without what an NF4 folder says of itself: whether these are the run's weights, fingerprints say."""
    asked = config.quantization
    kept = {key: getattr(asked, key) for key in asked.model_fields_set - _OF_FOLDERS}
    return config.model_copy(update={"quantization": QuantizationConfig(**kept)})


def opened_run(run: Run | str | Path, opening: OpenOptions) -> Run:
    """A run as it is, or the one in a directory, opened.

    Raises:
        ConfigError: options were given for a run that is open.
        CheckpointError: see `open_run`.
    """
    if not isinstance(run, Run):
        return open_run(run, **opening)
    if opening:
        raise ConfigError(f"{', '.join(opening)}: {run!r} is made already; give its directory to open it otherwise")
    return run


def recovery_of(run: Run, changes: list[Change]) -> OutOfMemory:
    """What is done when memory runs out while the run is used; `changes` gets what was changed."""

    def keep(change: Change) -> None:
        run.context.notify(change.line)
        changes.append(change)

    return OutOfMemory(run.model, run.context.device, notify=keep)
