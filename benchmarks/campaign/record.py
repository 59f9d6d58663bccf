"""What a stage leaves: one JSON file, written anew after every measured item, so that no failure takes it away."""

import gc
import importlib.metadata
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

Item = dict[str, Any]

_MOST_BYTES = 12_000_000
_MOST_WORDS = 4_000


class OutOfTimeError(Exception):
    """The stage's time is over; what was measured so far stands."""


class Record:
    """Items of one stage, their errors, and what was left out for lack of time.

    Args:
        path: the JSON file.
        stage: its name.
        limit_s: seconds after which no further item is begun.
        device: what is measured.
        small: whether shapes are those of a dry run.
    """

    def __init__(self, path: Path, stage: str, limit_s: float, device: torch.device, small: bool) -> None:
        self.path, self.device, self.small = path, device, small
        self._end = time.monotonic() + limit_s
        self.values: Item = {
            "stage": stage,
            "limit_s": limit_s,
            "small": small,
            **environment(device),
            "items": {},
            "errors": {},
            "out_of_time": [],
            "complete": False,
        }
        self.write()

    @property
    def remaining_s(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()

    def require_time(self) -> None:
        """Raise OutOfTimeError once the limit is reached: for loops within an item."""
        if self.remaining_s <= 0:
            raise OutOfTimeError

    def item(self, name: str, measure: Callable[[], Item]) -> Item | None:
        """Measure and keep one item; whatever goes wrong is kept as its error, and the stage goes on."""
        if self.remaining_s <= 0:
            self.values["out_of_time"].append(name)
            self.write()
            return None
        report.progress(f"{name} ({self.remaining_s:.0f} s left)")
        started = time.monotonic()
        result: Item | None = None
        try:
            result = measure()
            self.values["items"][name] = result | {"took_s": round(time.monotonic() - started, 2)}
        except OutOfTimeError:
            self.values["out_of_time"].append(name)
        except (Exception, SystemExit) as error:
            self.values["errors"][name] = describe(error)
            report.progress(f"  failed: {error_line(error)}")
        finally:
            self.write()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return result

    def keep(self, name: str, result: Item) -> None:
        """Keep what an item has so far, before it is done."""
        self.values["items"][name] = result
        self.write()

    def finish(self) -> None:
        """Mark the stage as run to its end."""
        self.values["complete"] = True
        self.write()

    def write(self) -> None:
        """Write beside and rename: a reader never sees half a file."""
        text = json.dumps(self.values, indent=1, default=str) + "\n"
        assert len(text) < _MOST_BYTES, f"{self.path} would have {len(text)} bytes"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(f".{os.getpid()}.part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path)


def environment(device: torch.device) -> Item:
    """Device, versions, commit, command and date."""
    values = report.environment()
    for name in ("triton", "experts4bit-qlora", "grouped-nf4-gemm"):
        try:
            values["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            values["versions"][name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values |= {
            "host": values["device"],
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return values


def describe(error: BaseException) -> Item:
    """An error for the JSON: its line, and the end of where it came from."""
    return {"error": error_line(error), "traceback": "".join(traceback.format_tb(error.__traceback__))[-_MOST_WORDS:]}


def error_line(error: BaseException) -> str:
    """Type and first words of an error."""
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def read(path: Path) -> Item | None:
    """A stage's JSON, or None where there is none."""
    try:
        values: Item = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values
