"""Where two texts differ, word by word."""

import re
from difflib import SequenceMatcher
from functools import lru_cache

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")

# Comparing takes time by the square of the words; what follows these is shown without marks.
_COMPARED = 200

Piece = tuple[str, bool]


@lru_cache(maxsize=1024)  # a page is written at each evaluation, with the same answers of the base model
def differences(expected: str, answered: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, each with whether the other text lacks it there."""
    left, left_rest = _words(expected)
    right, right_rest = _words(answered)
    ours: list[Piece] = []
    theirs: list[Piece] = []
    for kind, start, end, other_start, other_end in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        differs = kind != "equal"
        ours += [("".join(left[start:end]), differs)] if end > start else []
        theirs += [("".join(right[other_start:other_end]), differs)] if other_end > other_start else []
    if left_rest or right_rest:
        ours += [(left_rest, False)] if left_rest else []
        theirs += [(right_rest, False)] if right_rest else []
    return ours, theirs


def _words(text: str) -> tuple[list[str], str]:
    words = _WORDS.findall(text)
    return words[:_COMPARED], "".join(words[_COMPARED:])
