"""What the data room hands to the trainer: tokenized examples, and the report that goes into the run record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORE_INDEX = -100
"""Label of a token that takes no loss (the `ignore_index` of torch's cross entropy)."""


@dataclass(frozen=True)
class TokenizedExample:
    """One example, ready for training.

    Attributes:
        input_ids: token ids, at most `data.max_length` of them.
        labels: as long as `input_ids`; each is the token's own id, or -100 where it takes no loss.
        place: where the example came from, e.g. `dolly.jsonl: row 12`.
        prompt: the text in front of the (last) answer; `encode_prompt(prompt)` is a prefix of `input_ids`.
        completion: the text that the model should write after `prompt`, without the EOS text.
        uncut_length: tokens of the example before `max_length` cut it.
    """

    input_ids: list[int]
    labels: list[int]
    place: str
    prompt: str
    completion: str
    uncut_length: int


@dataclass(frozen=True)
class TokenizedExamples:
    """The examples of one source, in the source's order.

    Attributes:
        examples: the examples that passed the data check.
        report: source, format, template, sha256 of each file, counts and lengths, as plain JSON values.
    """

    examples: list[TokenizedExample]
    report: dict[str, Any]


def length_summary(lengths: Sequence[int]) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum of lengths in tokens (nearest rank, so each is a real example's)."""
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "median": ordered[round(0.5 * last)],
        "p95": ordered[round(0.95 * last)],
        "max": ordered[last],
    }
