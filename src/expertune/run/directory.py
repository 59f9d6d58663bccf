"""A run directory that is started or resumed: its record, and what must not have changed for a resumed run."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertune.checkpoint.adapter_folder import WEIGHTS_NAME, adapter_digests
from expertune.config import TRUST_KEY, RunConfig, with_current_names
from expertune.config.secrets import without_secrets
from expertune.errors import CheckpointError, ConfigError, PreflightError, option
from expertune.run.lock import hold_run_directory
from expertune.run.record import RECORD_NAME, RunRecord, versions
from expertune.run.signals import Terminated, signals_raised
from expertune.run.source import directories, recorded_values
from expertune.run.written import ADAPTER_FOLDER
from expertune.storage import hash_file
from expertune.text import counted
from expertune.train.checkpoints import list_checkpoints

INITIAL_ADAPTER = "initial_adapter"
"""The adapter as a run began, where that is not the base (`lora.init`)."""
FIRST_FACTORS = "first_factors.safetensors"
"""The factors that an adapter began with, where these are taken away from what it gives (`lora.init: pissa`)."""
CALIBRATION = "calibration.safetensors"
"""What a sample of the training examples is like inside the model; see `expertune.checkpoint.moments`."""

# Keys of the run file that name something which is compared by its content (`expertune.run.identity`).
_NAMED_BY_PATH = frozenset({"model", "data.train", "data.eval", "data.template", "lora.init_from"})

_AS_BEFORE = "resume with the same values, or start a new output_dir"

# What a resumed run may set otherwise: nothing here changes a single weight.
_FREE_AT_RESUME = frozenset({"report_to", "run_name", "save_total_limit", "disable_tqdm", "log_level", "ddp_timeout"})


def require_kept(path: Path, digest: str) -> None:
    """Refuse to go on from another file than the run began with.

    Raises:
        CheckpointError: it has changed, or is missing.
    """
    found = hash_file(path).sha256 if path.is_file() else None
    if found != digest:
        raise CheckpointError(
            f"{path}: {'has changed' if found else 'is missing'}, and the run began with it; restore it, or "
            "start again with another output_dir"
        )


def require_kept_adapter(folder: Path, digests: Mapping[str, str] | str) -> None:
    """Refuse to go on from another adapter than the run began with.

    Args:
        folder: the adapter's.
        digests: what `adapter_digests` gave of it; earlier records have the weights' alone.

    Raises:
        CheckpointError: a file has changed, is missing, or has come to it.
    """
    if isinstance(digests, str):
        require_kept(folder / WEIGHTS_NAME, digests)
        return
    for name, digest in digests.items():
        require_kept(folder / name, digest)
    for name in adapter_digests(folder):
        if name not in digests:
            raise CheckpointError(
                f"{folder / name}: was not there when the run began with this adapter; remove it, or start again with "
                "another output_dir"
            )


def open_record(config: RunConfig, output_dir: Path, resume: bool) -> RunRecord:
    """A fresh record, or the old one of the same configuration; nothing is written yet.

    The record of a finished run that is to be resumed comes back as it is, with its status `finished`.

    Raises:
        ConfigError: the folder holds a run that is not to be resumed, or one of another configuration.
        CheckpointError: it holds what a run left behind, and no record that can be read.
    """
    record = RunRecord.start(output_dir)
    if holds_work(output_dir):
        RunRecord.load(output_dir)  # without it the run cannot be continued
        if not resume:
            raise ConfigError(
                f"{output_dir} already holds a run; continue it with {option('resume')}, or choose another output_dir"
            )
    if resume and (output_dir / RECORD_NAME).exists():
        record = RunRecord.load(output_dir)
        recorded_values(record)  # refuses the record of no run
        _require_same_config(record, config)
        if is_finished(record):
            return record
        if record["config"].get("task") != recordable(config).get("task"):
            record.values.pop("task", None)  # a score of other rows, or by another metric, compares with nothing
        record.values["versions"] = versions()
    record.values["config"] = recordable(config)
    started = record.section("run").get("started", time.time())
    phases = record.section("run").get("phases", {})  # a resumed run adds to them
    record.values["run"] = {"status": "running", "started": started, "phases": phases} | directories(output_dir)
    return record


def require_directory(config: RunConfig, resume: bool) -> None:
    """Refuse a run directory that a run cannot be started or resumed in, before any library is loaded.

    Raises:
        ConfigError: see `open_record` and `hold_run_directory`.
        CheckpointError: see `open_record`.
    """
    output_dir = Path(config.output_dir)
    with hold_run_directory(output_dir):
        open_record(config, output_dir, resume)


def adapter_in(run_dir: Path, name: str | None) -> Path:
    """The folder of a run's adapter.

    Args:
        run_dir: the run directory.
        name: a checkpoint of the run; None means the final adapter.

    Raises:
        ConfigError: the name is a path, which could lead out of the run directory.
        CheckpointError: the run has no such adapter.
    """
    name = ADAPTER_FOLDER if name is None else name
    if name in ("", "..") or Path(name).name != name:
        raise ConfigError(
            f"adapter: {name!r} is no name of a checkpoint in {run_dir}; give one such as checkpoint-50, or leave it "
            "out for the final adapter. An adapter elsewhere is loaded with expertune.load_adapter"
        )
    folder = run_dir / name
    if not folder.is_dir():
        have = ", ".join(sorted(path.name for path in run_dir.glob("checkpoint-*"))) or "none"
        raise CheckpointError(f"{folder}: no such adapter; the run may not have finished. Checkpoints here: {have}")
    return folder


def recordable(config: RunConfig) -> dict[str, Any]:
    """The run file's keys as plain values, without secrets: a record is shown, sent and published."""
    values: dict[str, Any] = without_secrets(config.model_dump(mode="json", exclude_unset=True))
    return values


