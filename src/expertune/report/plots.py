"""Pictures of a run, drawn from its record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expertune.storage import write_whole

# A palette that survives greyscale printing and the common colour-vision deficiencies (Okabe and Ito 2008).
_TRAIN, _EVAL, _BEFORE, _AFTER = "#56B4E9", "#D55E00", "#999999", "#009E73"

_METRICS = {"slot_f1": "slot F1", "exact_match": "exact match"}


def plot_summary(record: Mapping[str, Any], path: str | Path) -> None:
    """Draw loss by step, and the task's scores before and after where the run has them, as one PNG.

    Args:
        record: the run record's values.
        path: where the PNG goes.
    """
    task = record.get("task", {})
    scored = "after" in task
    figure = Figure(figsize=(9.0 if scored else 6.0, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=[1.6, 1]) if scored else [figure.subplots()]
    _draw_losses(panels[0], record)
    if scored:
        _draw_scores(panels[1], task)
    with write_whole(Path(path)) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_losses(axes: Axes, record: Mapping[str, Any]) -> None:
    train = record.get("train", {}).get("loss", [])
    evaluation = record.get("eval", {}).get("loss", [])
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.6, label="training, each step")
        axes.plot(steps, _smooth(losses), color="#0072B2", linewidth=1.6, label="training, running mean")
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        axes.plot(steps, losses, color=_EVAL, marker="o", markersize=4, linewidth=1.2, label="held-out rows")
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
    names = [name for name in _METRICS if name in task["after"]]
    taken = [part for part in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)) if part[1] in task]
    for offset, when, color in taken:
        bars = axes.bar(
            [at + offset for at in range(len(names))],
            [task[when][name] for name in names],
            0.38,
            color=color,
            label=when,
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    axes.set_xticks(range(len(names)), [_METRICS[name] for name in names])
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_title(f"{task['after']['rows']} held-out rows", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _smooth(values: tuple[float, ...], window: int = 20) -> list[float]:
    """Mean of up to `window` values that end at each."""
    return [sum(values[max(0, at - window + 1) : at + 1]) / min(at + 1, window) for at in range(len(values))]
