"""The walk of an export: open, refuse, look at the disk, write beside, verify, rename; and to verify it again."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict, Unpack

from expertune.checkpoint.adapter_folder import CONFIG_NAME
from expertune.checkpoint.json_file import read_mapping
from expertune.config.arguments import checked
from expertune.data.hub import is_hub_name
from expertune.distributed.processes import require_one_process
from expertune.errors import ConfigError, ExportError, StorageError, option
from expertune.exporting import EXPORTS, VERIFICATION, require_export
from expertune.exporting.formats import Format, Options, Progress, Verdict, make_format
from expertune.exporting.hub import push, require_hub
from expertune.exporting.merged import MANIFEST, MergedIntoDequantized, write_dequantized
from expertune.exporting.opening import open_source
from expertune.exporting.place import clear, hold_export, hold_partial, require_free
from expertune.exporting.source import ExportSource
from expertune.exporting.verify import verify as run_engines
from expertune.exporting.verify import write_verification
from expertune.report.card import CARD_NAME
from expertune.run.beside import write_card, write_tokenizer
from expertune.run.record import RECORD_NAME
from expertune.run.written import ADAPTER_FOLDER
from expertune.storage import SCRATCH, notify_if_it_fails
from expertune.text import format_size

_ROOM_BYTES = 2**20  # configs, tokenizer, verification


class ExportOptions(TypedDict, total=False):
    """Options of an export; `export` says what they mean."""

    base: Literal["source", "dequantized"]
    type: str | None
    verify: bool
    model: str | Path | None
    trust_remote_code: bool
    progress: Progress | None
    push_to_hub: str | None
    private: bool | None


@dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
        folder: where it is.
        verification: content of its `verification.json`; None where it was not to be verified.
        url: where it is on the hub; None where it was not sent there.
    """

    folder: Path
    verification: dict[str, Any] | None
    url: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For other programs."""
        return {"folder": str(self.folder), "verification": self.verification, "url": self.url}


@checked
def export(
    run_dir: str | Path,
    to: str,
    adapter: str | None = None,
    out: str | Path | None = None,
    **options: Unpack[ExportOptions],
) -> Exported:
    """Write a run's adapter, or base and adapter as one model, in the form that an engine reads, and run it there.

    Args:
        run_dir: a run directory.
        to: the format, e.g. `peft`.
        adapter: `checkpoint-N` for an earlier state; None means the final adapter.
        out: the folder to write, new or empty; None means one under `exports` in the run directory.
        **options: `base`, of a merged model: `source` for 16-bit weights as the checkpoint has them, or `dequantized`
            for the values that the adapter was trained beside; `type`: how numbers are held, e.g. `q8_0`, where the
            format has several ways; `verify=False` leaves out the run in the engine; `model`: directory or hub id of
            the base model, where it lies elsewhere by now than the record says; `trust_remote_code`: run Python that
            ships with the model; `progress`: called with what is being written, bytes done and bytes in all;
            `push_to_hub`: a repository of the Hugging Face hub that the export is sent to as well; `private`: whether
            that repository is private, where it is made.

    Raises:
        ExportError: the format cannot hold it, or the engine that reads it computes something else; names the tensors.
        ConfigError: no such format, or an option that it does not have.
        CheckpointError: the run has no such adapter, its base model is gone, or is another one.
        StorageError: the disk is too small.
    """
    require_one_process()
    chosen, is_verified = Options(options.get("base", "source"), options.get("type")), options.get("verify", True)
    form = make_format(to, chosen)
    given = Path(out) if out is not None else _default_folder(Path(run_dir), to, adapter, chosen.base)
    folder = given.resolve()
    require_free(folder)
    if name := options.get("push_to_hub"):
        require_hub(name)
    elif options.get("private") is not None:
        raise ConfigError(f"private: nothing is sent to the hub; add {option('push-to-hub', 'NAME')}, or leave it out")
    trust, model = options.get("trust_remote_code", False), options.get("model")
    source = open_source(run_dir, adapter, trust, model, chosen.base)
    _require_possible(form, source)
    if is_verified:
        _ = source.examples  # an error of theirs comes before the work
    with hold_partial(folder) as partial:
        _require_room(partial, form.nbytes(source), _room_to_verify(form, source, chosen) if is_verified else 0)
        clear(partial, {VERIFICATION, CARD_NAME} if form.resumes else None)
        try:
            form.write(source, partial, options.get("progress") or (lambda *_: None))
        except BaseException:
            if not form.resumes:
                clear(partial)
            raise
        verdicts = _run_engines(source, form, chosen, partial) if is_verified else []
        written = write_verification(partial, form, chosen, source, verdicts, name)
        _notify(source, verdicts)
        _require_none_failed(
            verdicts, f"It was not put in its place; {partial} is what was written, with {VERIFICATION}"
        )
        _write_card(source, form, partial, written, name)
        if folder.is_dir():
            folder.rmdir()  # it is empty
        partial.rename(folder)
        (folder / MANIFEST).unlink(missing_ok=True)  # it is finished
    url = push(given, name, options.get("private")) if name else None
    return Exported(given, written if is_verified else None, url)


@checked
def verify(
    folder: str | Path,
    run: str | Path | None = None,
    trust_remote_code: bool = False,
    model: str | Path | None = None,
) -> Exported:
    """Run an export again in the engines that read it, and write anew what came of it.

    Args:
        folder: what `export` has written, wherever it lies by now.
        run: the run directory that it is of; None means the one in whose `exports` it lies.
        trust_remote_code: run Python that ships with the model.
        model: directory or hub id of the base model, where it lies elsewhere by now than the record says.

    Raises:
        ExportError: the folder is no export, or an engine computes something else from it; names the tensors.
        CheckpointError: the run has no such adapter, its base model is gone, or is another one.
        StorageError: the disk is too small.
    """
    require_one_process()
    given = Path(folder)
    path = require_export(given)
    values = read_mapping(path, fix="export the run again")
    try:
        name, chosen, adapter, hub = _exported(values)
        form = make_format(name, chosen)
    except (KeyError, TypeError, ValueError, ConfigError):
        raise ExportError(f"{path}: does not say what was exported; export the run again") from None
    run_dir = Path(run) if run is not None else given.resolve().parent.parent
    if run is None and not (run_dir / RECORD_NAME).is_file():
        raise ExportError(
            f"{given}: lies in no run directory; give the run that it is of with {option('run', 'RUN_DIR')}"
        )
    name_of = adapter if adapter != ADAPTER_FOLDER else None
    source = open_source(run_dir, name_of, trust_remote_code, model, chosen.base)
    _require_possible(form, source)
    _ = source.examples
    with hold_export(given):
        _require_room(given, 0, _room_to_verify(form, source, chosen))
        verdicts = _run_engines(source, form, chosen, given)
        written = write_verification(given, form, chosen, source, verdicts, hub)
        _write_card(source, form, given, written, hub)
    if any(verdict.verdict == "failed" for verdict in verdicts):
        _notify(source, verdicts)  # the caller gets an error; otherwise what is returned says it
    _require_none_failed(verdicts, f"{path} has what was found")
    return Exported(given, written)


def _require_possible(form: Format, source: ExportSource) -> None:
    if source.uses_dora and not form.takes_dora:
        raise ExportError(
            f"--to {form.name}: the adapter is trained with lora.use_dora, and what reads this format knows A and B "
            "alone; export base and adapter as one model with --to merged"
        )
    form.require(source)


def _exported(values: dict[str, Any]) -> tuple[str, Options, str, str | None]:
    """Format, options, adapter, and name on the hub, of a `verification.json` that may have come from anywhere."""
    name, chosen, adapter, hub = values["format"], Options(**values["options"]), values["adapter"], values.get("hub")
    texts = [name, chosen.base, adapter, *(each for each in (chosen.type, hub) if each is not None)]
    if not all(isinstance(each, str) for each in texts):
        raise TypeError("a name is no text")
    if chosen.base not in ("source", "dequantized") or not (hub is None or is_hub_name(hub)):
        raise ValueError("a name that there is not")
    return name, chosen, adapter, hub


def _write_card(
    source: ExportSource, form: Format, folder: Path, verification: dict[str, Any], name: str | None
) -> None:
    """The card, and where the run had a chat template of its own, the tokenizer with it; a GGUF file has its own."""
    record, config = source.context.record, source.context.config
    if not form.name.startswith("gguf"):
        template = record["data"]["train"]["template"]
        notify_if_it_fails(
            "the tokenizer", lambda: write_tokenizer(template, source.tokenizer, folder), source.context.notify
        )
    facts: dict[str, Any] = {"form": form.name, "verification": verification} | ({"where": name} if name else {})
    if (adapter := folder / CONFIG_NAME).is_file():
        facts["rank"] = read_mapping(adapter, fix="export the run again").get("r")
    write_card(record.values, config, Path(source.adapter.where), folder, **facts)


def _run_engines(source: ExportSource, form: Format, options: Options, folder: Path) -> list[Verdict]:
    try:
        with _readable_base(source, options, folder) as readable:
            return run_engines(source, form, folder, readable)
    finally:
        clear(folder, set())


@contextmanager
def _readable_base(source: ExportSource, options: Options, folder: Path) -> Iterator[Path]:
    """The base as a 16-bit folder: its own, or for a while one with the values of its 4-bit weights."""
    if not _needs_readable_base(source, options):
        yield source.base.folder
        return
    with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        write_dequantized(source, Path(scratch), lambda *_: None, is_adapted=False)
        yield Path(scratch)


def _needs_readable_base(source: ExportSource, options: Options) -> bool:
    return source.is_packed and options.base != "dequantized" and not source.why_too_large()


def _default_folder(run_dir: Path, to: str, adapter: str | None, base: str) -> Path:
    parts = [to, *([adapter] if adapter not in (None, ADAPTER_FOLDER) else []), *([base] if base != "source" else [])]
    return run_dir / EXPORTS / "-".join(str(part) for part in parts)


def _room_to_verify(form: Format, source: ExportSource, options: Options) -> int:
    """Bytes that are needed beside the export for a while."""
    base = MergedIntoDequantized().nbytes(source) if _needs_readable_base(source, options) else 0
    return base + form.nbytes_to_verify(source)


def _require_room(folder: Path, nbytes: int, to_verify: int) -> None:
    """Refuse a disk that is too small for an export, what an earlier one has left there included, or to verify it."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if nbytes else 0
    needed, free = nbytes + _ROOM_BYTES - held, shutil.disk_usage(folder).free
    if max(needed, 0) + to_verify <= free:
        return
    wanted = [f"the export needs {format_size(needed)}"] if nbytes else []
    wanted += [f"comparing it needs {format_size(to_verify)} for a while"] if to_verify else []
    leave_out = (
        ", leave the comparison out with --no-verify (verify=False in Python)" if needed <= free and nbytes else ""
    )
    raise StorageError(
        f"{folder}: {', '.join(wanted)}, and {format_size(free)} are free; make room{leave_out}"
        + (f", or choose a folder on another disk with {option('out', 'DIR')}" if nbytes else "")
    )


def _notify(source: ExportSource, verdicts: list[Verdict]) -> None:
    """Show what came of each engine."""
    for verdict in verdicts:
        for line in verdict.lines:
            source.context.notify(line)


def _require_none_failed(verdicts: list[Verdict], where: str) -> None:
    """Raise where an engine computes something else, with where to look."""
    failed = [verdict for verdict in verdicts if verdict.verdict == "failed"]
    if failed:
        raise ExportError(f"{failed[0].engine} computes something else from this export: {failed[0].reason}. {where}")
