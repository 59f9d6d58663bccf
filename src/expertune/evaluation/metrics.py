"""Task metrics: how right generated answers are, as plain functions of text that are registered by name.

A metric is one function with the decorator `metric`. Its name is then a value of `task.metric`; its figures go into the
record and can choose the best checkpoint; its label stands in the summary and in the figures. Nothing else is edited.

`slot-f1` reads meaning representations such as ViGGO's, `inform(name[FIFA 12], genres[sports, simulation])`. What is
counted are slots: one for the function's name, and one per attribute and value, where a list counts as its members.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# (reference, answer) -> the figure of one answer.
PerAnswer = Callable[[str, str], float]
# (references, answers) -> figures over all of them, by name.
Corpus = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Figure:
    """One number that a metric gives.

    Attributes:
        name: its key in a score, in the record and in `training.metric_for_best_model`.
        label: what it is called in the summary and in pictures.
        shown: stands there and in the score's line; all figures are in the record.
        higher_is_better: of two checkpoints, the one with the higher figure is better.
    """

    name: str
    label: str
    shown: bool = True
    higher_is_better: bool = True


@dataclass(frozen=True)
class Metric:
    """What a task's answers are measured with.

    Attributes:
        figures: the numbers that it gives, in order.
        compute: gives them for all answers.
        is_right: whether one answer is wholly right.
        problem: what is wrong with a text as a reference for this metric; None where nothing is.
        per_answer: the first of the figures for one answer by itself; None where it has no meaning.
    """

    figures: tuple[Figure, ...]
    compute: Corpus
    is_right: Callable[[str, str], bool]
    problem: Callable[[str], str | None]
    per_answer: PerAnswer | None = None

    def score(self, expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
        """Figures over all answers. Raises ValueError where the two are not equally many."""
        found = self.compute(expected, answered)
        return {figure.name: found[figure.name] for figure in self.figures}


METRICS: dict[str, Metric] = {}
"""Metrics by the names that `task.metric` knows; filled by `metric`."""

_SCORE_FACTS = ("metric", "rows", "seconds", "examples")


def metric(
    name: str, *, label: str, higher_is_better: bool = True, problem: Callable[[str], str | None] = lambda _: None
) -> Callable[[PerAnswer], PerAnswer]:
    """Register a function of one reference and one answer; its mean over all answers is the figure.

    The figure's key is the name with underscores. An answer is wholly right where the function gives 1, or 0 if lower
    values are better.

    Args:
        name: what `task.metric` calls it.
        label: what people read.
        higher_is_better: whether the better of two answers has the higher value.
        problem: see `Metric`.
    """
    figure = Figure(name.replace("-", "_"), label, higher_is_better=higher_is_better)
    best = 1.0 if higher_is_better else 0.0

    def register(function: PerAnswer) -> PerAnswer:
        def mean(expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
            values = [function(*pair) for pair in zip(expected, answered, strict=True)]
            return {figure.name: sum(values) / len(values) if values else 0.0}

        METRICS[name] = Metric((figure,), mean, lambda *pair: function(*pair) == best, problem, function)
        return function

    return register


def corpus_metric(
    name: str,
    *,
    figures: Sequence[Figure],
    is_right: Callable[[str, str], bool],
    problem: Callable[[str], str | None] = lambda _: None,
    per_answer: PerAnswer | None = None,
) -> Callable[[Corpus], Corpus]:
    """Register a function of all references and answers, whose figures are no means over answers; see `Metric`."""

    def register(function: Corpus) -> Corpus:
        METRICS[name] = Metric(tuple(figures), function, is_right, problem, per_answer)
        return function

    return register


def shown_figures(score: Mapping[str, Any]) -> list[Figure]:
    """Figures of a score that people are shown: by its metric, or all of them where that is not registered here."""
    if score.get("metric") in METRICS:
        return [figure for figure in METRICS[score["metric"]].figures if figure.shown and figure.name in score]
    return [Figure(name, name.replace("_", " ")) for name in score if name not in _SCORE_FACTS]


# ---- exact-match


@metric("exact-match", label="exact match")
def exact_match(expected: str, answered: str) -> float:
    """1 where the answer equals the reference, white space around either aside."""
    return float(expected.strip() == answered.strip())


# ---- slot-f1

FUNCTION_SLOT = "__function__"
"""The attribute under which a function's name counts as a slot."""

