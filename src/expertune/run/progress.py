"""How far something is and how long it will still take: bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

Clock = Callable[[], float]
Update = Callable[[int, int], None]

# Where there is no terminal: a line at most this often.
_SECONDS_PER_LINE = 10.0


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
        """Seconds that are left; None before anything has been done."""
        if self._done <= self._first:
            return None
        each = (self._updated - self._began) / (self._done - self._first)
        return max(0.0, each * (self.total - self._done) - (self._clock() - self._updated))

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


class Bars:
    """All that is under way at one time on one console.

    Args:
        console: where to draw.
        clock: see `Estimate`.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._progress: Progress | None = None
        self._num_open = 0

    @contextmanager
    def task(self, what: str, unit: str) -> Iterator[Update]:
        """Show something with an end; what is yielded is called with (done, in all).

        Args:
            what: what is done, e.g. `scoring the base model`.
            unit: what is counted, e.g. `rows`.
        """
        bar = Bar(self, what, unit)
        try:
            yield bar.update
        finally:
            bar.close()

    def opened(self) -> Progress | None:
        """The display for one more bar; None where there is no terminal."""
        if not self.console.is_terminal:
            return None
        if self._progress is None:
            columns = (
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                _Left(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
        self._num_open += 1
        return self._progress

    def closed(self) -> None:
        """One bar less; the last one ends the display."""
        self._num_open -= 1
        if not self._num_open and self._progress is not None:
            self._progress.stop()
            self._progress = None


class Bar:
    """One of them.

    Args:
        bars: where it belongs.
        what: what is done.
        unit: what is counted; empty where lines are written by somebody else.
        stays: the bar is left on the screen when it is closed.
        done: how much was done before it started.
        hidden: only the estimate is kept.
    """

    def __init__(
        self, bars: Bars, what: str, unit: str, stays: bool = False, done: int = 0, hidden: bool = False
    ) -> None:
        self._bars, self._what, self._unit, self._stays = bars, what, unit, stays
        self.estimate = Estimate(0, done, bars.clock)
        self._progress = None if hidden else bars.opened()
        self._task: TaskID | None = None
        self._last_line = bars.clock()

    def update(self, done: int, total: int, figures: str = "") -> None:
        """Show how far it is."""
        self.estimate.update(done, total)
        if self._progress is None:
            self._print_line(done, total)
        elif self._task is None:
            self._task = self._progress.add_task(
                self._what, total=total, completed=done, figures=figures, estimate=self.estimate
            )
        else:
            self._progress.update(self._task, total=total, completed=done, figures=figures)

    def close(self) -> None:
        """Stop drawing; needed where the work ends by an error. Once is enough."""
        if self._progress is not None:
            if self._task is not None and not self._stays:
                self._progress.remove_task(self._task)
            self._progress = None
            self._bars.closed()

    def _print_line(self, done: int, total: int) -> None:
        if self._unit and done < total and self._bars.clock() - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = self._bars.clock()
            line = f"{self._what}: {done}/{total} {self._unit}"
            self._bars.console.print(", ".join(filter(None, [line, self.estimate.words])), soft_wrap=True)


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        estimate: Estimate = task.fields["estimate"]
        return Text(estimate.words)
