"""Targets against what was measured: a table on the terminal, and the block of docs/performance-details.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.campaign import schedule, variants

# Tokens of a step -> tokens per second.
_MIXTRAL = {320: 2500, 2048: 4600, 8192: 6000}
_QWEN = 4500
_DECODE = 2.7e12
_LAYER = 1.5
_PEAK = 27.5e9
_LAUNCHES = 15


class Row(NamedTuple):
    """One target; `met` is None where nothing was measured."""

    number: str
    what: str
    target: str
    measured: str
    met: bool | None
    note: str = ""


Groups = dict[str, dict[str, Any]]


def load(folder: Path) -> Groups:
    """The JSON of each group that there is."""
    found = [schedule.read(path) for path in sorted(folder.glob("*.json"))]
    return {values["group"]: values for values in found if values is not None and "group" in values}


def rows(folder: Path, groups: Groups) -> list[Row]:
    """Every target with what was measured; a route that failed its check has no figure here."""
    small = any(values["small"] for values in groups.values())
    items = {name: item for values in groups.values() for name, item in values["items"].items()}
    device = "cuda" if any(values.get("cuda") for values in groups.values()) else "cpu"
    found = [*_layer(items), *_mixtral(items), *_qwen(items)]
    if small:  # a dry run meets no target and misses none
        found = [row._replace(met=None) for row in found]
    return [*_correct(variants.gate(folder, device)), *_failed(groups), *found]


def show(folder: Path) -> None:
    """Print the table."""
    groups = load(folder)
    if not groups:
        report.progress(f"{folder}: nothing has been measured")
        return
    one = next(iter(groups.values()))
    notes = schedule.lines(schedule.read(folder / "campaign.json") or {"groups": []})
    if any(values["small"] for values in groups.values()):
        notes.append("small shapes: a dry run, whose figures say nothing")
    words = {None: "-", True: "yes", False: "NO"}
    table = [[row.number, row.what, row.target, row.measured, words[row.met], row.note] for row in rows(folder, groups)]
    report.show(f"Targets on {one['device']}", ["", "figure", "target", "measured", "met", "note"], table, notes)


def write_page(page: Path, folder: Path) -> None:
    """Write the block between the page's marks, from groups that ran at full size on CUDA.

    Raises:
        SystemExit: none did, they are of several devices, or the page has lost its marks; it stays as it was.
    """
    groups = {name: values for name, values in load(folder).items() if values.get("cuda") and not values["small"]}
    if not groups or len({values["device"] for values in groups.values()}) != 1:
        raise SystemExit(f"{folder} has no full-size measurements of one CUDA device; {page} stays as it was")
    one = next(iter(groups.values()))
    versions = ", ".join(f"{name} {one['versions'][name]}" for name in ("torch", "triton", "transformers", "peft"))
    words = {None: "not measured", True: "yes", False: "no"}
    lines = [
        f"{one['device']}; {versions}, bitsandbytes {one['versions']['bitsandbytes']}; commit {one['commit'][:12]}; "
        f"{one['date'][:10]}. `python benchmarks/gpu_campaign.py`, random weights, real text.",
        "",
        "| target | figure | target | measured | met |",
        "|---|---|---|---|---|",
        *(
            f"| {row.number} | {row.what} | {row.target} | {row.measured} | {words[row.met]} |"
            for row in rows(folder, groups)
        ),
    ]
    report.write_block(page, "gpu", lines)


def _correct(gate: dict[str, dict[str, list[str]]]) -> Iterator[Row]:
    if not (gate["passed"] or gate["failed"]):
        yield Row("gate", "every route computes what it should", "all pass", "-", None)
        return
    failed = [f"{route} ({', '.join(checks)})" for route, checks in gate["failed"].items()]
    said = "; ".join([*([f"passed: {', '.join(gate['passed'])}"] if gate["passed"] else []), *failed])
    yield Row("gate", "every route computes what it should", "all pass", said, not failed)


def _failed(groups: Groups) -> Iterator[Row]:
    for name, values in groups.items():
        for item in schedule.failed_items(values):
            yield Row("check", item if item.startswith(name) else f"{name}: {item}", "passes", "failed", False)


def _layer(items: dict[str, Any]) -> Iterator[Row]:
    for name in ("mixtral", "qwen3"):
        found = items.get(f"decode {name}")
        rate = found and found["bytes_per_second"]["ours"]
        note = f"bitsandbytes {found['bytes_per_second']['bitsandbytes'] / 1e12:.2f}" if found else ""
        measured = f"{rate / 1e12:.2f} TB/s" if rate else "-"
        yield Row("P4", f"decode, {name}", ">= 2.7 TB/s", measured, rate and rate >= _DECODE, note)
    layers = {name: item for name, item in items.items() if name.startswith("layer ")}
    for name, item in layers.items():
        ratio = item.get("ratio")
        measured = f"{ratio:.2f}x" if ratio else "-"
        note = f"{item['fastest']} over {item['best_peer']}" if ratio else ""
        target = f">= {_LAYER}x" if "mixtral" in name else "-"
        met = None if not ratio or target == "-" else ratio >= _LAYER
        yield Row("P5", name, target, measured, met, note)
    if not layers:
        yield Row("P5", "expert layer, forward + backward", f">= {_LAYER}x", "-", None)
    for name, item in layers.items():
        for route, passes in item.get("launches", {}).items():
            counts = [passes[one]["launches"] for one in ("forward", "backward")]
            waits = passes["synchronisations"].get("value")
            if not all(isinstance(count, int) for count in counts) or waits is None:
                continue
            measured = f"{counts[0]} + {counts[1]}, {waits} syncs"
            met = max(counts) <= _LAUNCHES and waits == 0
            yield Row("P9", f"launches of {route}, {name}", f"<= {_LAUNCHES} a pass; 0 syncs", measured, met)


def _mixtral(items: dict[str, Any]) -> Iterator[Row]:
    for tokens, target in _MIXTRAL.items():
        item = items.get(f"step T={tokens}")
        rate = item and item["tokens_per_second"]
        note = f"{item['share_of_floor']:.2f} of the floor" if item else ""
        measured = f"{rate:,.0f} tok/s" if rate else "-"
        yield Row(
            "P6", f"Mixtral-8x7B step, T={tokens}", f">= {target:,} tok/s", measured, rate and rate >= target, note
        )
    item = items.get("step T=2048")
    peak = item and item["memory"]["peak_allocated"]
    peak = peak if isinstance(peak, int) else None
    measured = f"{peak / 1e9:.1f} GB" if peak else "-"
    yield Row("P8", "Mixtral-8x7B peak memory, T=2048, resident", "<= 27.5 GB", measured, peak and peak <= _PEAK)


def _qwen(items: dict[str, Any]) -> Iterator[Row]:
    ours = {name: item for name, item in items.items() if name.startswith("ours, 48") and "tokens_per_second" in item}
    if not ours:
        yield Row("P7", "Qwen3-30B-A3B step, alpaca 2 x 4, r 16", f">= {_QWEN:,} real tok/s", "-", None)
    for name, item in ours.items():
        rate = item["tokens_per_second"]
        what = f"Qwen3-30B-A3B, {name.removeprefix('ours, ')}"
        measured = f"{rate:,.0f} tok/s, {item['median_s']:.3f} s"
        yield Row("P7", what, f">= {_QWEN:,} real tok/s", measured, rate >= _QWEN)
    for name, ratio in items.get("ratios", {}).items():
        if isinstance(ratio, float):
            layers = items["checkpoint"]["layers"]
            yield Row("P7", f"{name} over ours, {layers} layers", "-", f"{ratio:.2f}x", None)
