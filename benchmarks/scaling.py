"""An optimizer step as one size grows (tokens, experts, layers, rank, sequences): tokens per second and peak memory.

    python benchmarks/scaling.py --json OUT [--only tokens experts] [--seconds 55] [--png PICTURE] [--page PAGE]

Every point is a step of our stack in a process of its own, on real text that is cut into sequences of one length. OUT
is written after each point, and the same command goes on where it ended: with `--seconds` no point begins later than
that, and another machine's OUT is refused. About six minutes in all on two cores with AMX, 17 with AVX2 alone.

Beside each point stand two bounds from bare products of its sizes, measured before each of its steps: `floor`, all of
the step's products at the best rate of `torch.mm`; and `own_rows`, the experts' products at the rate that `torch.mm`
has with as many rows as an expert gets. Both count attention and adapters too, so that where a curve falls with its
bound, the step does no more than it has to.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import floor, report
from benchmarks.peers.processes import Driver
from benchmarks.workload import DOLLY_SAMPLE, Lora, Shape, prepare
from expertune.report.figures import write_png

HIDDEN = 1024
_ROUNDS = (3, 9)  # at least and at most
_ROUND_SECONDS = 4.0  # spent on one point, where that is more than the least rounds
_LONG_SECONDS = 10.0  # of two rounds, after which there is no third


@dataclass(frozen=True)
class Point:
    """Sizes of one step."""

    tokens: int = 2048
    experts: int = 8
    top_k: int = 2
    intermediate: int = 3584
    layers: int = 2
    rank: int = 8
    sequence: int = 256

    @property
    def name(self) -> str:
        """Key in the JSON."""
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return Shape(HIDDEN, self.intermediate, self.layers, self.experts, self.top_k)


BASE = Point()
# As many active weights in narrow experts, of which there can be many.
_NARROW = replace(BASE, intermediate=896, top_k=8)

CURVES: dict[str, dict[int, Point]] = {
    "tokens": {
        tokens: replace(BASE, tokens=tokens, sequence=min(tokens, 256)) for tokens in (64, 256, 1024, 2048, 8192)
    },
    "experts": {experts: replace(_NARROW, experts=experts) for experts in (8, 32, 128, 256)},
    "layers": {layers: replace(BASE, layers=layers) for layers in (1, 2, 4, 8)},
    "rank": {rank: replace(BASE, rank=rank) for rank in (8, 32, 128)},
    "sequence": {length: replace(BASE, tokens=8192, sequence=length) for length in (256, 1024, 8192)},
}
_AXES = {
    "tokens": "tokens of a step",
    "experts": "experts, 8 per token",
    "layers": "layers",
    "rank": "rank of the adapters",
    "sequence": "tokens of a sequence,\n8,192 of a step",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="written after each point; points in it are kept")
    parser.add_argument("--only", nargs="*", choices=list(CURVES), default=list(CURVES), help="curves; default all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no point after so many seconds")
    parser.add_argument("--cache", type=Path, help="where weights are made once; default: the temporary folder")
    parser.add_argument("--png", type=Path, help="draw all points here")
    parser.add_argument("--page", type=Path, help="write the table between this page's marks")
    args = parser.parse_args()
    cache = args.cache or Path(tempfile.gettempdir()) / "expertune-bench"
    result = report.read_own(args.json) or {"points": {}}
    started = time.perf_counter()
    curves = [list(CURVES[curve].values()) for curve in args.only]
    # The ends of all curves first: a sweep that is cut short shows what grows.
    ordered = [point for points in curves for point in (points[0], points[-1])] + [
        p for points in curves for p in points
    ]
    wanted = {point.name: point for point in ordered}
    for name, point in wanted.items():
        if name in result["points"] or time.perf_counter() - started > args.seconds:
            continue
        report.progress(name)
        here = report.environment()
        measured = measure(point, cache) | {key: here[key] for key in ("device", "date", "commit")}
        result = {"benchmark": "scaling", "points": result["points"] | {name: measured}, **here}
        report.write(args.json, result)
    points = result["points"]
    _show(points)
    if left := [name for name in wanted if name not in points]:
        report.progress(f"{len(left)} points are left; the same command goes on")
    if args.png:
        write_png(draw(points), args.png)
    if args.page:
        write_table(args.page, result)


def measure(point: Point, cache: Path) -> dict[str, Any]:
    """Steps of one point in a process of its own, and its bounds: seconds, tokens per second, bytes."""
    dtype = report.resolve_dtype("auto", "cpu")
    driver = Driver("ours", [*_options(point, cache), "--dtype", report.name_of(dtype)])
    try:
        driver.ask("step")
        seconds: list[float] = []
        at: list[dict[str, float]] = []
        while _goes_on(seconds):
            at.append(bounds(point, floor.product_rates(point.shape, point.tokens, dtype)))
            seconds.append(driver.ask("step")["seconds"])
        memory = driver.ask("memory")
    finally:
        driver.close()
    speeds = [point.tokens / each for each in seconds]
    return {
        **asdict(point),
        "dtype": report.name_of(dtype),
        "tokens_per_second": statistics.median(speeds),
        "seconds": seconds,
        **memory,
        "trainable_parameters": driver.ready["trainable_parameters"],
        "bounds": {name: statistics.median(each[name] for each in at) for name in at[0]},
        "shares": {
            name: statistics.median(speed / each[name] for speed, each in zip(speeds, at, strict=True))
            for name in at[0]
        },
    }


def _goes_on(seconds: list[float]) -> bool:
    """Whether there is another round after these."""
    spent, (least, most) = sum(seconds), _ROUNDS
    return len(seconds) < (2 if spent > _LONG_SECONDS else least) or (len(seconds) < most and spent < _ROUND_SECONDS)


def _options(point: Point, cache: Path) -> list[str]:
    """What a driver gets of a point."""
    lora = Lora(r=point.rank, alpha=2 * point.rank)
    made = prepare(point.shape, lora, point.tokens, DOLLY_SAMPLE, cache, point.sequence)
    paths = ["--model", made.model, "--adapter", made.adapter, "--batch", made.batch]
    return [*map(str, paths), "--dropout", str(lora.dropout)]


def bounds(point: Point, rates: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Tokens per second that products alone allow at the rates of `floor.product_rates`."""
    of_expert, of_all = (rates[name]["flops_per_second"] for name in ("expert", "all rows"))
    experts = floor.expert_flops(point.shape, point.tokens)
    rest = (
        floor.step_flops(point.shape, point.tokens)
        - experts
        + floor.attention_flops(point.shape, point.tokens, point.sequence)
        + floor.adapter_flops(point.shape, point.tokens, point.rank)
    )
    return {
        "floor": point.tokens * max(of_expert, of_all) / (experts + rest),
        "own_rows": point.tokens / (experts / of_expert + rest / of_all),
    }


