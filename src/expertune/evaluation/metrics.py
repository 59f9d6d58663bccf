"""Task metrics: how right generated answers are, as plain functions of text.

`slot-f1` reads meaning representations such as ViGGO's, `inform(name[FIFA 12], genres[sports, simulation])`. What is
counted are slots: one for the function's name, and one per attribute and value, where a list counts as its members.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """What a text says, as far as it can be read.

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


class Metric(Protocol):
    """What a task's answers are measured with."""

    def accepts(self, expected: str) -> bool:
        """Whether `expected` can be a reference for this metric."""

    def is_right(self, expected: str, answered: str) -> bool:
        """Whether one answer is wholly right."""

    def score(self, expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
        """Figures over all rows, each in [0, 1]. Raises ValueError where the two are not equally many."""


class ExactMatch:
    """`exact-match`: an answer is right where it equals the reference, white space around either aside."""

    def accepts(self, expected: str) -> bool:
        """Any text can be a reference."""
        return True

    def is_right(self, expected: str, answered: str) -> bool:
        """Equal once stripped."""
        return expected.strip() == answered.strip()

    def score(self, expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
        """`exact_match`: the share of right answers."""
        return {"exact_match": _share_right(self, expected, answered)}


class SlotF1:
    """`slot-f1`: F1 over slots, micro-averaged, that is with slots counted over all rows together."""

    def accepts(self, expected: str) -> bool:
        """A reference must read as a meaning representation to its end."""
        return parse_meaning(expected).complete

    def is_right(self, expected: str, answered: str) -> bool:
        """The answer can be read to its end and holds the reference's slots, in any order, and no others."""
        answer = parse_meaning(answered)
        return answer.complete and answer.slots == parse_meaning(expected).slots

    def score(self, expected: Sequence[str], answered: Sequence[str]) -> dict[str, float]:
        """`slot_f1`, `precision`, `recall` (0.0 where there is nothing to divide by) and `exact_match`."""
        right = num_expected = num_answered = 0
        for reference, answer in zip(expected, answered, strict=True):
            reference_slots, answer_slots = parse_meaning(reference).slots, parse_meaning(answer).slots
            right += len(reference_slots & answer_slots)
            num_expected += len(reference_slots)
            num_answered += len(answer_slots)
        return {
            "slot_f1": _ratio(2 * right, num_expected + num_answered),
            "precision": _ratio(right, num_answered),
            "recall": _ratio(right, num_expected),
            "exact_match": _share_right(self, expected, answered),
        }


METRICS: Mapping[str, Metric] = {"slot-f1": SlotF1(), "exact-match": ExactMatch()}
"""Metrics by the names that `task.metric` knows."""


def _share_right(metric: Metric, expected: Sequence[str], answered: Sequence[str]) -> float:
    pairs = list(zip(expected, answered, strict=True))
    return _ratio(sum(metric.is_right(*pair) for pair in pairs), len(pairs))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()
