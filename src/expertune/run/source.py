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

from expertune.config import RunConfig, apply_overrides, parse_config, recorded_config
from expertune.config.arguments import checked
from expertune.config.yaml_file import read_mapping
from expertune.errors import CheckpointError, ConfigError, option
from expertune.run.record import RECORD_NAME, RunRecord

_PATHS = ((None, "model"), ("data", "train"), ("data", "eval"), ("data", "template"), ("lora", "init_from"))
_SLICE = re.compile(r"\[\d*:\d*\]$")


@checked
def load_config(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    resume: bool = False,
    starts: bool = True,
) -> RunConfig:
    """The run that a run file, a `record.json` or a run directory describes, with `section.key=value` overrides.

    Paths inside a run file are taken relative to the working directory, as on any command line.

    Args:
        config: any of the three; or a run file's content, as a mapping or as a RunConfig.
        overrides: values to use instead.
        resume: the run is to be continued: a record's run then lies where its record does.
        starts: the run is to be started; False where it is only looked at, as by `plan` and `data`.

    Raises:
        ConfigError: the file is missing or is not YAML; an unknown key or a wrong value; or a record's run would start
            over in its own folder.
        CheckpointError: there is no record, or it cannot be read.
    """
    record = None
    if isinstance(config, RunConfig):
        if not overrides:
            return config
        values, where = config.model_dump(exclude_unset=True), config.origin.name
    elif isinstance(config, Mapping):
        values, where = copy.deepcopy(dict(config)), "config"
    elif record := _record_at(Path(config)):
        values, where = _values_again(record, overrides, resume), str(record.path)
    else:
        values, where = read_mapping(Path(config)), str(config)
    set_by = apply_overrides(values, overrides)
    if isinstance(config, RunConfig):
        set_by = {**config.origin.overrides, **set_by}
    if record is None:
        return parse_config(values, where, overrides=set_by)
    read, folder = recorded_config(values, where, overrides=set_by), record.path.parent
    if starts and not resume and Path(read.output_dir).resolve() == folder.resolve():
        raise ConfigError(
            f"{config}: the run of this record lies in {folder}; continue it with {option('resume')}, or start it "
            'again elsewhere with the override output_dir=FOLDER (overrides=["output_dir=FOLDER"] in Python)'
        )
    return read


def _record_at(path: Path) -> RunRecord | None:
    """The record that a path leads to; None for a run file."""
    if path.is_dir():
        return RunRecord.load(path)
    return RunRecord.load(path.parent, path.name) if _is_record(path) else None


def _values_again(record: RunRecord, overrides: Sequence[str], resume: bool) -> dict[str, Any]:
    """A record's run file as it has to be for the same run, continued or started again."""
    values = recorded_values(record)
    if resume:
        values["output_dir"] = str(record.path.parent)
        return values
    if commit := record.section("model").get("revision"):
        values["revision"] = commit  # a branch may have moved on
    report = record.section("data").get("train")
    if report and not any(override.startswith("data.") for override in overrides):
        # The same text again, also where this version would choose another template for such columns.
        values["data"] = {key: report[key] for key in ("format", "template") if key in report} | values["data"]
    return values


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
    was = record.section("run")
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