def rows_of(points: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row of the table for each point that was measured, curve by curve."""
    rows = []
    for curve, of_sizes in CURVES.items():
        base = BASE if BASE in of_sizes.values() else next(iter(of_sizes.values()))
        for size, point in of_sizes.items():
            if (found := points.get(point.name)) is None:
                continue
            rows.append(
                [
                    f"{curve} {size:,}",
                    f"{found['tokens_per_second']:,.0f}",
                    _beside(point, base, points),
                    f"{found['bounds']['floor']:,.0f}",
                    f"{found['shares']['floor']:.0%}",
                    f"{found['shares']['own_rows']:.0%}",
                    f"{found['step_peak_bytes'] / 1e9:.2f} GB",
                ]
            )
    return rows


def _beside(point: Point, base: Point, points: Mapping[str, Mapping[str, Any]]) -> str:
    """The speed of a point as a share of its curve's base, and what it would be by FLOPs alone."""
    by_flops = _speed_at_one_rate(point) / _speed_at_one_rate(base)
    if base.name not in points:
        return f"- ({by_flops:.2f})"
    return f"{points[point.name]['tokens_per_second'] / points[base.name]['tokens_per_second']:.2f} ({by_flops:.2f})"


def _speed_at_one_rate(point: Point) -> float:
    rate = {"flops_per_second": 1.0}
    return bounds(point, {"expert": rate, "all rows": rate})["floor"]


_HEADER = [
    "",
    "tokens a second",
    "of the base (by FLOPs)",
    "floor",
    "of the floor",
    "of products with as many rows",
    "peak memory",
]


def write_table(page: Path, result: Mapping[str, Any]) -> None:
    """Write the table of a page anew, between its two marks."""
    dtype = next(iter(result["points"].values()))["dtype"]
    lines = [
        f"{result['device']}, {result['threads']} threads ({', '.join(result['instruction_sets'])}), {dtype}; torch "
        f"{result['versions']['torch']}; {result['date'][:10]}. `python benchmarks/scaling.py --json OUT`",
        "",
        f"| {' | '.join(_HEADER)} |",
        "|" + "---|" * len(_HEADER),
        *(f"| {' | '.join(row)} |" for row in rows_of(result["points"])),
    ]
    report.write_block(page, "scaling", lines)


def draw(points: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Speed with its bounds, and memory below it, one column for each curve."""
    curves = {
        name: {size: points[point.name] for size, point in of_sizes.items() if point.name in points}
        for name, of_sizes in CURVES.items()
    }
    curves = {name: found for name, found in curves.items() if found}
    figure = Figure(figsize=(1.0 + 2.0 * len(curves), 4.6), layout="constrained")
    panels = figure.subplots(2, len(curves), sharex="col", squeeze=False, height_ratios=(1.6, 1.0))
    for column, (curve, found) in enumerate(curves.items()):
        speed, memory = panels[:, column]
        lines = {
            "floor": ("#999999", "--", [each["bounds"]["floor"] for each in found.values()]),
            "products, own rows": (
                "#D55E00",
                ":",
                [each["bounds"]["own_rows"] for each in found.values()],
            ),
            "ours": ("#0072B2", "-", [each["tokens_per_second"] for each in found.values()]),
        }
        for label, (color, style, values) in lines.items():
            speed.plot(list(found), values, color=color, linestyle=style, marker="o", markersize=3, label=label)
        peaks = [each["step_peak_bytes"] / 1e9 for each in found.values()]
        memory.plot(list(found), peaks, color="#0072B2", marker="o", markersize=3)
        _dress(speed, memory, list(found))
        memory.set_xlabel(_AXES[curve], fontsize=9)
    panels[0, 0].set_ylabel("tokens a second")
    panels[1, 0].set_ylabel("peak, GB")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _dress(speed: Axes, memory: Axes, sizes: list[int]) -> None:
    for axes in (speed, memory):
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.tick_params(labelsize=8)
    memory.set_xscale("log", base=2)
    memory.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 3 else 0)
    memory.minorticks_off()


def _show(points: Mapping[str, Mapping[str, Any]]) -> None:
    report.show(f"One step, hidden {HIDDEN}, as one size grows", _HEADER, rows_of(points), [])


if __name__ == "__main__":
    main()
