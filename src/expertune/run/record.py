"""RunRecord: what a run did, as one JSON file that every later room reads.

The file is rewritten whole, beside and then renamed, so that a reader never sees half of it. Sections are plain
mappings: `config`, `versions`, `model`, `data`, `plan`, `preflight`, `train`, `eval`, `task`, `throughput`, `memory`.
"""

import contextlib
import functools
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertune.config.arguments import checked
from expertune.errors import CheckpointError, ConfigError, nearest, option
from expertune.run.record_sections import require_sections
from expertune.storage import write_json

RECORD_NAME = "record.json"
FORMAT_VERSION = 1

_NUM_NAMED = 5

# Sections and phases that earlier releases wrote under another name.
_RENAMED = {"proof": "preflight"}

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers")


class RunRecord:
    """The record of one run directory.

    Args:
        path: the JSON file; it need not exist yet.
        values: its content.

    Attributes:
        is_kept: whether it is written; of several processes one has the record that is.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self.is_kept = True
        self._saved = False
        self._opened = time.monotonic()
        # Exact: of rounded times, short ones would never add up. Time since `_counted` is the innermost open phase's.
        self._phases: dict[str, float] = dict(self.section("run").get("phases", {}))
        self._open_phases: list[str] = []
        self._counted = self._opened
        self._seconds_before = self.section("run").get("seconds", 0.0)

    @classmethod
    def start(cls, output_dir: str | Path) -> "RunRecord":
        """A fresh record for a run directory; nothing is written until `save`."""
        return cls(Path(output_dir) / RECORD_NAME, {"format_version": FORMAT_VERSION, "versions": versions()})

    @classmethod
    @checked
    def load(cls, output_dir: str | Path, name: str = RECORD_NAME) -> "RunRecord":
        """Read the record of a run directory.

        Raises:
            CheckpointError: there is none, it is not one of ours, or a section is not as it is written.
            ConfigError: `name` is a path.
        """
        if Path(name).name != name:
            raise ConfigError(f"name: {name!r} is a path; give the folder first, and then the file's name alone")
        path = Path(output_dir) / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if learned := left_by_a_run(Path(output_dir)):
                raise CheckpointError(
                    f"{path}: missing, though {output_dir} holds {learned}: without it nothing says of which run that "
                    "is. Restore it from a copy, or start a new run with another output_dir, from what this one "
                    f"learned by lora.init_from={Path(output_dir) / learned}"
                ) from None
            raise CheckpointError(f"{output_dir}: {_without_record(Path(output_dir), name)}") from None
        except NotADirectoryError:
            raise CheckpointError(
                f"{output_dir}: a file; give the run directory, which is the output_dir of the run file"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as JSON ({error}); it is damaged. Restore it from a copy, or start a new run "
                "with another output_dir, from what this one learned by lora.init_from=FOLDER of its adapter or of a "
                "checkpoint"
            ) from None
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{path}: not a record of format version {FORMAT_VERSION}")
        values = {_RENAMED.get(section, section): content for section, content in values.items()}
        require_sections(path, values)
        _rename_phases((values.get("plan") or {}).get("memory"))
        _rename_recoveries(values.get("train", {}).get("recoveries", []))
        return cls(path, values)

    def __repr__(self) -> str:
        return f"RunRecord({str(self.path)!r}, {self.status})"

    def __getitem__(self, section: str) -> Any:
        return self.values[section]

    def __contains__(self, section: str) -> bool:
        return section in self.values

    def section(self, name: str) -> dict[str, Any]:
        """A section's values; none where the run has not come to it."""
        found: dict[str, Any] = self.values.get(name, {})
        return found

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` or `interrupted`; `not started` where the record does not say."""
        return str(self.section("run").get("status", "not started"))

    def add(self, section: str, **values: Any) -> None:
        """Merge values into a section; they are written with the next save, which comes also when the run stops."""
        self.values.setdefault(section, {}).update(values)

    def update(self, section: str, **values: Any) -> None:
        """Merge values into a section and save."""
        self.add(section, **values)
        self.save()

    def keep_peak(self, peak_bytes: int) -> None:
        """Raise the run's peak memory to this process's; an earlier one, whose run is resumed, may have had more."""
        earlier = self.section("memory").get("peak_bytes")
        self.add("memory", peak_bytes=max(peak_bytes, earlier) if isinstance(earlier, int) else peak_bytes)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase of the run, less that of phases inside it.

        A save within the block writes the time so far.
        """
        self._count_time()
        self._open_phases.append(name)
        try:
            yield
        finally:
            self._count_time()
            self._open_phases.pop()

    def _count_time(self) -> None:
        """Give the time since the last call to the innermost open phase."""
        now = time.monotonic()
        if self._open_phases:
            name = self._open_phases[-1]
            self._phases[name] = self._phases.get(name, 0.0) + now - self._counted
        self._counted = now

    def stop(self, status: str, error: str) -> bool:
        """Record that the run has stopped, unless nothing was saved since it was opened.

        Where the disk takes no new file, at least the status `running` is replaced.

        Returns:
            Whether the whole record was written.
        """
        if not self._saved:
            return False
        self.values.setdefault("run", {}).update(status=status, error=error)
        try:
            self.save()
        except OSError:
            # Seven bytes over seven bytes: a full disk takes these.
            with contextlib.suppress(OSError), self.path.open("r+b") as file:
                at = file.read().find(b'"status": "running"')
                if at >= 0:
                    file.seek(at + len(b'"status": "'))
                    file.write(b"stopped")
            return False
        return True

    def save(self) -> None:
        """Write the whole file beside itself, then rename."""
        if not self.is_kept:
            return
        self._saved = True
        if "run" in self.values:
            seconds = self._seconds_before + time.monotonic() - self._opened
            self.values["run"]["seconds"] = round(seconds, 1)
            self._count_time()
            if self._phases:
                self.values["run"]["phases"] = {name: round(spent, 1) for name, spent in self._phases.items()}
        write_json(self.path, self.values)


def _rename_phases(memory: Any) -> None:
    """Phases of the plan's memory by today's names; whatever else stands there stays."""
    if not isinstance(memory, dict):
        return
    if isinstance(moment := memory.get("moment"), str):
        memory["moment"] = _RENAMED.get(moment, moment)
    if isinstance(moments := memory.get("moments"), dict):
        memory["moments"] = {_RENAMED.get(phase, phase): num_bytes for phase, num_bytes in moments.items()}


def _rename_recoveries(recoveries: list[dict[str, Any]]) -> None:
    """The phase that ran out of memory and the setting that was changed, by today's names."""
    for change in recoveries:
        change["during"] = _RENAMED.get(change["during"], change["during"])
        if "proof_tokens" in change.get("setting", {}):
            change["setting"]["preflight_tokens"] = change["setting"].pop("proof_tokens")


def _without_record(folder: Path, name: str) -> str:
    """What a folder is that was taken for a run directory, and what to give in its place."""
    give = "give a run directory, which is the output_dir of a run file"
    if not folder.is_dir():
        beside = [path.parent.name for path in folder.parent.glob(f"*/{RECORD_NAME}")]
        meant = nearest(folder.name, beside)
        return f"no such folder; {f'did you mean {folder.with_name(meant)}?' if meant else give}"
    if (folder / "adapter_config.json").is_file():
        run_dir = folder.absolute().parent
        if not (run_dir / RECORD_NAME).is_file():
            return f"an adapter, which expertune.load_adapter puts on a model; {give}"
        which = "" if folder.name == "adapter" else f" with {option('adapter', folder.name)}"
        return f"an adapter of the run in {run_dir}; give that folder{which}"
    if inside := sorted(str(path.parent) for path in folder.glob(f"*/{RECORD_NAME}")):
        return f"no {name} here; give one of the run directories in it: {', '.join(inside[:_NUM_NAMED])}"
    if (folder / "config.json").is_file():
        return f"a model's folder; {give}"
    return f"no {name} here; is it a run directory?"


def left_by_a_run(folder: Path) -> str | None:
    """The adapter of a run directory or its newest checkpoint, by name; None where there is none."""
    if (folder / "adapter").is_dir():
        return "adapter"
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return f"checkpoint-{max(numbers)}" if (numbers := [int(step) for step in steps if step.isdecimal()]) else None


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide a run's numbers."""
    return dict(_versions())


@functools.cache  # what is imported stays as it is
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(), "executable": sys.executable}
    for name in ("expertune", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
