"""Several runs beside each other: settings that differ, scores, cost and curves, for a page and for the terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from expertune.evaluation.metrics import Figure, shown_figures
from expertune.evaluation.objective_figures import shown_objective_figures
from expertune.report.charts import Chart, Drawing, Series, centered_mean, draw, is_number, points_of
from expertune.report.objective import held_out_figures, objective_of
from expertune.report.page import render
from expertune.report.sections import defaults
from expertune.report.values import Record, at, count, duration, figure, flattened, number, section, setting, size
from expertune.storage import write_text
from expertune.text import printable

# A run's name is its own, and a resumed run may have set the others otherwise: they change no weight.
_NOT_COMPARED = ("output_dir", "training.run_name", "training.report_to", "training.disable_tqdm")

# What the losses and scores of a run are taken on; scores, of some of its examples.
_EXAMPLES = ("data.eval", "data.max_length")

_MOST_SETTINGS = 5
"""Columns of settings that a terminal has room for."""

_WIDEST = 10_000

# Columns of a terminal that a run's name has at least.
_NAME_WIDTH = 12


@dataclass(frozen=True)
class Column:
    """One figure of all runs.

    Attributes:
        label: what it is.
        values: of each run, as numbers; None where a run has none.
        shown: the same for people.
        best: places of the best, empty where no order is meant or all are alike.
    """

    label: str
    values: list[float | None]
    shown: list[str]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """What several runs have in common, and what not.

    Attributes:
        names: of the runs, each another.
        states: `finished`, `running` and so on.
        settings: values of each run by the keys of the run file that differ.
        alike: keys of the run file that are the same everywhere, with their value.
        scores: scores and losses after training.
        cost: time, memory and speed.
        charts: curves over one another.
        note: what a reader of scores and losses has to know; empty where they are of the same text, and of one kind.
    """

    names: list[str]
    states: list[str]
    settings: dict[str, list[str]]
    alike: list[tuple[str, str]]
    scores: list[Column]
    cost: list[Column]
    charts: list[Drawing]
    note: str

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, run by run."""
        return [
            {
                "run": name,
                "status": self.states[place],
                "settings": {key: values[place] for key, values in self.settings.items()},
                "scores": {column.label: column.values[place] for column in self.scores},
                "cost": {column.label: column.values[place] for column in self.cost},
            }
            for place, name in enumerate(self.names)
        ]


def compare(runs: Sequence[tuple[str, Record]]) -> Comparison:
    """Compare the records of runs.

    Args:
        runs: (run directory, the record's values); sections may be missing.
    """
    records = [record for _, record in runs]
    settings, alike = _settings(records)
    names = _names([name for name, _ in runs])
    return Comparison(
        names,
        [str(at(record, "run", "status") or "not started") for record in records],
        settings,
        alike,
        _scores(records),
        [
            _column("time", [_seconds(record) for record in records], duration, lower=True),
            _column("peak memory", [number(r, "memory", "peak_bytes") for r in records], size, lower=True),
            _column("tokens per second", [number(r, "throughput", "tokens_per_second") for r in records], count),
            _column("steps", [number(r, "train", "steps") for r in records], count, ordered=False),
        ],
        _charts(names, records),
        "; ".join(_notes(settings, records)),
    )


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison, whole or not at all."""
    write_text(path, render("compare.html", comparison=comparison, headers=short_keys(list(comparison.settings))))


def render_comparison(comparison: Comparison) -> RenderableType:
    """The comparison on the terminal: a line for each run; what is best stands in bold."""
    return _Table(comparison)


@dataclass(frozen=True)
class _Table:
    """A comparison as one table where the terminal has room for it, else as one each of settings, scores and cost."""

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        compared = self.comparison
        keys = list(compared.settings)[:_MOST_SETTINGS]
        notes = [compared.note] if compared.note else []
        if more := len(compared.settings) - len(keys):
            notes.append(f"{more} more settings differ; the page has them")
        whole = _fitting(compared, keys, [*compared.scores, *compared.cost], console, options)
        if whole is not None:
            yield whole
        else:
            parts: list[tuple[list[str], list[Column]]] = [(keys, []), ([], compared.scores), ([], compared.cost)]
            for number, (settings, columns) in enumerate(part for part in parts if any(part)):
                if number:
                    yield ""
                yield _fitting(compared, settings, columns, console, options) or _table(compared, settings, columns)
        for note in notes:
            yield Text(printable(note), style="italic")


def _fitting(
    comparison: Comparison, settings: list[str], columns: list[Column], console: Console, options: ConsoleOptions
) -> Table | None:
    """A table whose figures stand beside their units; None where the terminal is too narrow."""
    for padding in (2, 1):
        table = _table(comparison, settings, columns, padding, no_wrap=True)
        if Measurement.get(console, options.update_width(_WIDEST), table).minimum <= options.max_width:
            return table
    return None


def _table(
    comparison: Comparison, settings: list[str], columns: list[Column], padding: int = 2, no_wrap: bool = False
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, padding, 0, 0))
    longest = max(len(printable(name)) for name in comparison.names)
    table.add_column("run", overflow="fold", min_width=min(longest, _NAME_WIDTH))  # what folds is measured as nothing
    for header in short_keys(settings).values():
        table.add_column(printable(header), overflow="fold")
    for column in columns:
        header = printable(column.label)
        if no_wrap:
            header = header.replace(" ", "\n")
        table.add_column(header, justify="right", overflow="fold", no_wrap=no_wrap)
    for place, name in enumerate(comparison.names):
        state = comparison.states[place]
        cells = [Text(printable(name if state == "finished" else f"{name} ({state})"))]
        cells += [Text(printable(values[place])) for values in map(comparison.settings.__getitem__, settings)]
        for column in columns:
            cells.append(Text(column.shown[place], style="bold" if place in column.best else ""))
        table.add_row(*cells)
    return table


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Headers of settings: the last word of each key, in words that can be wrapped, where no other key has it.

    A word that is no key of a section, such as `attention` in `quantization.layers.attention`, says nothing alone.
    """
    last = [key.rpartition(".")[-1] for key in keys]
    return {
        key: name.replace("_", " ") if last.count(name) == 1 and key.count(".") <= 1 else _spaced(key)
        for key, name in zip(keys, last, strict=True)
    }


