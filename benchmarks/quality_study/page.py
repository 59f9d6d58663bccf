"""The tables of docs/quality.md, written between its marks from the JSON of a study."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.quality_study.origin import origins
from benchmarks.quality_study.variants import DEFAULT, Variant

TASKS = {"meaning": "slot F1", "act": "exact match", "book": "exact match"}
MODELS = {
    "embedded": "the embedded model",
    "many experts": "16 small experts",
    "tuned": "the embedded model tuned on ViGGO",
}

Cells = dict[int, dict[str, Any]]  # by seed


def write_tables(page: Path, result: dict[str, Any], variants: Sequence[Variant]) -> None:
    """Write a page's tables anew.

    Raises:
        SystemExit: the page has lost a mark.
    """
    report.write_block(page, "bits", bits_tables(result))
    report.write_block(page, "study", study_tables(result, variants))


def bits_tables(result: dict[str, Any]) -> Iterable[str]:
    """What 4 bits cost before any training."""
    found = {name: result["bits"][name] for name in MODELS if "nf4" in result["bits"].get(name, {})}
    if not found:
        return
    yield from _table(
        ["what is in NF4", *(MODELS[name] for name in found)],
        [
            ["nothing: loss in nats a token", *(f"{each['loss_16bit']:.4f}" for each in found.values())],
            ["all that is by default", *(_added(each["nf4"]) for each in found.values())],
            *(
                [f"{kind['what']} alone", *(_added(each["kinds"][at]["only_this"]) for each in found.values())]
                for at, kind in enumerate(next(iter(found.values()))["kinds"])
            ),
            ["lm_head alone (16-bit by default)", *(_added(each["head"]) for each in found.values())],
            *(
                [f"{layer['what']} alone", *(_added(each["layers"][at]["only_this"]) for each in found.values())]
                for at, layer in enumerate(next(iter(found.values()))["layers"])
            ),
        ],
    )
    for name, each in found.items():
        if score := each["16bit"].get("score"):
            figures = ", ".join(
                f"{figure} {value:.3f} in 16 bits and {each['nf4']['score'][figure]:.3f} in NF4"
                for figure, value in score.items()
            )
            yield f"{MODELS[name].capitalize()}, {each['answers']} answers: {figures}."
            yield ""
    yield "The most sensitive parts stay in 16 bits, as many as a budget of bytes allows:"
    yield ""
    rows = []
    for name, each in found.items():
        for mixed in each["mixed"]:
            if mixed["in_16_bits"]:
                kept = ", ".join(mixed["in_16_bits"])
                rows.append([MODELS[name], f"{mixed['more_bytes']:+.0%}", _added(mixed), kept])
    yield from _table(["model", "bytes", "loss that is left", "in 16 bits"], rows)


def study_tables(result: dict[str, Any], variants: Sequence[Variant]) -> Iterable[str]:
    """Scores and losses of the variants, and what was left out. Times of two workers at once would say little."""
    cells = {
        variant.name: {
            task: {
                seed: cell
                for seed in range(1, variant.seeds + 1)
                if "score" in (cell := result["cells"].get(f"{variant.name} | {task} | {seed}", {}))
            }
            for task in TASKS
        }
        for variant in variants
    }
    shown = [variant for variant in variants if all(cells[variant.name].values())]
    default = cells[DEFAULT]
    yield (
        f"{result['device']}, {result['workers']} processes of one thread, {result['seconds'] / 60:.0f} minutes; "
        f"{_versions(result)}; {result['date'][:10]}."
    )
    yield ""
    measured = origins(result)
    if len(measured) > 1:
        yield "Not all was measured in one place and with one commit:"
        yield ""
        yield from (
            f"- {count} results: {each['device']}; {_versions(each)}; commit {each['commit']}"
            for each, count in measured
        )
        yield ""
    yield "Scores, mean and standard deviation over seeds:"
    yield ""
    names = [f"{task}, {figure}" for task, figure in TASKS.items()]
    yield from _table(
        ["variant", "trained parameters", "seeds", *names, "difference to NF4"],
        [
            [
                variant.name,
                f"{_first(cells[variant.name]['meaning'])['trained_parameters']:,}",
                str(_seeds(cells[variant.name])),
                *(_spread(cells[variant.name][task], "score", 3) for task in TASKS),
                _paired(cells[variant.name], default, "score"),
            ]
            for variant in shown
        ],
    )
    yield "Held-out loss in nats a token, and loss on book passages of which the training had nothing:"
    yield ""
    yield from _table(
        ["variant", *TASKS, "difference to NF4", "at step 0, meaning", "other text"],
        [
            [
                variant.name,
                *(_spread(cells[variant.name][task], "loss", 4) for task in TASKS),
                _paired(cells[variant.name], default, "loss"),
                _start(cells[variant.name]["meaning"]),
                _overall(cells[variant.name], "other_text_loss"),
            ]
            for variant in shown
        ],
    )
    missing = [variant for variant in variants if variant not in shown]
    if missing:
        yield "Not in the tables:"
        yield ""
    for variant in missing:
        found = [cell for name, cell in result["cells"].items() if name.startswith(f"{variant.name} | ")]
        reasons = [reason for cell in found if (reason := cell.get("left_out") or cell.get("failed"))]
        yield f"- {variant.name}: {reasons[0] if reasons else 'there was no time'}"


def _versions(origin: dict[str, Any]) -> str:
    return ", ".join(f"{name} {origin['versions'][name]}" for name in ("torch", "transformers", "peft"))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _added(found: dict[str, float]) -> str:
    return f"{found['mean']:+.4f} ± {found['standard_error']:.4f}"


def _spread(cells: Cells, name: str, digits: int) -> str:
    values = [cell[name] for cell in cells.values()]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _paired(tasks: dict[str, Cells], default: dict[str, Cells], name: str) -> str:
    """Mean of the differences to the same task and seed, its standard error, and how many pairs are on which side."""
    each = [
        cell[name] - default[task][seed][name]
        for task, cells in tasks.items()
        for seed, cell in cells.items()
        if seed in default[task]
    ]
    if not any(each):
        return ""
    error = f" ± {statistics.stdev(each) / len(each) ** 0.5:.3f}" if len(each) > 1 else ""
    better = sum((value > 0) == (name == "score") for value in each if value)
    return f"{statistics.fmean(each):+.3f}{error}, better in {better} of {len(each)}"


def _start(cells: Cells) -> str:
    values = [cell["loss_at_start"] for cell in cells.values() if cell["loss_at_start"] is not None]
    return f"{statistics.fmean(values):.3f}" if values else ""


def _overall(tasks: dict[str, Cells], name: str) -> str:
    return f"{statistics.fmean(cell[name] for cells in tasks.values() for cell in cells.values()):.2f}"


def _first(cells: Cells) -> dict[str, Any]:
    return next(iter(cells.values()))


def _seeds(tasks: dict[str, Cells]) -> int:
    return min(len(cells) for cells in tasks.values())
