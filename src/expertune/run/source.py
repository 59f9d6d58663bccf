"""What a command is given for a run: a run file, the record of a run, or the run directory.

A record holds the run file as it was. Its relative paths were relative to the working directory of that time; they are
looked for relative to the run directory's present place (a project that was copied whole), then where they were, then
relative to the working directory.
"""

import copy
import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertune.config import RunConfig, apply_overrides, load_config, recorded_config
from expertune.errors import CheckpointError, ConfigError
from expertune.run.record import RECORD_NAME, RunRecord

_PATHS = ((None, "model"), ("data", "train"), ("data", "eval"), ("data", "template"), ("lora", "init_from"))
_SLICE = re.compile(r"\[\d*:\d*\]$")


def load_run(path: str | Path, overrides: Sequence[str] = (), resume: bool = False, starts: bool = True) -> RunConfig:
    """The run that a run file, a `record.json` or a run directory describes, with `section.key=value` overrides.

    Args:
        path: any of the three.
        overrides: values to use instead.
        resume: the run is to be continued: a record's run then lies where its record does.
        starts: the run is to be started; False where it is only looked at, as by `plan` and `data`.

    Raises:
        ConfigError: an unknown key or a wrong value, or a record's run would start
            over in its own folder.
        CheckpointError: there is no record, or it cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and not _is_record(path):
        return load_config(path, overrides)
    record = RunRecord.load(folder, path.name if path.is_file() else RECORD_NAME)
    values = recorded_values(record)
    if resume:
        values["output_dir"] = str(folder)
    else:
        if commit := record.values.get("model", {}).get("revision"):
            values["revision"] = commit  # a branch may have moved on
        report = record.values.get("data", {}).get("train")
        if report and not any(override.startswith("data.") for override in overrides):
            # The same text again, also where this version would choose another template for such columns.
            values["data"] = {key: report[key] for key in ("format", "template") if key in report} | values["data"]
    apply_overrides(values, overrides)
    config = recorded_config(values, where=str(record.path))
    if starts and not resume and Path(config.output_dir).resolve() == folder.resolve():
        raise ConfigError(
            f"{path}: the run of this record lies in {folder}; continue it with --resume, or start it again elsewhere "
            "with output_dir=FOLDER"
        )
    return config


def recorded_values(record: RunRecord) -> dict[str, Any]:
    """The run file that a record holds, its relative paths leading to what they named; what is gone stays as it is.

    Args:
        record: of a run, in the folder where it lies now.

    Raises:
        CheckpointError: the record holds no run file.
    """
    values = copy.deepcopy(record.values.get("config"))
    if not isinstance(values, dict):
        raise CheckpointError(f"{record.path}: the record of no run: it holds no `config`")
    was = record.values.get("run", {})
    bases = []
    if isinstance(was.get("directory_from_run"), str):
        bases.append(Path(os.path.normpath(record.path.parent.absolute() / was["directory_from_run"])))
    if isinstance(was.get("directory"), str):
        bases.append(Path(was["directory"]))
    for section, key in _PATHS:
        held = values if section is None else values.get(section)
        if isinstance(held, dict) and key in held:
            held[key] = _found(held[key], bases)
    return values


def directories(output_dir: Path) -> dict[str, str]:
    """What relative paths of a run file are relative to, as a record keeps it: absolute, and from the run directory."""
    here = Path.cwd()
    return {"directory": str(here), "directory_from_run": os.path.relpath(here, output_dir.absolute())}


def _found(name: Any, bases: Sequence[Path]) -> Any:
    if isinstance(name, list):
        return [_found(each, bases) for each in name]
    if not isinstance(name, str) or name.startswith(("/", "~")):
        return name
    plain = _SLICE.sub("", name)
    for base in bases:
        if base != Path.cwd() and (os.path.lexists(base / plain) or glob.glob(str(base / plain))):  # noqa: PTH207
            return str(base / name)
    return name


def _is_record(path: Path) -> bool:
    """Whether a file is a record of a run; a run file may be JSON as well."""
    if path.suffix != ".json":
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path.name == RECORD_NAME  # the record's own reader says what is wrong with it
    return isinstance(values, Mapping) and "format_version" in values