def _spaced(key: str) -> str:
    """A whole key, which can be wrapped before what a mapping in a section has."""
    section, *rest = key.split(".", 2)
    return " ".join([".".join([section, *rest[:1]]), *rest[1:]])


def _names(folders: Sequence[str]) -> list[str]:
    """The last part of each folder, and more of it where that is no name of one run alone."""
    parts = [Path(folder).parts or (folder,) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({place + 1})" for place, folder in enumerate(folders)]


def _settings(records: Sequence[Record]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    known = defaults()
    flat = [flattened(at(record, "config")) for record in records]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key not in _NOT_COMPARED]
    differ, alike = {}, []
    for key in keys:
        default = setting(known[key]) if known.get(key) is not None else "not set"
        values = [setting(each[key]) if key in each else default for each in flat]
        if len(set(values)) > 1:
            differ[key] = values
        else:
            alike.append((key, values[0]))
    return differ, alike


def _scores(records: Sequence[Record]) -> list[Column]:
    found: dict[str, Figure] = {}
    for record in records:
        found |= {each.name: each for each in shown_figures(section(record, "task", "after"))}
    columns = [
        _column(each.label, [number(r, "task", "after", name) for r in records], figure, not each.higher_is_better)
        for name, each in found.items()
    ]
    held_out = [{each.figure.name: each.after for each in held_out_figures(record)} for record in records]
    for each in shown_objective_figures({name: None for known in held_out for name in known}):
        values = [known.get(each.name) for known in held_out]
        columns.append(_column(each.label, [value if is_number(value) else None for value in values], figure))
    # Losses of two objectives are two things, and neither is the better one.
    alike = len(set(map(objective_of, records))) == 1
    losses = [number(record, "eval", "after") for record in records]
    return [*columns, _column("evaluation loss", losses, figure, lower=True, ordered=alike)]


def _notes(settings: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    """What makes scores and losses of the runs unlike."""
    scored = sum(bool(section(record, "task", "after")) for record in records) > 1
    if differ := " and ".join(key for key in _EXAMPLES if key in settings):
        what = "scores and losses" if scored else "losses"
        yield f"the runs differ in {differ}: their {what} are not of the same text"
    if scored and "task.rows" in settings:
        yield "the runs differ in task.rows: their scores are not of the same examples"
    objectives = list(dict.fromkeys(map(objective_of, records)))
    if len(objectives) > 1:
        yield f"the runs differ in objective ({', '.join(objectives)}): their losses do not measure the same"


def _column(
    label: str,
    values: list[float | None],
    show: Callable[[float | None], str],
    lower: bool = False,
    ordered: bool = True,
) -> Column:
    known = [value for value in values if value is not None]
    best: frozenset[int] = frozenset()
    if ordered and len(set(known)) > 1:
        goal = min(known) if lower else max(known)
        best = frozenset(place for place, value in enumerate(values) if value == goal)
    return Column(label, values, [show(value) for value in values], best)


def _seconds(record: Mapping[str, Any]) -> float | None:
    steps = sum(seconds for _, seconds in points_of(at(record, "train", "seconds")))
    return number(record, "run", "seconds") or steps or None


def _charts(names: Sequence[str], records: Sequence[Record]) -> list[Drawing]:
    objectives = {objective_of(record) for record in records}
    unit = " (nats per answer token)" if objectives == {"sft"} else f" of {', '.join(sorted(objectives)).upper()}"
    drawn = []
    for title, keys, style, from_zero in (
        (f"Evaluation loss{unit}", ("eval", "loss"), "dots", True),
        (f"Training loss, mean around each step{unit}", ("train", "loss"), "line", True),
        ("Reward accuracy, mean around each step", ("train", "rewards/accuracies"), "line", True),
        ("Reward margin, mean around each step", ("train", "rewards/margins"), "line", False),
        ("Reward, mean around each step", ("train", "reward"), "line", False),
        ("Learning rate", ("train", "learning_rate"), "line", True),
        ("Gradient norm before clipping, mean around each step", ("train", "grad_norm"), "line", True),
        ("Imbalance of the experts, mean around each step (1 is even)", ("train", "expert_imbalance"), "line", False),
    ):
        series = []
        for place, (name, record) in enumerate(zip(names, records, strict=True)):
            points = points_of(at(record, *keys))
            smooth = points if style == "dots" or keys[1] == "learning_rate" else centered_mean(points)
            series.append(Series(name, smooth, place % 10, "dots" if style == "dots" else "line"))
        drawn.append(draw(Chart(title, series, from_zero=from_zero)))
    return [drawing for drawing in drawn if drawing]
