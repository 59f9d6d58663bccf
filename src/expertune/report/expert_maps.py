"""Maps of a run's experts: the share of tokens that each gets, before and after training and meanwhile."""

import math
import re
from collections.abc import Mapping
from typing import Any

from expertune.report.charts import LEVELS, Chart, Series, cells, draw, is_number
from expertune.report.values import Record, begins_as_base, entries, number, section

_FEW = 0.1
"""An expert saw few tokens if it got less than this part of an even share."""

_MOST_NAMED = 40
_MOST_CELLS = 60_000


def expert_maps(record: Record) -> dict[str, Any] | None:
    """What the page shows of the experts on evaluation examples; None where a record has no counts of them.

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
    start = "base model" if begins_as_base(record) else "adapter at the start"
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
    if adapted := _adapted(section(record, "adapter", "selection", "layers"), names, len(after[0])):
        maps.append(_map("with an adapter", adapted, 0, 100, "% with an adapter", layers))
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


def load_over_time(record: Record) -> dict[str, Any] | None:
    """Shares of each layer's experts by stretches of training steps; None where a record has no such series.

    Of many layers of many experts, as many are taken from all depths as keep the page small.
    """
    series = section(record, "train", "expert_tokens")
    steps = [each for each in entries(series, "steps") if isinstance(each, list) and len(each) == 2]
    counts = {str(name): rows for name, rows in section(series, "counts").items() if _drawable(rows, len(steps))}
    if not steps or not all(is_number(value) for each in steps for value in each) or not counts:
        return None
    names = list(counts)
    cells_of_one = max(len(rows) * len(rows[0]) for rows in counts.values())
    most = max(1, _MOST_CELLS // cells_of_one)
    kept = [names[place * len(names) // most] for place in range(most)] if len(names) > most else names
    layers: list[dict[str, Any]] = []
    for name in kept:
        stretches = [_shares(stretch) for stretch in counts[name]]
        rows = [[float(f"{value:.3g}") for value in row] for row in zip(*stretches, strict=True)]
        layers.append({"name": _layer(name, names.index(name)), "rows": rows})
    highest = max(value for layer in layers for row in layer["rows"] for value in row)
    columns = [f"{first:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}" for first, last in steps]
    first = layers[0]
    return {
        "layers": [layer["name"] for layer in layers],
        "left_out": len(names) - len(kept),
        "every": number(series, "every") or 1,
        "map": _drawn_map("Tokens by expert and step", first["rows"], (0, highest))
        | {
            "pixels": min(20 * len(first["rows"]), 420),
            "labels": _thinned_labels([str(expert) for expert in range(len(first["rows"]))]),
            "ends": ["0 %", f"{highest:.1f} %"],
            "scale": [f"step {steps[0][0]:,.0f}", f"{steps[-1][1]:,.0f}"],
            "shown": {
                "layers": layers,
                "highest": highest,
                "rows": first["rows"],
                "row": "expert",
                "names": [str(expert) for expert in range(len(first["rows"]))],
                "column": "steps",
                "columns": columns,
                "unit": "% of tokens",
            },
        },
    }


def _adapted(selected: Mapping[str, Any], names: list[str], count: int) -> list[list[float]]:
    """100 for each expert that has an adapter, 0 for others; nothing where all have one."""
    rows = [[100.0 * (expert in entries(selected, name)) for expert in range(count)] for name in names]
    return rows if selected and not all(all(row) for row in rows) else []


def deaths_in_words(experts: Mapping[str, Any]) -> str:
    """A sentence on experts that had tokens and get none any more, by the layer's name."""
    died = {_layer(name, place): of_layer for place, (name, of_layer) in enumerate(experts.items())}
    total = sum(map(len, died.values()))
    named = "; ".join(f"layer {layer}: {', '.join(map(str, of_layer))}" for layer, of_layer in died.items())
    which = f" ({named})" if total <= _MOST_NAMED else ""
    return (
        f"warning: {total} {'expert has' if total == 1 else 'experts have'} died while training: tokens at first, and "
        f"none any more{which}. See docs/guides/router.md"
    )


def _drawable(rows: Any, num_stretches: int) -> bool:
    """Whether each stretch has counts of the same experts."""
    return (
        isinstance(rows, list)
        and len(rows) == num_stretches
        and all(_are_counts(row) and len(row) == len(rows[0]) for row in rows)
    )


def _are_counts(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(isinstance(each, int) and 0 <= each < 2**63 for each in row)


def _evaluations(record: Record) -> dict[int, Mapping[str, Any]]:
    """Evaluations whose counts can be drawn, by step."""
    found = {}
    for step, evaluation in section(record, "experts", "evaluations").items():
        counts = section(evaluation, "counts")
        drawable = counts and all(_are_counts(row) and any(row) for row in counts.values())
        if drawable and str(step).isdecimal() and len({len(row) for row in counts.values()}) == 1:
            found[int(step)] = evaluation
    return found


def _shares(counts: list[int]) -> list[float]:
    total = sum(counts) or 1
    return [100 * each / total for each in counts]


def _layer(name: str, place: int) -> str:
    """The number of a decoder layer in a module's name, or its place."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return numbers[0] if numbers else str(place)


def _map(title: str, rows: list[list[float]], low: float, high: float, unit: str, layers: list[str]) -> dict[str, Any]:
    signed = low < 0
    return _drawn_map(title, rows, (low, high)) | {
        "pixels": round(len(rows) * min(26, max(7, 420 / len(rows)))),
        "labels": _thinned_labels(layers),
        "ends": [f"{low:+.1f}" if signed else f"{low:.0f} %", f"{high:+.1f} points" if signed else f"{high:.1f} %"],
        "scale": ["expert 0", str(len(rows[0]) - 1) if len(rows[0]) > 1 else ""],
        "shown": {
            "layers": [],
            "rows": [[float(f"{value:.3g}") for value in row] for row in rows],
            "row": "layer",
            "names": layers,
            "column": "expert",
            "columns": [],
            "unit": unit,
        },
    }


def _drawn_map(title: str, rows: list[list[float]], ends: tuple[float, float]) -> dict[str, Any]:
    """The cells of a map, with what both kinds have."""
    drawn = {"paths": cells(rows, *ends), "levels": LEVELS}
    return {"title": title, "change": False, "width": len(rows[0]), "height": len(rows)} | drawn


def _thinned_labels(names: list[str]) -> list[str]:
    every = max(1, math.ceil(len(names) / 16))
    return [name if place % every == 0 else "" for place, name in enumerate(names)]


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
