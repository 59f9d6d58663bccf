"""The last words of a run: what came out, on the terminal."""

import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertune.evaluation.metrics import shown_figures
from expertune.evaluation.objective_figures import OBJECTIVES, shown_objective_figures
from expertune.report.objective import HeldOut, all_tie, held_out_figures, held_out_loss, objective_of
from expertune.report.values import PLANNED_PHASES, duration, selected_experts
from expertune.run.progress import in_words
from expertune.text import printable

# Phases of a run in words.
_PHASES = {
    "data": "for the data",
    "evaluation": "evaluating",
    "preflight": "in the preflight check",
    "calibrating": "of calibration",
    "initializing": "of computing first factors",
    "selection": "selecting experts",
}


def render_summary(record: Mapping[str, Any], output_dir: str, examples: int = 3) -> RenderableType:
    """Figures of a finished run, a few answers, and what to do next.

    Args:
        record: the run record's values.
        output_dir: the run directory, for the commands.
        examples: how many answered evaluation examples are shown.
    """
    task, compared = record.get("task", {}), _compared(record)
    parts: list[RenderableType] = ["", compared, ""] if compared.row_count else [""]
    parts += [_figures(record), ""]
    for example in task.get("after", {}).get("examples", [])[:examples]:
        parts.append(_example(example))
    folder = printable(output_dir, kept="")
    for line in (
        f"adapter:  {folder}/adapter{_reader(record.get('adapter', {}))}",
        f"report:   {folder}/report.html",
        f"picture:  {folder}/summary.png",
        f"try it:   expertune chat {shlex.quote(folder)}",
    ):
        parts.append(Text(line, no_wrap=True, overflow="ignore"))  # a path or a command that is folded is not copied
    return Group(*parts)


def _compared(record: Mapping[str, Any]) -> Table:
    """Scores and loss before and after; no row where nothing was evaluated."""
    task = record.get("task", {})
    before, after = task.get("before", {}), task.get("after", {})
    rows = [HeldOut(each, before.get(each.name), None, after.get(each.name)) for each in shown_figures(after or before)]
    rows = [each for each in (*rows, *held_out_figures(record), held_out_loss(record)) if each.is_known]
    began = " (at step 0: the adapter as it began)" if any(each.begins_at_step_0 for each in rows) else ""
    title = f"evaluation: the base model before{began}, the adapter after"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("before", "after"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len("before"))
    for row in rows:
        table.add_row(Text(printable(row.figure.label)), row.before(_figure), _figure(row.after))
    return table


def _figures(record: Mapping[str, Any]) -> Table:
    train, adapter = record.get("train", {}), record.get("adapter", {})
    table = Table(title="what the run did", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if (objective := objective_of(record)) != "sft":
        table.add_row("objective", OBJECTIVES[objective])
    if losses := train.get("loss"):
        (first, loss), (last, final) = losses[0], losses[-1]
        reached = f", {final:.3f} at step {last}" if len(losses) > 1 else ""
        table.add_row("training loss", f"{loss:.3f} at step {first}{reached}")
    for each in shown_objective_figures(train):
        (first, figure), (last, final) = train[each.name][0], train[each.name][-1]
        reached = f", {final:.3f} at step {last}" if len(train[each.name]) > 1 else ""
        tied = " (all pairs tie)" if each.name == "rewards/accuracies" and all_tie(train) else ""
        table.add_row(each.label, f"{figure:.3f} at step {first}{tied}{reached}, on training examples")
    if (processes := train.get("processes", 1)) > 1:
        sharing = train.get("processes_sharing_experts", 1)
        of_groups = "which" if sharing == processes else f"of which groups of {sharing}"
        held = f"{of_groups} share the experts out" if sharing > 1 else "each with all experts"
        held = "each with a slice of every expert layer" if train.get("experts") == "shard" else held
        table.add_row("processes", f"{processes}, {held}")
    if took := _took(record):
        table.add_row("time", took)
    table.add_row("tokens per second", f"{record['throughput']['tokens_per_second']:,.0f}")
    table.add_row("peak memory", f"{record['memory']['peak_bytes'] / 1e9:.2f} GB")
    if selection := adapter.get("selection"):
        table.add_row("experts", " ".join(selected_experts(selection)))
    if chosen := adapter.get("checkpoint"):
        table.add_row("adapter", f"that of {chosen}, the best by {adapter['metric']} ({adapter['value']:.4f})")
    return table


def _took(record: Mapping[str, Any]) -> str:
    """How long the run took, its longest phases, and what the plan had expected of what it counts."""
    run = record.get("run", {})
    if not run.get("seconds"):
        return ""
    phases = sorted(run.get("phases", {}).items(), key=lambda item: -item[1])
    parts = [f"{duration(seconds)} {_PHASES.get(name, name)}" for name, seconds in phases if seconds >= 1][:4]
    took = duration(run["seconds"]) + (f": {', '.join(parts)}" if parts else "")
    plan = record.get("plan", {}).get("run") or {}
    # Of a small model nothing was estimated that the run could be compared with.
    planned = None if plan.get("is_least") else plan.get("seconds")
    counted = sum(seconds for name, seconds in phases if name in PLANNED_PHASES)
    if planned and counted:
        busy = " on a busy machine" if plan.get("was_busy") else ""
        took += f"; of training, evaluations and answers {in_words(planned)} were planned{busy}"
        took += f", {duration(counted)} measured"
    return took


def _figure(value: float | str | None) -> str:
    """A figure, a dash where there is none, and the record's own text where it is not finite."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def _reader(adapter: Mapping[str, Any]) -> str:
    """Who reads the adapter, as far as it was tried."""
    if "stock_peft" not in adapter:
        return ""
    if not adapter["stock_peft"]:
        return f"  (not for stock PEFT: {adapter['stock_peft_refusal']})"
    # Stock PEFT would read the files, and compute something else beside the 16-bit base.
    return "  (for this run's 4-bit base alone)" if "init" in adapter else "  (stock PEFT loads it)"


def _example(example: Mapping[str, Any]) -> Text:
    mark = "right" if example["right"] else "wrong"
    return Text.assemble(
        (printable(example["prompt"].strip()), "dim"),
        "\n  answered: ",
        (printable(example["answered"].strip()), "green" if example["right"] else "yellow"),
        f"  ({mark})\n  expected: ",
        printable(example["expected"].strip()),
        "\n",
    )
