"""A plan as a table for the terminal."""

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from expertune.plan import Plan

# What each component is in the reader's words, and whether its bytes are exact.
_COMPONENTS = {
    "weights": ("frozen weights", True),
    "adapter": ("adapter", True),
    "gradients": ("adapter's gradients", True),
    "optimizer": ("optimizer", False),
    "activations": ("activations", False),
    "working_set": ("one layer in backward", False),
    "logits": ("logits and loss", False),
    "evaluation": ("evaluation", False),
    "framework": ("libraries", False),
}


def size(num_bytes: int) -> str:
    """Bytes in decimal units, as memory budgets are written: 24.31 GB, 512 MB."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.2f} GB"
    return f"{num_bytes / 10**6:.0f} MB" if num_bytes >= 10**6 else f"{num_bytes / 10**3:.0f} kB"


def render(plan: "Plan") -> RenderableType:
    """The plan as tables that fit a terminal of 80 columns."""
    parts: list[RenderableType] = [_heading(plan), Text(), _memory(plan), Text(), _verdict(plan)]
    if plan.what_to_change:
        parts += [Text(), _changes(plan)]
    elif not plan.fits:
        parts.append(Text("Nothing in the run file would lower the peak further."))
    if plan.notes:
        parts += [Text(), *(Text(f"note: {note}", style="dim") for note in plan.notes)]
    return Group(*parts)


def as_text(plan: "Plan", width: int = 80) -> str:
    """The plan as plain text, for error messages."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(render(plan))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _heading(plan: "Plan") -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    counts = plan.parameters
    table.add_row("model", Text(f"{plan.model} ({plan.architecture})"))
    table.add_row("device", f"{plan.device}, products in {plan.compute_dtype}")
    table.add_row("parameters", f"{counts.total:,} in all, {counts.trainable:,} trained")
    if plan.micro_batch.line:
        table.add_row("step", Text(plan.micro_batch.line))
    disk = f"adapter {size(plan.adapter_bytes)}"
    if plan.download_bytes is not None:
        disk += f", checkpoint {size(plan.download_bytes)}"
    table.add_row("on disk", disk)
    table.add_row("", Text(counts.line, style="dim"))
    return table


def _memory(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("memory", min_width=24)
    table.add_column("bytes", justify="right", min_width=11)
    table.add_column("")
    for name, num_bytes in plan.memory.components.items():
        if not num_bytes:
            continue
        words, exact = _COMPONENTS[name]
        if plan.memory.at_peak(name):
            table.add_row(words, size(num_bytes), f"exact: {num_bytes:,}" if exact else "estimate")
        else:
            table.add_row(words, f"({size(num_bytes)})", "not at the peak", style="dim")
    table.add_row("peak", size(plan.memory.peak_bytes), _moment(plan), style="bold")
    return table


def _moment(plan: "Plan") -> str:
    return {
        "loss": "while the loss is taken",
        "layer": "while a layer is in backward",
        "evaluation": "in evaluation",
    }[plan.memory.moment]


def _verdict(plan: "Plan") -> Text:
    budget, peak = plan.budget_bytes, plan.memory.peak_bytes
    if plan.fits:
        return Text(f"fits: {size(budget - peak)} of {size(budget)} stay free", style="bold green")
    return Text(f"does not fit: {size(peak - budget)} more than the {size(budget)} there are", style="bold red")


def _changes(plan: "Plan") -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("give up, cheapest first", min_width=24, no_wrap=True)
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_column("peak then", justify="right", no_wrap=True)
    table.add_column("costs")
    for change in plan.what_to_change:
        table.add_row("\n".join(change.lines), size(change.saves_bytes), size(change.peak_bytes), change.costs)
    if plan.what_to_change[-1].peak_bytes <= plan.budget_bytes:
        return table
    frozen = size(plan.weights.frozen_bytes)
    return Group(table, Text(f"Even with all of these it does not fit; the frozen weights alone take {frozen}."))
