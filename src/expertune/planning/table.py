"""A plan as tables for the terminal; on a narrow one words are folded, and nothing is cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from expertune.planning.fit import Change, as_lines
from expertune.text import format_size

if TYPE_CHECKING:
    from expertune.planning.disk import Disk
    from expertune.planning.ranks import RanksPlan
    from expertune.planning.result import Plan
    from expertune.planning.speed import StepTime

# Components in the reader's words. The bytes of those in `_EXACT` are counted, all others estimated.
_COMPONENTS = {
    "weights": "frozen weights",
    "slots": "slots for offloaded experts",
    "adapter": "adapter",
    "first": "the factors it began with",
    "gradients": "adapter's gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "gate_up": "gate and up kept",
    "working_set": "one layer in backward",
    "workspace": "memory of the layers",
    "logits": "logits and loss",
    "copies": "copies of the adapter",
    "reference": "the adapter it starts from",
    "bucket": "gradients being averaged",
    "updating": "one factor's update",
    "evaluation": "evaluation",
    "cache": "keys and values cached",
    "generation": "answering",
    "framework": "libraries",
    "allocator": "allocator",
}
_EXACT = ("weights", "adapter")

# Characters for two sizes, and a word of what a change costs.
_BESIDE_LINES = 36

_PHASES = {
    "preflight": "in the preflight check",
    "reference": "while the reference computes",
    "calibration": "while it is calibrated",
    "initialization": "while first factors are computed",
    "loss": "while the loss is taken",
    "layer": "while a layer is in backward",
    "average": "while gradients are averaged",
    "update": "in the optimizer's update",
    "save": "while the adapter is written",
    "evaluation": "in evaluation",
    "writing": "while answers to train on are written",
    "generation": "while answers are written",
}


def render(plan: "Plan") -> RenderableType:
    """The plan as tables."""
    parts: list[RenderableType] = [_heading(plan), "", _memory(plan), "", _verdict(plan)]
    if plan.ranks:
        parts += ["", *_ranks(plan.ranks)]
    if not plan.fits:
        parts += ["", *_advice(plan)]
    if plan.notes:
        parts += ["", *(Text(f"note: {note}", style="dim") for note in plan.notes)]
    return Group(*parts)


def as_text(plan: "Plan", width: int = 80) -> str:
    """The plan as plain text, for error messages."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(render(plan))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def shortfall(plan: "Plan") -> str:
    """What is missing, and the least that changes can bring it to, in a sentence."""
    budget, smallest = plan.budget_bytes, plan.smallest_peak_bytes
    settings = " ".join(as_lines(plan.changed_settings))
    if smallest <= budget:
        after = "".join(f" after `{change.first}`" for change in plan.what_to_change if change.first)
        return f"{format_size(plan.memory.peak_bytes)} of {format_size(budget)}; it would with {settings}{after}"
    how = f"with {settings}" if settings else "as the run file has it"
    return f"the smallest peak that can be reached is {format_size(smallest)} of {format_size(budget)}, {how}"


def _heading(plan: "Plan") -> Table:
    counts = plan.parameters
    lines: Mapping[str, str | None] = {
        "model": f"{plan.model} ({plan.architecture})",
        "device": f"{plan.gpu or plan.device}, products in {plan.products_in}",
        "objective": f"{plan.objective}: {plan.passes}" if plan.passes else None,
        "parameters": f"{counts.total:,} in all, {counts.trainable:,} trained",
        "step": plan.micro_batch.line(plan.ranks.chosen.distribution.world_size if plan.ranks else 1),
        "processes": plan.ranks.line if plan.ranks else None,
        "placement": plan.planned.reason,
        "keeps": plan.kept.line,
        "time": _time(plan.time) if plan.time else None,
        "the run": plan.run_time.line if plan.run_time else None,
        "on disk": _disk(plan.disk),
    }
    table = Table.grid("", "", padding=(0, 2))
    table.columns[0].style = "dim"
    table.columns[1].overflow = "fold"
    for name, line in lines.items():
        if line:
            table.add_row(name, Text(line))
    table.add_row("", Text(counts.line, style="dim"))
    return table


def _time(time: "StepTime") -> str:
    if time.is_least:
        busy = f", by a speed that was {time.source}" if time.rates.was_busy else ""
        least = f"at least {_seconds(time.seconds)} a step of {time.tokens:,} tokens{busy}"
        return f"{least}; the model is too small to tell more"
    rates, in_integers = time.rates, ""
    if rates.integer_flops_per_second:
        in_integers = f", {rates.integer_flops_per_second / 1e12:.3g} in integers"
    line = (
        f"{_seconds(time.seconds)} a step of {time.tokens:,} tokens, {time.tokens_per_second:,.0f} tokens/s; at least "
        f"{_seconds(time.floor_seconds)} at {rates.flops_per_second / 1e12:.3g} TFLOP/s{in_integers} ({time.source}), "
        f"of which {100 * time.efficiency:.0f} % are expected"
    )
    if time.brought_bytes:
        line += (
            f"; {format_size(time.brought_bytes)} are transferred, {_seconds(time.waiting_seconds)} of it not hidden"
        )
    return line


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def _disk(disk: "Disk") -> str:
    parts = [] if disk.download_bytes is None else [f"checkpoint {format_size(disk.download_bytes)}"]
    parts += [f"in 4 bits {format_size(disk.nf4_folder_bytes)}", f"adapter {format_size(disk.adapter_bytes)}"]
    return f"{', '.join(parts)}, each saved step {format_size(disk.checkpoint_bytes)}"


