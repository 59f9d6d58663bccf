"""What the data room hands to the trainer: tokenized examples, and the report that goes into the run record."""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        rejected: of a pair, the same prompt with the answer that this one is preferred to.
        label: whether the answer is a good one, where the data says so of each.
        columns: of a prompt alone, whose answers a reward judges: what else its row holds.
    """

    input_ids: list[int]
    labels: list[int]
    place: str
    prompt: str
    completion: str
    uncut_length: int
    rejected: "TokenizedExample | None" = None
    label: bool | None = None
    columns: Mapping[str, Any] | None = None

    @property
    def sides(self) -> tuple["TokenizedExample", ...]:
        """The sequences that it is: of a pair, the preferred one first."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in front of the first that takes a loss."""
        return next((at for at, label in enumerate(self.labels) if label != IGNORE_INDEX), len(self.labels))

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt."""
        return self.input_ids[: self.num_prompt_tokens]

    @property
    def completion_ids(self) -> list[int]:
        """Ids of what follows the prompt."""
        return self.input_ids[self.num_prompt_tokens :]


@dataclass(frozen=True)
class TokenizedExamples:
    """The examples of one source, in the source's order.

    Attributes:
        examples: the examples that passed the data check: a list, or `expertune.data.token_cache.MappedExamples`.
        report: source, format, template, sha256 of each file, counts and lengths, as plain JSON values.
    """

    examples: Sequence[TokenizedExample]
    report: dict[str, Any]

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return lengths_of(self.examples)

    @property
    def uncut_lengths(self) -> Sequence[int]:
        """Tokens of each example before `max_length` cut it."""
        kept = getattr(self.examples, "uncut_lengths", None)
        return [_uncut_length(example) for example in self.examples] if kept is None else kept

    @property
    def overlap_hashes(self) -> np.ndarray:
        """int64 [num_examples], equal where the same is evaluated and trained on; see `overlap_hash`."""
        kept = getattr(self.examples, "overlap_hashes", None)
        return np.array([overlap_hash(example) for example in self.examples]) if kept is None else kept

    @property
    def digest(self) -> str:
        """Hash of all ids and labels."""
        if (kept := getattr(self.examples, "digest", None)) is not None:
            return str(kept)
        counted = Tally()
        for example in self.examples:
            counted.add(example)
        return counted.digest


def lengths_of(examples: Sequence[TokenizedExample]) -> Sequence[int]:
    """Tokens of each example, of a pair's longer side; no example is built where they lie in a file."""
    kept = getattr(examples, "lengths", None)
    return [max(len(side.input_ids) for side in example.sides) for example in examples] if kept is None else kept


def hash_of(*ids: Sequence[int]) -> int:
    """A number of 64 bits, equal for equal lists of ids and hardly for others."""
    content = b"".join(array("q", [len(values), *values]).tobytes() for values in ids)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def overlap_hash(example: TokenizedExample) -> int:
    """`hash_of` the prompt where answers to it are compared, and of the whole example where it is imitated."""
    is_compared = example.rejected is not None or example.label is not None or example.columns is not None
    return hash_of(example.prompt_ids if is_compared else example.input_ids)


def _uncut_length(example: TokenizedExample) -> int:
    return max(side.uncut_length for side in example.sides)


class Tally:
    """Counts over examples, and a hash of them, taken while they come one by one.

    Attributes:
        uncut_lengths: tokens of each example before the cut (of a pair, of its longer side), 4 bytes each.
    """

    def __init__(self) -> None:
        self.uncut_lengths = array("i")
        self._num_tokens = self._num_label_tokens = 0
        self._sha256 = hashlib.sha256()

    def add(self, example: TokenizedExample) -> None:
        """Count one example."""
        self.uncut_lengths.append(_uncut_length(example))
        for side in example.sides:
            self._num_tokens += len(side.input_ids)
            self._num_label_tokens += len(side.labels) - side.labels.count(IGNORE_INDEX)
            for values in (side.input_ids, side.labels):
                self._sha256.update(array("q", [len(values), *values]).tobytes())
        if example.label is not None or example.columns is not None:
            self._sha256.update(json.dumps([example.label, example.columns], sort_keys=True).encode())

    @property
    def digest(self) -> str:
        """Hash of the ids and labels of all examples, in order, and of the labels and columns beside them."""
        return self._sha256.hexdigest()

    def report(self, max_length: int) -> dict[str, Any]:
        """Plain values for the run record; `max_length` is where examples were cut."""
        lengths = np.asarray(self.uncut_lengths)
        return {
            "num_rows": len(lengths),
            "num_truncated": int((lengths > max_length).sum()),
            "num_tokens": self._num_tokens,
            "num_label_tokens": self._num_label_tokens,
            "length": length_summary(lengths),
            "length_histogram": length_histogram(lengths),
        }


def length_histogram(lengths: Sequence[int] | np.ndarray, bins: int = 20) -> dict[str, Any]:
    """How many lengths lie in each of equally wide bins from 0 to the longest: their `width` in tokens and `counts`."""
    counts, edges = np.histogram(lengths, bins, range=(0, max(int(np.max(lengths)), 1)))
    return {"width": float(edges[1]), "counts": counts.tolist()}


def length_summary(lengths: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum of lengths in tokens (nearest rank, so each is a real example's)."""
    ordered = np.sort(lengths)
    last = len(ordered) - 1
    ranks = {"min": 0, "median": round(0.5 * last), "p95": round(0.95 * last), "max": last}
    return {name: int(ordered[rank]) for name, rank in ranks.items()}
