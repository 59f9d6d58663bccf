"""The clock of a campaign: groups of items in processes of their own, most valuable first, within a number of seconds.

Knows no torch: it is there at once, and nothing that a device does can hold it up. A process writes one JSON file
after every item, with the item that it is in; what ends or holds up a process costs that item, and the process is
started again for those that are left.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = dict[str, Any]

DEVICE_LOST = 75
"""Exit status of a process that can use its device no more: it is started again for the items that are left."""

_RESERVE_S = 3.0  # at the end, for processes to be gone and the summary to be written
_LEAST_S = 5.0  # no process is started for less
_GRACE_S = 15.0  # beyond a group's limit, within which a process ends by itself
_MOST_STARTS = 4
_LOST = "its device was lost"
_DONE, _NO_TIME, _NOT_BEGUN = "done", "out of time", "not begun: no time"


@dataclass(frozen=True)
class Group:
    """Items that share a process.

    Attributes:
        name: also of its JSON.
        command: what measures them; gets `--campaign` and `--until`, see `Record`.
        needs_s: what it takes, start included.
        limit_s: what it may take of the campaign.
        alone: nothing else runs meanwhile, because it is timed.
        after: groups that have to have ended.
        niceness: how far it lets others go first.
    """

    name: str
    command: tuple[str, ...]
    needs_s: float
    limit_s: float
    alone: bool = False
    after: tuple[str, ...] = ()
    niceness: int = 0


def path_of(folder: Path, name: str) -> Path:
    """A group's JSON."""
    return folder / f"{'-'.join(name.replace(',', '').lower().split())}.json"


def read(path: Path) -> Values | None:
    """A JSON file, or None where there is none."""
    try:
        values: Values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write beside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def pack(folder: Path, archive: Path) -> None:
    """Put a folder's JSON and logs into one compressed file; where that fails it is said, and the folder has them."""
    beside = archive.with_name(f".{archive.name}.part")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(beside, "w:gz") as file:
            for path in sorted((*folder.glob("*.json"), *folder.glob("*.log"))):
                content = path.read_bytes()  # whole, whatever is written meanwhile
                entry = tarfile.TarInfo(path.name)
                entry.size, entry.mtime = len(content), int(time.time())
                file.addfile(entry, io.BytesIO(content))
        beside.replace(archive)
    except OSError as error:
        progress(f"{archive}: {error}")


def progress(line: str) -> None:
    """Say on stderr what is being done."""
    print(line, file=sys.stderr, flush=True)