def holds_work(output_dir: Path) -> bool:
    """Whether a run directory holds what starting over would lose: a checkpoint or an adapter."""
    return bool(list_checkpoints(output_dir)) or (output_dir / ADAPTER_FOLDER).exists()


def after_interruption(output_dir: Path, command: str) -> str:
    """How an interrupted run is resumed, by what is in its directory.

    Args:
        output_dir: the run directory.
        command: what started the run, without `--resume`.
    """
    if checkpoints := list_checkpoints(output_dir):
        return f"`{command} --resume` continues from {checkpoints[-1].name}"
    again = f"{command} --resume" if holds_work(output_dir) else command
    return f"no checkpoint had been written, so that `{again}` starts again from the first step"


def write_report(record: RunRecord, notify: Callable[[str], object]) -> None:
    """Write the run's page where the record is kept; a run goes on without it, whatever keeps it from being written."""
    from expertune.report.page import PAGE_NAME, write_page

    if not record.is_kept:
        return
    try:
        write_page(record.values, record.path.parent)
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        notify(f"{PAGE_NAME} could not be written ({reason}); the run continues without it")


@contextmanager
def stops_recorded(record: RunRecord, notify: Callable[[str], object]) -> Iterator[None]:
    """Keep in the record, and on the page, that a run stopped, and why; both say `running` only while the run does."""
    try:
        with signals_raised():
            yield
    except BaseException as error:
        if isinstance(error, PreflightError):
            record.values.setdefault("preflight", {}).update(passed=False, failed=str(error))
        interrupted = isinstance(error, KeyboardInterrupt | Terminated)
        why = str(error) or ("interrupted" if interrupted else type(error).__name__)
        if record.stop("interrupted" if interrupted else "stopped", why):
            write_report(record, notify)
        raise


def is_finished(record: RunRecord) -> bool:
    """Whether a run has nothing left to do: its record says so, and its adapter is there."""
    adapter = record.path.parent / ADAPTER_FOLDER / "adapter_model.safetensors"
    return record.status == "finished" and adapter.is_file()


def finished_line(record: RunRecord) -> str:
    """The message where a finished run is to be resumed."""
    run_dir, steps = record.path.parent, record.section("train").get("steps", 0)
    return (
        f"{run_dir}: this run is finished, after {counted(steps, 'step')}; nothing is done and no file "
        f"changed. {further(run_dir)}"
    )


def further(run_dir: Path) -> str:
    """How a run is trained longer than it was planned."""
    return (
        f"To train further, start a new run from its adapter: lora.init_from={run_dir / ADAPTER_FOLDER} and another "
        "output_dir"
    )


def _require_same_config(record: RunRecord, config: RunConfig) -> None:
    by_content = _NAMED_BY_PATH if "inputs" in record else frozenset()
    old, _ = with_current_names(without_secrets(record["config"]))
    new = recordable(config)
    for section in sorted(
        (old.keys() | new.keys()) - {"output_dir", "memory_budget", "distributed", "task", TRUST_KEY}
    ):
        before, now = old.get(section), new.get(section)
        if before == now or section in by_content:
            continue
        if isinstance(before, dict) or isinstance(now, dict):  # of which one may be absent
            before, now = before or {}, now or {}
            known = _defaults()
            default = {key: known[f"{section}.{key}"] for key in before | now if f"{section}.{key}" in known}
            before, now = default | before, default | now
            changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            changed = [key for key in changed if not (section == "training" and key in _FREE_AT_RESUME)]
            changed = [key for key in changed if f"{section}.{key}" not in by_content]
            if changed:
                key = changed[0]
                length = section == "training" and key in ("max_steps", "num_train_epochs")
                raise ConfigError(
                    f"resume: {section}.{key} was {_shown(before, key)} when the run started and is "
                    f"{_shown(now, key)} now; {_AS_BEFORE}" + (f". {further(record.path.parent)}" if length else "")
                )
        else:
            raise ConfigError(
                f"resume: {section} was {_shown(old, section)} when the run started and is {_shown(new, section)} now; "
                f"{_AS_BEFORE}"
            )


def _defaults() -> dict[str, Any]:
    from expertune.report.sections import defaults

    return defaults()


def _shown(values: Mapping[str, Any], key: str) -> str:
    """A value as the run file has it."""
    from expertune.report.values import setting

    return setting(values[key]) if values.get(key) is not None else "not set"
