"""A plan as a table for the terminal."""

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from expertune.planning import Plan

# What each component is in the reader's words, and whether its bytes are exact.
_COMPONENTS = {
    "weights": ("frozen weights", True),
    "slots": ("slots for offloaded experts", False),
    "adapter": ("adapter", True),
    "gradients": ("adapter's gradients", False),
    "optimizer": ("optimizer", False),
    "activations": ("activations", False),
    "working_set": ("one layer in backward", False),
    "logits": ("logits and loss", False),
    "copies": ("copies of the adapter", False),
    "evaluation": ("evaluation", False),
    "cache": ("keys and values cached", False),
    "generation": ("answering", False),
    "framework": ("libraries", False),
    "allocator": ("allocator", False),
}

_PHASES = {
    "preflight": "in the preflight check",
    "loss": "while the loss is taken",
    "layer": "while a layer is in backward",
    "update": "in the optimizer's update",
    "save": "while the adapter is written",
    "evaluation": "in evaluation",
    "generation": "while answers are written",
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
    table.add_row("device", f"{plan.gpu or plan.device}, products in {plan.compute_dtype}")
    table.add_row("parameters", f"{counts.total:,} in all, {counts.trainable:,} trained")
    if plan.micro_batch.line:
        table.add_row("step", Text(plan.micro_batch.line))
    if plan.planned.reason:
        table.add_row("placement", Text(plan.planned.reason))
    if plan.time:
        table.add_row("time", Text(_time(plan)))
    table.add_row("on disk", _disk(plan))
    table.add_row("", Text(counts.line, style="dim"))
    return table


def _time(plan: "Plan") -> str:
    time = plan.time
    assert time is not None
    rate = time.rates.flops_per_second / 1e12
    line = (
        f"{_seconds(time.seconds)} a step of {time.tokens:,} tokens, {time.tokens_per_second:,.0f} tokens/s; at least "
        f"{_seconds(time.floor_seconds)} at {rate:.3g} TFLOP/s ({time.rates.source}), of which "
        f"{100 * time.efficiency:.0f} % are expected"
    )
    if time.brought_bytes:
        line += f"; {size(time.brought_bytes)} are transferred, {_seconds(time.waiting_seconds)} of it not hidden"
    return line


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def _disk(plan: "Plan") -> str:
    disk = plan.disk
    parts = [] if disk.download_bytes is None else [f"checkpoint {size(disk.download_bytes)}"]
    parts += [f"in 4 bits {size(disk.nf4_folder_bytes)}", f"adapter {size(disk.adapter_bytes)}"]
    return f"{', '.join(parts)}, each saved step {size(disk.checkpoint_bytes)}"


def shortfall(plan: "Plan") -> str:
    """What is missing, and the least that changes can bring it to, in a sentence."""
    budget, smallest = plan.budget_bytes, plan.smallest_peak_bytes
    if smallest <= budget:
        settings = " ".join(line for change in plan.what_to_change for line in change.lines)
        return f"{size(plan.memory.peak_bytes)} of {size(budget)}; it would with {settings}"
    settings = " ".join(line for line in dict.fromkeys(line for change in plan.what_to_change for line in change.lines))
    with_settings = f", with {settings}" if settings else ", as the run file has it"
    return f"the smallest peak that can be reached is {size(smallest)} of {size(budget)}{with_settings}"


def _memory(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("memory", min_width=24)
    table.add_column("bytes", justify="right", min_width=11)
    table.add_column("")
    for name, num_bytes in plan.memory.components.items():
        if num_bytes:
            words, exact = _COMPONENTS[name]
            table.add_row(words, size(num_bytes), f"exact: {num_bytes:,}" if exact else "estimate")
    table.add_row("peak", size(plan.memory.peak_bytes), _PHASES[plan.memory.phase], style="bold")
    for phase, num_bytes in plan.memory.totals.items():
        if phase != plan.memory.phase:
            table.add_row("", f"({size(num_bytes)})", _PHASES[phase], style="dim")
    if plan.memory.host_bytes:
        table.add_row("beside it, on the host", size(plan.memory.host_bytes), "")
    return table


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
    parts: list[RenderableType] = [table]
    if plan.smallest_peak_bytes > plan.budget_bytes:
        smallest, frozen = size(plan.smallest_peak_bytes), size(plan.weights.frozen_bytes)
        words = (
            f"Even with all of these it does not fit: the smallest peak is {smallest}; the frozen weights alone take "
        )
        parts.append(Text(f"{words}{frozen}."))
    told = Text("all of it in the run file, each key in its section:", style="dim")
    return Group(*parts, Text(), told, Text(plan.yaml.rstrip()))
