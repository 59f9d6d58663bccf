"""Figures of a run, drawn from its record: each function returns a matplotlib figure, and `write_png` writes one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expertune.evaluation.metrics import shown_figures
from expertune.storage import write_whole

# A palette that survives grayscale printing and the common color-vision deficiencies (Okabe and Ito 2008).
_TRAIN, _EVAL, _BEFORE, _AFTER = "#56B4E9", "#D55E00", "#999999", "#009E73"


def write_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG; the file is complete or absent."""
    with write_whole(Path(path)) as file:
        figure.savefig(file, format="png", dpi=150)


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
        _draw_scores(panels[1], task)
    _place(figure, shares)
    return figure


def _place(figure: Figure, shares: Sequence[float]) -> None:
    """Place panels side by side, as wide as their shares say, with room for the labels beside each.

    By the labels' characters: a layout of matplotlib's own draws the figure once more to measure them.
    """
    width, height = figure.get_size_inches()
    bottom, top = 0.52, height - 0.24
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
    train = record.get("train", {}).get("loss", [])
    evaluation = record.get("eval", {}).get("loss", [])
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.6, label="training, each step")
        axes.plot(steps, _smooth(losses), color="#0072B2", linewidth=1.6, label="training, running mean")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color=_EVAL, marker="o", markersize=4, linewidth=1.2, label="evaluation examples")
    adapter = record.get("adapter", {})
    if adapter.get("checkpoint"):
        label = f"the adapter: {adapter['checkpoint']}"
        axes.axvline(adapter["step"], color=_AFTER, linestyle="--", linewidth=1.2, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _draw_scores(axes: Axes, task: Mapping[str, Any]) -> None:
    figures = shown_figures(task["after"])
    highest = 1.0
    for offset, when, color in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)):
        if when in task:
            values = [task[when][figure.name] for figure in figures]
            bars = axes.bar([at + offset for at in range(len(figures))], values, 0.38, color=color, label=when)
            axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
            highest = max(highest, *values)
    axes.set_xticks(range(len(figures)), [figure.label for figure in figures])
    axes.set_ylim(0, 1.1 * highest)
    if highest == 1:
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_title(f"{task['after']['rows']} evaluation examples", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _smooth(values: tuple[float, ...], window: int = 20) -> list[float]:
    """Mean of up to `window` values that end at each."""
    return [sum(values[max(0, at - window + 1) : at + 1]) / min(at + 1, window) for at in range(len(values))]