def _table(*columns: str) -> Table:
    """Without lines; the first column is text, and so is the last, those between are sizes."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        is_size = 0 < number < len(columns) - 1
        table.add_column(column, justify="right" if is_size else "left", no_wrap=is_size, overflow="fold")
    return table


def _memory(plan: "Plan") -> Table:
    memory, table = plan.memory, _table("memory", "bytes", "")
    for name, num_bytes in memory.components.items():
        if num_bytes:
            table.add_row(
                _COMPONENTS[name], format_size(num_bytes), f"exact: {num_bytes:,}" if name in _EXACT else "estimate"
            )
    table.add_row("peak", format_size(memory.peak_bytes), _PHASES[memory.phase], style="bold")
    for phase, num_bytes in memory.totals.items():
        if phase != memory.phase:
            table.add_row("", f"({format_size(num_bytes)})", _PHASES[phase], style="dim")
    if plan.kept.layers:
        table.add_row("peak without gate and up", format_size(plan.kept.peak_bytes_without), "with kernels.keep: 0")
    if memory.host_bytes:
        table.add_row("beside it, on the host", format_size(memory.host_bytes), "")
    return table


def _ranks(ranks: "RanksPlan") -> list[RenderableType]:
    """What each rank holds, and what it sends, by how the ranks hold the experts; the way that is taken in bold."""
    on_host = any(mode.host_bytes for mode in ranks.modes)
    holds = _table("each process holds", "experts", "peak", *["host"] * on_host, "")
    sends = _table("and sends in a step", "bytes", *(link.short for link in ranks.compared), "")
    for mode in ranks.modes:
        name, style = mode.distribution.name, "bold" if mode is ranks.chosen else None
        sizes = [mode.experts_bytes, mode.peak_bytes, *[mode.host_bytes] * on_host]
        holds.add_row(name, *map(format_size, sizes), "fits" if mode.fits else "too much", style=style)
        times = [short_seconds(mode.link_seconds(link)) for link in ranks.compared]
        sends.add_row(name, format_size(mode.traffic.sent_bytes), *times, "", style=style)
    told = "planned, not measured: published rates of links, each for one process alone"
    return [holds, "", sends, Text(told, style="dim")]


def short_seconds(seconds: float) -> str:
    """A time for a narrow column: 12 ms, 3.4 s."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _verdict(plan: "Plan") -> Text:
    budget, peak = plan.budget_bytes, plan.memory.peak_bytes
    if plan.fits:
        return Text(f"fits: {format_size(budget - peak)} of {format_size(budget)} stay free", style="bold green")
    return Text(
        f"does not fit: {format_size(peak - budget)} more than the {format_size(budget)} there are", style="bold red"
    )


@dataclass(frozen=True)
class _Changes:
    """Changes as a table, whose lines stay whole, to be copied: above the other columns where a terminal is narrow."""

    title: str
    changes: Sequence[Change]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        longest = max(len(line) for change in self.changes for line in change.lines)
        others = ("saves", "peak then", "costs")
        if options.max_width >= longest + _BESIDE_LINES:
            yield Text(self.title)
            table = _table("", *others)
            table.columns[0].no_wrap = True
            for change in self.changes:
                table.add_row(Text("\n".join(change.lines)), *_gains(change))
            yield table
            return
        yield Text(self.title)
        yield _beside(*others)
        for change in self.changes:
            table = _beside(*others)
            table.show_header = False
            table.add_row("", *_gains(change))
            yield Text("\n".join(change.lines))
            yield table


def _beside(*columns: str) -> Table:
    """A table whose sizes stand in the same place whatever its rows are."""
    table = _table("", *columns)
    table.columns[1].min_width = table.columns[2].min_width = len("peak then")
    return table


def _gains(change: Change) -> tuple[str, str, str]:
    costs = f"{change.costs}; `expertune quantize` once" if change.first else change.costs
    return format_size(change.saves_bytes), format_size(change.peak_bytes), costs


def _advice(plan: "Plan") -> list[RenderableType]:
    """What makes the run fit; where nothing does, how near it comes."""
    changes, others = plan.advice.changes, plan.advice.alternatives
    if not changes:
        return ["Nothing in the run file would lower the peak further."]
    if plan.smallest_peak_bytes > plan.budget_bytes:
        largest = max(plan.memory.components, key=plan.memory.components.__getitem__)
        return [
            "No change makes it fit. The smallest peak that can be reached is "
            f"{format_size(plan.smallest_peak_bytes)}, with {' '.join(as_lines(plan.changed_settings))}. As planned, "
            f"most is taken by {largest}: {format_size(plan.memory.components[largest])}."
        ]
    it_fits = "With this it fits:" if len(changes) == 1 else "With these together it fits, and with none left out:"
    parts: list[RenderableType] = [_Changes(it_fits, changes)]
    if others:
        parts += ["", _Changes("And so it does with each of these alone, cheapest first:", others)]
    which = "the first of these" if others else "this" if len(changes) == 1 else "all of it"
    told = Text(f"{which} in the run file, each key in its section:", style="dim")
    if first := [Text(change.first) for change in changes if change.first]:
        parts += ["", Text("once, before it:", style="dim"), *first]
    return [*parts, "", told, Text(plan.yaml.rstrip())]
