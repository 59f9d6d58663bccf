"""What a process of a campaign leaves: one JSON file, written anew after every measured item, so that no failure takes
it away; see `benchmarks.campaign.schedule`."""

import gc
import importlib.metadata
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.campaign import schedule

if TYPE_CHECKING:
    import torch

Item = dict[str, Any]

_MOST_WORDS = 4_000

# An item that takes this many times what it needs, and so many seconds more, hangs.
_PATIENCE, _PATIENCE_S = 3.0, 30.0


class OutOfTimeError(Exception):
    """The group's time is over; what was measured so far stands."""


class Record:
    """Items of one group, their errors, and what was left out for lack of time.

    A process that is started again within a campaign goes on after the item that ended the one before.

    Args:
        path: the JSON file.
        group: its name.
        until: seconds since the epoch, after which no further item is begun.
        device: what is measured.
        small: whether shapes are those of a dry run.
        about: what else stands in the file: the campaign's name as `campaign`, the `environment`.
    """

    def __init__(
        self, path: Path, group: str, until: float, device: "torch.device", small: bool, about: Item | None = None
    ) -> None:
        self.path, self.device, self.small, self._until = path, device, small, until
        self._begun: set[str] = set()
        self.values: Item = {
            "group": group,
            "small": small,
            **(about or {}),
            "items": {},
            "errors": {},
            "out_of_time": {},
            "complete": False,
        }
        before, campaign = schedule.read(path), self.values.get("campaign")
        if campaign and before is not None and before.get("campaign") == campaign:
            self.values |= {key: before[key] for key in ("items", "errors", "out_of_time")}
        self.write()

    @property
    def remaining_s(self) -> float:
        """Seconds until the limit."""
        return self._until - time.time()

    def require_time(self) -> None:
        """Raise OutOfTimeError once the limit is reached: for loops within an item."""
        if self.remaining_s <= 0:
            raise OutOfTimeError

    def begin(self, names: Iterable[str], needs_s: float) -> None:
        """Note items that are measured side by side: each stands as out of time until `item` takes its result."""
        self._begun |= set(names)
        self.values["out_of_time"] |= dict.fromkeys(self._begun, needs_s)
        self.write()

    def item(self, name: str, measure: Callable[[], Item], needs_s: float = 10.0, again: bool = False) -> Item | None:
        """Measure and keep one item; whatever goes wrong is kept as its error, and the group goes on.

        Args:
            name: of the item.
            measure: gives it.
            needs_s: what it takes; with less time left it is not begun.
            again: also where an earlier process of the campaign has it: others need what it makes.
        """
        known: Item | None = self.values["items"].get(name)
        if not again and (name in self.values["errors"] or (known is not None and "took_s" in known)):
            return known if name not in self.values["errors"] else None
        if name not in self._begun and self.remaining_s < (0 if self.small else needs_s):
            self.values["out_of_time"][name] = needs_s
            self.write()
            return None
        schedule.progress(f"{self.values['group']}: {name} ({self.remaining_s:.0f} s left)")
        started = time.time()
        most = started + _PATIENCE * needs_s + _PATIENCE_S
        running = {"name": name, "needs_s": needs_s, "since": started, "most": most, "pid": os.getpid()}
        self.values["running"] = running
        self.values["out_of_time"].pop(name, None)
        self.write()
        result: Item | None = None
        try:
            result = measure()
            self.values["items"][name] = result | {"took_s": round(time.time() - started, 2)}
        except OutOfTimeError:
            self.values["out_of_time"][name] = needs_s
        except (Exception, SystemExit) as error:
            self.values["errors"][name] = describe(error)
            schedule.progress(f"  failed: {error_line(error)}")
        finally:
            del self.values["running"]
            self.write()
        self._leave_room()
        return result

    def keep(self, name: str, result: Item) -> None:
        """Keep what an item has so far, before it is done."""
        self.values["items"][name] = result
        self.write()

    def finish(self) -> None:
        """Mark the group as run to its end."""
        self.values["complete"] = True
        self.write()

    def write(self) -> None:
        """Write the file."""
        schedule.write(self.path, self.values)

    def _leave_room(self) -> None:
        """Free the device's memory; where an error has made the device unusable, end for another process to go on."""
        if self.device.type != "cuda":
            return
        import torch

        gc.collect()
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            schedule.progress(f"  the device cannot be used any more: {error_line(error)}")
            os._exit(schedule.DEVICE_LOST)


def environment(device: "torch.device") -> Item:
    """Device, versions, commit, command and date."""
    import torch

    from benchmarks import report

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