def run(groups: Sequence[Group], out: Path, end: float, workers: int, archive: Path | None = None) -> Values:
    """Run groups in order until the end; the summary, which is also written to OUT/campaign.json.

    Args:
        groups: most valuable first.
        out: folder of the JSON.
        end: of everything, by `time.monotonic`.
        workers: processes side by side, where none of them is timed.
        archive: one file for all that is left in `out`, written anew after each group.
    """
    for group in groups:  # what an earlier campaign has left says nothing of this one
        path_of(out, group.name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    campaign = _Campaign(out, end - _RESERVE_S, workers, archive)
    started = time.monotonic()
    how = "interrupted"
    try:
        campaign.run(list(groups))
        how = _NO_TIME
    finally:
        campaign.stop(how)
        for part in out.glob("*.part"):
            part.unlink(missing_ok=True)
        summary = {"seconds": time.monotonic() - started, "groups": [campaign.describe(group) for group in groups]}
        write(out / "campaign.json", summary)
        if archive is not None:
            pack(out, archive)
    return summary


@dataclass
class _Process:
    group: Group
    handle: subprocess.Popen[bytes]
    deadline: float
    starts: int
    looked: float = 0.0
    begun: float = field(default_factory=time.monotonic)

    def why_over(self, now: float, out: Path) -> str | None:
        """Why it is to be ended; None where it may go on."""
        if now >= self.deadline:
            return _NO_TIME
        if now - self.looked < 0.5:
            return None
        self.looked = now
        item = ((read(path_of(out, self.group.name)) or {}).get("running") or {}) if self.handle.poll() is None else {}
        # Of this process: one that was ended has left what it was in to `_Campaign`.
        if item.get("pid") == self.handle.pid and time.time() > item["most"]:
            return f"not done after {time.time() - item['since']:.0f} s, and ended"
        return None

    def kill(self) -> None:
        """Have it end, with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.handle.pid, signal.SIGKILL)

    def wait(self, until: float) -> None:
        """Wait for its end, but no longer."""
        with suppress(subprocess.TimeoutExpired):
            self.handle.wait(timeout=max(until - time.monotonic(), 0))


class _Campaign:
    def __init__(self, out: Path, end: float, workers: int, archive: Path | None) -> None:
        self.out, self.end, self.workers, self.archive = out, end, workers, archive
        self.name = f"{time.time():.3f}-{os.getpid()}"
        self.running: list[_Process] = []
        self.taken: dict[str, float] = {}
        self.how: dict[str, str] = {}

    def run(self, waiting: list[Group]) -> None:
        """Until nothing is left, or no time."""
        while (waiting or self.running) and time.monotonic() < self.end:
            for process in list(self.running):
                self._look_at(process)
            self._start_what_may(waiting)
            time.sleep(0.05)

    def stop(self, how: str) -> None:
        """End what is running, all at once."""
        ended = {process.group.name: _ended(process.handle.poll()) or how for process in self.running}
        for process in self.running:
            process.kill()
        until = time.monotonic() + 1
        for process in list(self.running):
            process.wait(until)
            self._settle(process, ended[process.group.name])

    def describe(self, group: Group) -> Values:
        """A group for the summary."""
        values = read(path_of(self.out, group.name)) or {}
        if values.get("campaign") != self.name:
            values = {}
        how = self.how.get(group.name, _NOT_BEGUN)
        errors = {name: error["error"][:200] for name, error in values.get("errors", {}).items()}
        if how not in (_DONE, _NO_TIME, _NOT_BEGUN):  # also one that ended before it had a file to write errors into
            errors.setdefault(group.name, how)
        return {
            "name": group.name,
            "ended": how,
            "seconds": round(self.taken.get(group.name, 0.0), 1),
            "needs_s": group.needs_s,
            "items": list(values.get("items", {})),
            "failed": failed_items(values),
            "errors": errors,
            "out_of_time": values.get("out_of_time", {}),
        }

    def _start_what_may(self, waiting: list[Group]) -> None:
        """In order, and side by side as far as nothing is timed."""
        for group in list(waiting):
            busy = {process.group.name for process in self.running}
            timed = any(process.group.alone for process in self.running)
            pending = {other.name for other in waiting} | busy
            if timed or (group.alone and (busy or group is not waiting[0])):
                return  # what comes later does not overtake what is timed
            if len(busy) >= self.workers or time.monotonic() + _LEAST_S > self.end:
                return
            if pending & set(group.after):
                continue
            waiting.remove(group)
            self._start(group, min(time.monotonic() + group.limit_s, self.end), 1)

    def _start(self, group: Group, deadline: float, starts: int) -> None:
        until = time.time() + deadline - time.monotonic()
        command = [*group.command, "--campaign", self.name, "--until", f"{until:.1f}"]
        progress(f"--- {group.name} ({self.end - time.monotonic():.0f} s left)")
        handle = subprocess.Popen(
            command, start_new_session=True, preexec_fn=(lambda: os.nice(group.niceness)) if group.niceness else None
        )
        last = min(deadline + _GRACE_S, self.end)
        self.running.append(_Process(group, handle, last, starts))

    def _look_at(self, process: _Process) -> None:
        how = _ended(process.handle.poll()) or process.why_over(time.monotonic(), self.out)
        if how is None:
            return
        if how != _DONE:
            process.kill()  # also what it has started, which may go on without it
            process.wait(time.monotonic() + 1)
        again = self._settle(process, how)
        if self.archive is not None:
            pack(self.out, self.archive)
        if again and process.starts < _MOST_STARTS and time.monotonic() + _LEAST_S < process.deadline:
            self._start(process.group, process.deadline, process.starts + 1)

    def _settle(self, process: _Process, how: str) -> bool:
        """Note how a process has ended: the item that it was in has failed; whether others may be left."""
        group = process.group
        self.running.remove(process)
        self.taken[group.name] = self.taken.get(group.name, 0.0) + time.monotonic() - process.begun
        self.how[group.name] = how
        values = read(path_of(self.out, group.name)) or {}
        if how == _DONE or values.get("campaign") != self.name:
            return False
        item = values.pop("running", None)
        if item is not None:
            if how == _NO_TIME:
                values["out_of_time"][item["name"]] = item["needs_s"]
            else:
                values["errors"].setdefault(item["name"], {"error": how})
        write(path_of(self.out, group.name), values)
        return how != _NO_TIME and (item is not None or how == _LOST)


def _ended(status: int | None) -> str | None:
    """How a process with this exit status has ended; None where it runs."""
    if status is None or status == 0:
        return None if status is None else _DONE
    if status == DEVICE_LOST:
        return _LOST
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def failed_items(values: Values) -> list[str]:
    """Items of a group's JSON whose check found something wrong."""
    return [name for name, item in values.get("items", {}).items() if item.get("passed") is False]


def is_sound(summary: Values) -> bool:
    """Whether nothing failed; what had no time did not."""
    return not any(group["errors"] or group["failed"] for group in summary["groups"])


def lines(summary: Values) -> list[str]:
    """What ran, what failed, and what had no time with what it would have needed."""
    found = []
    for group in summary["groups"]:
        said = f"{group['name']}: {group['ended']}, {group['seconds']:.0f} s, {len(group['items'])} items"
        if group["ended"].startswith("not begun"):
            said = f"{group['name']}: {group['ended']}; would have needed {group['needs_s']:.0f} s"
        found.append(said)
        found += [f"  {name}: FAILED its check" for name in group["failed"]]
        found += [f"  {name}: {error}" for name, error in group["errors"].items()]
        found += [
            f"  {name}: no time; would have needed {seconds:.0f} s" for name, seconds in group["out_of_time"].items()
        ]
    return found
