"""Maps of a run's experts: the share of tokens that each gets, before and after training, and what changed."""

import math
import re
from collections.abc import Mapping
from typing import Any

from expertune.report.charts import LEVELS, Chart, Series, cells, draw
from expertune.report.values import Record, at, number, section

_FEW = 0.1
"""An expert saw few tokens if it got less than this part of an even share."""

_MOST_NAMED = 40


def expert_maps(record: Record) -> dict[str, Any] | None:
    """What the page shows of the experts; None where a record has no counts of them.

    Shares are of the tokens that a layer sends to its experts, in percent.
    """
    found = _evaluations(record)
    if not found:
        return None
    adapter = number(record, "adapter", "step")
    last = int(adapter) if adapter is not None and int(adapter) in found else max(found)
    first = 0 if 0 in found and last != 0 else None
    names = list(found[last]["counts"])
    after = [_shares(found[last]["counts"][name]) for name in names]
    start = "adapter at the start" if at(record, "config", "lora", "init_from") else "base model"
    tuned = f"adapter, step {last}" if last else start
    before: list[list[float]] = []
    if first is not None and list(found[first]["counts"]) == names:
        before = [_shares(found[first]["counts"][name]) for name in names]
    if [len(row) for row in before] != [len(row) for row in after]:
        before = []
    layers = [_layer(name, place) for place, name in enumerate(names)]
    highest = max(max(row) for row in [*before, *after])
    maps = [_map(start, before, 0, highest, "% of tokens", layers)] if before else []
    maps.append(_map(tuned, after, 0, highest, "% of tokens", layers))
    if before:
        change = [[new - old for old, new in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)]
        most = max(abs(value) for row in change for value in row) or 1.0
        maps.append(_map("change", change, -most, most, "percentage points", layers) | {"change": True})
    lines = [(name, values) for name, values in ((start, first), (tuned, last)) if values is not None]
    if not before:
        lines = lines[-1:]
    return {
        "maps": maps,
        "tokens": number(found[last], "tokens") or 0,
        "few": [(tuned, *_few(after, layers))]
        if not before
        else [
            (start, *_few(before, layers)),
            (tuned, *_few(after, layers)),
        ],
        "charts": [drawing for drawing in map(draw, _charts(found, lines, layers)) if drawing],
    }


def _evaluations(record: Record) -> dict[int, Mapping[str, Any]]:
    """Evaluations whose counts can be drawn, by step."""
    found = {}
    for step, evaluation in section(record, "experts", "evaluations").items():
        counts = section(evaluation, "counts")
        drawable = counts and all(
            isinstance(row, list) and row and all(isinstance(each, int) and each >= 0 for each in row) and sum(row)
            for row in counts.values()
        )
        if drawable and str(step).isdecimal() and len({len(row) for row in counts.values()}) == 1:
            found[int(step)] = evaluation
    return found


def _shares(counts: list[int]) -> list[float]:
    return [100 * each / sum(counts) for each in counts]


def _layer(name: str, place: int) -> str:
    """The number of a decoder layer in a module's name, or its place."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return numbers[0] if numbers else str(place)


def _map(title: str, rows: list[list[float]], low: float, high: float, unit: str, layers: list[str]) -> dict[str, Any]:
    every = max(1, math.ceil(len(layers) / 16))
    signed = low < 0
    return {
        "title": title,
        "change": False,
        "width": len(rows[0]),
        "height": len(rows),
        "pixels": round(len(rows) * min(26, max(7, 420 / len(rows)))),
        "paths": cells(rows, low, high),
        "labels": [name if place % every == 0 else "" for place, name in enumerate(layers)],
        "ends": [f"{low:+.1f}" if signed else f"{low:.0f} %", f"{high:+.1f} points" if signed else f"{high:.1f} %"],
        "levels": LEVELS,
        "shown": {
            "rows": [[float(f"{value:.3g}") for value in row] for row in rows],
            "names": layers,
            "unit": unit,
        },
    }


def _few(rows: list[list[float]], layers: list[str]) -> tuple[int, str]:
    """How many experts saw few tokens, and which."""
    few = {
        layer: [expert for expert, share in enumerate(row) if share < _FEW * 100 / len(row)]
        for layer, row in zip(layers, rows, strict=True)
    }
    total = sum(map(len, few.values()))
    named = [f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in few.items() if experts]
    return total, "; ".join(named) if total <= _MOST_NAMED else ""


def _charts(found: Mapping[int, Mapping[str, Any]], lines: list[tuple[str, int]], layers: list[str]) -> list[Chart]:
    """Router entropy and evenness of the load by layer."""
    numbers = [int(layer) for layer in layers]
    entropies, loads = [], []
    for color, (name, step) in enumerate(lines):
        values = section(found[step], "entropy")
        points = [
            (layer, value)
            for layer, key in zip(numbers, found[step]["counts"], strict=True)
            if (value := number(values, key)) is not None
        ]
        entropies.append(Series(name, points, color, "dots"))
        even = [(layer, _evenness(row)) for layer, row in zip(numbers, found[step]["counts"].values(), strict=True)]
        loads.append(Series(name, even, color, "dots"))
    return [
        Chart("Router entropy: of the weights of a token's experts (nats)", entropies, horizontal="layer"),
        Chart("Entropy of the load over the experts (1 is even)", loads, from_zero=False, horizontal="layer"),
    ]


def _evenness(counts: list[int]) -> float:
    """Entropy of the shares over its largest value."""
    shares = [each / sum(counts) for each in counts if each]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts)) if len(counts) > 1 else 1.0
