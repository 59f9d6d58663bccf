"""Answered examples of a run: the reference, the base model's answer and the tuned one's, with what differs."""

from collections.abc import Iterator, Mapping
from typing import Any

from expertune.evaluation.metrics import METRICS
from expertune.report.differences import Piece, differences
from expertune.report.values import Record, count, entries, figure, number, section
from expertune.text import shortened

_MOST_CHARS = 4000
_MOST_CHARS_OF_ALL = 1_000_000
_CHARS_OF_A_MARK = 13

_KINDS = {
    "better": "got better",
    "worse": "got worse",
    "same": "unchanged",
    "right": "right",
    "wrong": "wrong",
}


def answers(record: Record) -> dict[str, Any]:
    """The examples of a run's scores, as many as keep the page small.

    Returns:
        `shown`, the examples; `here`, how many these are in words; `kinds`, (name, words, how many) of what they can be
        filtered by; `total`, how many were answered; `label` of the figure that each answer has, or nothing.
    """
    before, after = section(record, "task", "before"), section(record, "task", "after")
    shown, num_chars = [], 0
    for example in _examples(before, after):
        num_chars += example["chars"]
        if num_chars > _MOST_CHARS_OF_ALL:
            break
        shown.append(example)
    kinds = [(kind, words, sum(kind in example["kinds"] for example in shown)) for kind, words in _KINDS.items()]
    total = number(after or before, "rows") or len(shown)
    return {
        "shown": shown,
        "here": "all" if total == len(shown) else f"the first {count(len(shown))}",
        "kinds": [each for each in kinds if each[2]],
        "total": count(total),
        "label": next((each.label for each in _figures(after or before)), ""),
    }


def _figures(score: Mapping[str, Any]) -> tuple[Any, ...]:
    metric = METRICS.get(str(score.get("metric")))
    return metric.figures if metric else ()


def _examples(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    base, tuned = (
        [each for each in entries(score, "examples") if isinstance(each, Mapping)] for score in (before, after)
    )
    of_base = {_key(each): each for each in base}
    higher_is_better = all(each.higher_is_better for each in _figures(after)[:1])
    for each in tuned or base:
        earlier = of_base.get(_key(each))
        answered = [("base model", earlier)] if earlier else []
        answered += [("tuned", each)] if tuned else []
        expected, columns = shortened(str(each.get("expected", "")), _MOST_CHARS), list[dict[str, Any]]()
        reference: list[Piece] = []
        for name, example in answered:
            reference, pieces = differences(expected, shortened(str(example.get("answered", "")), _MOST_CHARS))
            right = bool(example.get("right"))
            columns.append({"name": name, "pieces": pieces, "right": right, "figure": _figure(example)})
        kinds = ["right" if each.get("right") else "wrong"]
        if earlier and tuned:
            kinds.append(_change(earlier, each, higher_is_better))
        prompt = shortened(str(each.get("prompt", "")).strip(), _MOST_CHARS)
        every = [*reference, *(piece for column in columns for piece in column["pieces"])]
        chars = len(prompt) + sum(len(text) + _CHARS_OF_A_MARK for text, _ in every)
        yield {"prompt": prompt, "expected": reference, "columns": columns, "kinds": kinds, "chars": chars}


def _key(example: Mapping[str, Any]) -> tuple[str, str]:
    return str(example.get("prompt")), str(example.get("expected"))


def _figure(example: Mapping[str, Any]) -> str:
    return figure(example["figure"]) if "figure" in example else ""


def _change(before: Mapping[str, Any], after: Mapping[str, Any], higher_is_better: bool) -> str:
    """What became of an answer, by its figure where both have one, else by whether it is right."""
    old, new = number(before, "figure"), number(after, "figure")
    if old is None or new is None:
        old, new, higher_is_better = bool(before.get("right")), bool(after.get("right")), True
    if old == new:
        return "same"
    return "better" if (new > old) == higher_is_better else "worse"