_FUNCTION = re.compile(r"\s*(\w+)\s*\(\s*")
_ATTRIBUTE = re.compile(r"(\w+)\s*\[([^\[\]]*)\]\s*")
_COMMA = re.compile(r",\s*")
_LIST_COMMA = re.compile(r",\s+")
_END = re.compile(r"\)\s*\Z")

Slot = tuple[str, str]


@dataclass(frozen=True)
class MeaningRepresentation:
    """The meaning of a text, as far as it can be parsed.

    Attributes:
        slots: (attribute, value) pairs, in lower case with white space folded; the function's name is one of them.
        complete: the whole text was read; False for an answer that was cut short or goes astray.
    """

    slots: frozenset[Slot]
    complete: bool


def parse_meaning(text: str) -> MeaningRepresentation:
    """Read `function(attribute[value, value], attribute[value])` from the left for as long as it goes.

    Never raises: what has been read up to the first mistake counts, and text without a function's name and its opening
    parenthesis has no slots. A value counts once its closing bracket is there; at a comma and a space it is a list,
    whose members are slots each (a date, `June 29, 2018`, so counts as two). `rating[]` is the slot (rating, "").
    """
    function = _FUNCTION.match(text)
    if function is None:
        return MeaningRepresentation(frozenset(), complete=False)
    slots = {(FUNCTION_SLOT, _fold(function[1]))}
    position = function.end()
    while attribute := _ATTRIBUTE.match(text, position):
        slots |= {(_fold(attribute[1]), _fold(value)) for value in _LIST_COMMA.split(attribute[2])}
        position = attribute.end()
        comma = _COMMA.match(text, position)
        if comma is None:
            break
        position = comma.end()
    # A comma promises another attribute, so `f(a[b], )` is not complete although the parenthesis is there.
    dangling = text[:position].rstrip().endswith(",")
    return MeaningRepresentation(frozenset(slots), complete=not dangling and _END.match(text, position) is not None)


def _meaning_problem(expected: str) -> str | None:
    if parse_meaning(expected).complete:
        return None
    return "is no meaning representation such as inform(name[FIFA 12]); set task.metric to exact-match"


def _is_right_meaning(expected: str, answered: str) -> bool:
    """The answer can be read to its end and holds the reference's slots, in any order, and no others."""
    answer = parse_meaning(answered)
    return answer.complete and answer.slots == parse_meaning(expected).slots


@corpus_metric(
    "slot-f1",
    figures=(
        Figure("slot_f1", "slot F1"),
        Figure("precision", "precision", shown=False),
        Figure("recall", "recall", shown=False),
        Figure("exact_match", "exact match"),
    ),
    is_right=_is_right_meaning,
    problem=_meaning_problem,
    per_answer=lambda expected, answered: slot_f1([expected], [answered])["slot_f1"],
)
def slot_f1(expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
    """F1, precision and recall of slots counted over all answers together (micro-average), and the share of right ones.

    Where there is nothing to divide by, a figure is 0.
    """
    right = num_expected = num_answered = num_exact = 0
    for reference, answer in zip(expected, answered, strict=True):
        reference_slots, answer_slots = parse_meaning(reference).slots, parse_meaning(answer).slots
        right += len(reference_slots & answer_slots)
        num_expected += len(reference_slots)
        num_answered += len(answer_slots)
        num_exact += _is_right_meaning(reference, answer)
    return {
        "slot_f1": _ratio(2 * right, num_expected + num_answered),
        "precision": _ratio(right, num_answered),
        "recall": _ratio(right, num_expected),
        "exact_match": _ratio(num_exact, len(expected)),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()
