"""Figures of a run, drawn from its record: each function returns a matplotlib figure, and `write_png` writes one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from expertune.evaluation.metrics import shown_figures
from expertune.report.charts import centered_mean, mean_width, points_of
from expertune.report.objective import loss_unit
from expertune.report.values import at, number, section
from expertune.storage import write_whole
from expertune.text import counted, printable, shortened

# A palette that survives grayscale printing and the common color-vision deficiencies (Okabe and Ito 2008).
_TRAIN, _MEAN, _EVAL, _BEFORE, _AFTER = "#56B4E9", "#0072B2", "#D55E00", "#999999", "#009E73"

# With a height of its own: matplotlib would look for it above ticks and labels, each time a figure is drawn.
_SMALL: dict[str, Any] = {"fontsize": 8.5, "loc": "left", "y": 1.0}
_LONGEST_NAME = 40
_LAST_OF_LATIN = 0x24F


def write_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; the file is complete or absent."""
    with write_whole(Path(path)) as file:
        figure.savefig(file, format="png", dpi=150, pil_kwargs={"compress_level": 1})


def summary_figure(record: Mapping[str, Any]) -> Figure:
    """The loss by step, and the task's scores before and after where the run has them.

    Args:
        record: the run record's values.
    """
    task = record.get("task", {})
    scored = "after" in task
    figure = Figure(figsize=(9.0 if scored else 6.0, 3.6))
    shares = [1.6, 1.0] if scored else [1.0]
    panels = figure.subplots(1, len(shares), squeeze=False)[0]
    _draw_losses(panels[0], record)
    if scored:
        _draw_scores(panels[1], record)
    _place(figure, shares)
    return figure


def _place(figure: Figure, shares: Sequence[float]) -> None:
    """Place panels side by side, as wide as their shares say, with room for the labels beside each.

    By the labels' characters: a layout of matplotlib's own draws the figure once more to measure them.
    """
    width, height = figure.get_size_inches()
    bottom, top = 0.52, height - 0.56  # room for titles of two lines
    figure.subplots_adjust(bottom=bottom / height, top=top / height)  # how many ticks there are follows from it
    left = []
    for axes in figure.axes:
        characters = max(len(label.get_text()) for label in axes.get_yticklabels())
        left.append((0.34 if axes.get_ylabel() else 0.2) + 0.09 * characters)
    right = 0.1
    free = width - sum(left) - right * len(left)
    at = 0.0
    for axes, beside, share in zip(figure.axes, left, shares, strict=True):
        panel = free * share / sum(shares)
        axes.set_position(((at + beside) / width, bottom / height, panel / width, (top - bottom) / height))
        at += beside + panel + right


def _draw_losses(axes: Axes, record: Mapping[str, Any]) -> None:
    train = points_of(at(record, "train", "loss"))
    evaluation = points_of(at(record, "eval", "loss"))
    if train:
        smooths = mean_width(len(train)) > 1
        width, alpha = (0.8, 0.6) if smooths else (1.6, 1.0)
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=width, alpha=alpha, label="training, each step")
        if smooths:
            label = f"training, mean of {mean_width(len(train))} steps around each"
            axes.plot(*zip(*centered_mean(train), strict=True), color=_MEAN, linewidth=1.6, label=label)
    if evaluation:
        marker: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.plot(*zip(*evaluation, strict=True), color=_EVAL, label="evaluation examples", **marker)
        step, loss = min(evaluation, key=lambda point: point[1])
        if len(evaluation) > 1:
            label = f"lowest evaluation loss: {loss:.3f} at step {step:g}"
            axes.plot([step], [loss], linestyle="none", color=_EVAL, marker="*", markersize=11, label=label)
    adapter = section(record, "adapter")
    if adapter.get("checkpoint"):
        axes.axvline(adapter["step"], color=_AFTER, linestyle="--", linewidth=1.2, label=_adapter(record))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss {loss_unit(record)}")
    axes.set_ylim(bottom=0)
    axes.set_title(
        _title(f"trained on {_source(record, 'train')}", f"evaluated on {_source(record, 'eval')}"), **_SMALL
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _draw_scores(axes: Axes, record: Mapping[str, Any]) -> None:
    task = record["task"]
    figures = shown_figures(task["after"])
    highest = 1.0
    labels = {"before": "before: the base model", "after": f"after: {_adapter(record)}"}
    for offset, when, color in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)):
        if when in task:
            values = [task[when][figure.name] for figure in figures]
            bars = axes.bar([at + offset for at in range(len(figures))], values, 0.38, color=color, label=labels[when])
            axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
            highest = max(highest, *values)
    axes.set_xticks(range(len(figures)), [figure.label for figure in figures])
    axes.set_ylim(0, 1.3 * highest)  # room for the legend above the bars
    if highest == 1:
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    answered, examples = task["after"]["rows"], number(record, "data", "eval", "num_rows")
    every = counted(examples or answered, "example")
    share = f"{answered:,} of {every}" if examples and examples != answered else counted(answered, "example")
    axes.set_title(_title(f"answers to {share}", f"of {_name(record, 'eval')}"), **_SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _title(*lines: str) -> str:
    # A dollar sign would begin a formula.
    return "\n".join(line.replace("$", r"\$") for line in lines)


def _source(record: Mapping[str, Any], part: str) -> str:
    """What a part of the data is called, and how many examples it has."""
    count = number(record, "data", part, "num_rows")
    return f"{_name(record, part)}, {counted(count, 'example')}" if count else "no examples"


def _name(record: Mapping[str, Any], part: str) -> str:
    """A source without the folders around it, on one line."""
    source = printable(str(at(record, "data", part, "source") or ""))
    if not source or any(ord(char) > _LAST_OF_LATIN for char in source):  # the font may have no other letters
        return f"data.{part}"
    return shortened(", ".join(name.rpartition("/")[2] for name in source.split(", ")), _LONGEST_NAME)


def _adapter(record: Mapping[str, Any]) -> str:
    """Which state of training the adapter is."""
    adapter = section(record, "adapter")
    if adapter.get("checkpoint"):
        return f"adapter of {adapter['checkpoint']}, best by {adapter.get('metric')}"
    return f"adapter of step {adapter['step']}, the last" if "step" in adapter else "the adapter"
