"""How far something is and how long it will still take: bars on a terminal or in a notebook, else a line at times."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expertune.notebook.progress import NotebookProgress, in_notebook
from expertune.text import folded, printable

Clock = Callable[[], float]
Update = Callable[[int, int], None]

# Where there is no terminal: a line after as long a silence, and in what takes long, after a share of that.
_SECONDS_PER_LINE = 10.0
_MOST_SECONDS_PER_LINE = 60.0
_SHARE_PER_LINE = 1 / 12

# Unit of what is counted in bytes, and shown as GB.
BYTES = "bytes"

# A bar on a terminal is left out where it would be shorter, and is not longer.
_SHORTEST_BAR, _LONGEST_BAR = 8, 40


class Estimate:
    """How long the rest takes, by the mean of all that has been done so far.

    It counts down between two updates, so that it neither goes blank nor jumps where a single step takes minutes.

    Args:
        total: how much there is to do.
        done: how much was done before it started.
        clock: seconds that only grow.
    """

    def __init__(self, total: int, done: int = 0, clock: Clock = time.monotonic) -> None:
        self.total, self._first, self._done, self._clock = total, done, done, clock
        self._began = self._updated = clock()

    def update(self, done: int, total: int) -> None:
        """Set how much has been done by now; the same again changes nothing."""
        if done != self._done:
            self._updated = self._clock()
        self.total, self._done = total, done

    @property
    def seconds(self) -> float | None:
        """Seconds that are left; None before anything has been done, and once they have passed without an end."""
        if self._done <= self._first:
            return None
        each = (self._updated - self._began) / (self._done - self._first)
        left = each * (self.total - self._done) - (self._clock() - self._updated)
        return left if left > 0 else None if self._done < self.total else 0.0

    @property
    def words(self) -> str:
        """The same for a person."""
        seconds = self.seconds
        return "" if seconds is None else f"about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """A time as a person says it: `40 s`, `3 min`, `1 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _so_far(seconds: float) -> str:
    """A time that has passed: to the second as long as several lines may follow each other in a minute."""
    whole = int(seconds)
    return f"{whole // 60} min {whole % 60} s so far" if 60 <= whole < 600 else f"{in_words(seconds)} so far"


def folds(console: Console) -> bool:
    """Whether lines break where a console ends: on a terminal, and where COLUMNS says how wide its reader's is."""
    return console.width > 0 and (console.is_terminal or os.environ.get("COLUMNS", "").isdigit())


class Bars:
    """All that is under way at one time on one console.

    Args:
        console: where to draw.
        clock: see `Estimate`.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.in_notebook = not console.quiet and console.file is sys.stdout and in_notebook()
        self._progress: Progress | None = None
        self._num_drawn = 0
        self._open: list[Bar] = []
        self._printed = clock()
        self._ended: threading.Event | None = None
        self._lock = threading.RLock()

    @contextmanager
    def task(self, what: str, unit: str = "") -> Iterator[Update]:
        """Show something with an end; what is yielded is called with (done, in all).

        Args:
            what: what is done, e.g. `scoring the base model`.
            unit: what is counted, e.g. `rows`, or `BYTES`; empty where nothing is.
        """
        bar = Bar(self, what, unit)
        try:
            bar.update(0, 0)
            yield bar.update
        finally:
            bar.close()

    def print(self, line: str) -> None:
        """Print a line, in a file as one; what is under way need not say for a while that it is."""
        self._say(line, folds(self.console))

    def print_folded(self, line: str) -> None:
        """Print a line, folded where the console ends in a file too."""
        self._say(line, is_folded=True)

    def _say(self, line: str, is_folded: bool) -> None:
        # Lines hold paths, data and what libraries say: none of it is rich's markup, and none moves the cursor.
        text = printable(line)
        with self._lock:
            self._printed = self.clock()
            text = folded(text, self.console.width) if is_folded else text
            self.console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def break_silence(self) -> None:
        """Print how far it is, where no bar says it and nothing has been printed for a while."""
        with self._lock:
            bar = self._open[-1] if self._open else None
            if bar and not bar.is_drawn and self.clock() - self._printed >= bar.patience and (line := bar.line):
                self.print(line)

    @property
    def are_drawn(self) -> bool:
        """Whether bars are drawn: on a terminal and in a notebook."""
        return self.in_notebook or self.console.is_terminal

    @contextmanager
    def in_one_output(self) -> Iterator[None]:
        """In a notebook, draw all bars of this block in one output."""
        self._num_drawn += self.in_notebook
        try:
            yield
        finally:
            if self.in_notebook:
                self.closed()

    def add_figures(self, row: str, figures: Mapping[str, str]) -> bool:
        """Add figures by column to the table below a notebook's bars; elsewhere there is none, and False comes back."""
        if isinstance(self._progress, NotebookProgress):
            self._progress.add_figures(row, figures)
            return True
        return False

    def opened(self) -> Progress | None:
        """The display for one more bar; None where none are drawn."""
        if not self.are_drawn:
            return None
        if self._progress is None:
            self._progress = NotebookProgress(_head) if self.in_notebook else _Lines(console=self.console)
            self._progress.start()
        self._num_drawn += 1
        return self._progress

    def closed(self) -> None:
        """One bar less; the last one ends the display."""
        self._num_drawn -= 1
        if not self._num_drawn and self._progress is not None:
            self._progress.stop()
            self._progress = None

    def began(self, bar: "Bar") -> None:
        """Something is under way from now on. A thread breaks the silence where a single pass takes minutes."""
        if not self._open:
            self._printed = self.clock()
        self._open.append(bar)
        if self._ended is None and not self.console.quiet:
            self._ended = threading.Event()
            threading.Thread(target=self._break_silences, args=[self._ended], daemon=True).start()

    def ended(self, bar: "Bar") -> None:
        """It has ended."""
        with self._lock:
            self._open.remove(bar)
            if not self._open and self._ended is not None:
                self._ended.set()
                self._ended = None

    def _break_silences(self, ended: threading.Event) -> None:
        while not ended.wait(1.0):
            self.break_silence()


class Bar:
    """One of them.

    Args:
        bars: where it belongs.
        what: what is done.
        unit: what is counted.
        stays: the bar is left on the screen when it is closed.
        done: how much was done before it started.
        hidden: it is not drawn on a terminal either.
    """

    def __init__(
        self, bars: Bars, what: str, unit: str, stays: bool = False, done: int = 0, hidden: bool = False
    ) -> None:
        self._bars, self._what, self._unit, self._stays = bars, what, unit, stays
        self._done, self._total, self._figures = done, 0, ""
        self._began = bars.clock()
        self.estimate = Estimate(0, done, bars.clock)
        self._progress = None if hidden else bars.opened()
        self._task: TaskID | None = None
        self._is_open = True
        bars.began(self)

    @property
    def is_drawn(self) -> bool:
        """Whether a terminal or a notebook shows it."""
        return self._progress.is_shown if isinstance(self._progress, NotebookProgress) else self._progress is not None

    @property
    def patience(self) -> float:
        """Seconds without a line after which there is one: ten at first, a minute in what takes long."""
        seconds = _SHARE_PER_LINE * (self._bars.clock() - self._began)
        return min(max(_SECONDS_PER_LINE, seconds), _MOST_SECONDS_PER_LINE)

    @property
    def line(self) -> str:
        """How far it is, in a line; empty where it is done."""
        if 0 < self._total <= self._done:
            return ""
        seconds = self._bars.clock() - self._began
        left = self.estimate.words or _so_far(seconds)
        return ", ".join(filter(None, [how_far(self._what, self._done, self._total, self._unit), self._figures, left]))

    def update(self, done: int, total: int, figures: str = "", what: str = "") -> None:
        """Show how far it is.

        Args:
            done: how much is done.
            total: how much there is to do; 0 where nobody knows.
            figures: what else is known, two spaces apart.
            what: what is done from now on.
        """
        is_first = bool(total) and not self._total
        self._done, self._total, self._figures, self._what = done, total, figures, what or self._what
        self.estimate.update(done, total)
        if self._progress is None:
            if self._unit:  # else somebody prints lines of its own, maybe right now
                self._bars.break_silence()
        elif self._task is None:
            self._task = self._progress.add_task(
                self._what, total=total, completed=done, figures=figures, estimate=self.estimate, unit=self._unit
            )
        else:
            self._progress.update(self._task, total=total, completed=done, figures=figures, description=self._what)
            if is_first:
                self._progress.refresh()

    def close(self) -> None:
        """Stop drawing; needed where the work ends by an error. Once is enough."""
        if not self._is_open:
            return
        self._is_open = False
        self._bars.ended(self)
        if self._progress is not None:
            if self._task is not None and not self._stays:
                self._progress.remove_task(self._task)
            self._progress = None
            self._bars.closed()


def how_far(what: str, done: int, total: int, unit: str = "") -> str:
    """What is done and how far it is: `evaluation: 3/10 examples`, `loading: 1.20 of 93.41 GB`, `step 3/500`."""
    what = printable(what, kept="")
    if not total:
        return what
    if unit == BYTES:
        size, name = next((size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1, "B")) if total >= size)
        return f"{what}: {done / size:.{2 if size > 1 else 0}f} of {total / size:.{2 if size > 1 else 0}f} {name}"
    return f"{what}: {done}/{total} {unit}" if unit else f"{what} {done}/{total}"


def _head(task: Task) -> str:
    unit = BYTES if task.fields["unit"] == BYTES else ""
    return how_far(task.description, int(task.completed), int(task.total or 0), unit)


class _Lines(Progress):
    """Bars that fit a terminal of any width."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """A line for each."""
        return [_Line(task) for task in self.tasks if task.visible]


@dataclass(frozen=True)
class _Line:
    """A task in the width that there is: what it is and the time left first, then figures, and a bar in the rest."""

    task: Task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, total = self.task, int(self.task.total or 0)
        head = _head(task)
        left = task.fields["estimate"].words
        taken = str(timedelta(seconds=int(task.elapsed or 0)))
        free = options.max_width - cell_len(head) - (cell_len(left) + 2 if left else 0)
        shown = []
        for figure in filter(None, [*task.fields["figures"].split("  "), taken]):
            if free < cell_len(figure) + 2:
                break
            free -= cell_len(figure) + 2
            shown.append(figure)
        cells: list[RenderableType] = [Text(head)]
        if free >= _SHORTEST_BAR + 2:
            width, pulses = min(_LONGEST_BAR, free - 2), not total
            bar = ProgressBar(total or None, task.completed, width, pulses, animation_time=task.get_time())
            cells.append(bar)
        cells += [Text(text) for text in [*shown, left] if text]
        line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for _ in cells:
            line.add_column(overflow="fold")
        line.add_row(*cells)
        yield line
