"""The trainer's dataset, and packing: whole examples put together into sequences of at most `max_length` tokens."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from expertune.config import DataConfig
from expertune.data.examples import IGNORE_INDEX, TokenizedExample, TokenizedExamples, lengths_of
from expertune.errors import DataError

_FARTHEST = 100  # examples that are looked at for one with another prompt


class Dataset(Sequence[dict[str, Any]]):
    """Sequences for transformers' Trainer, each made when it is asked for. An index gives one, a slice a list.

    Args:
        examples: the examples, in memory or in a file.
    """

    def __init__(self, examples: Sequence[TokenizedExample]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._sequence(each) for each in range(*index.indices(len(self)))]
        return self._sequence(range(len(self))[index])

    def _sequence(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {"input_ids": example.input_ids, "labels": example.labels, "example_ids": [index]}


class PairDataset(Dataset):
    """Pairs of answers, as trainers of preferences take them."""

    def _sequence(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        assert example.rejected is not None
        return {
            "prompt_ids": example.prompt_ids,
            "chosen_ids": example.completion_ids,
            "rejected_ids": example.rejected.completion_ids,
            "example_ids": [index],
        }


class LabeledDataset(Dataset):
    """Answers, each with whether it is a good one, and with the answer to another prompt for KTO's KL term.

    Whichever batch an example comes into, that one is the same.
    """

    def _sequence(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {
            "prompt_ids": example.prompt_ids,
            "completion_ids": example.completion_ids,
            "KL_completion_ids": self._exchanged(index, example).completion_ids,
            "label": example.label,
            "example_ids": [index],
        }

    def _exchanged(self, index: int, example: TokenizedExample) -> TokenizedExample:
        """The nearest example before, in a circle, with another prompt; the one right before is looked at last.

        So a chosen answer goes with a chosen one where both answers of a pair stand next to each other.
        """
        before = [(index - distance) % len(self) for distance in range(2, min(len(self) + 2, _FARTHEST))]
        others = (self._examples[each] for each in before)
        return next((each for each in others if each.prompt_ids != example.prompt_ids), self._examples[before[-1]])


class PromptDataset(Dataset):
    """Prompts whose answers are to be written, with the columns that rewards are told."""

    def _sequence(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        own = {"prompt": str(example.prompt), "prompt_ids": example.input_ids, "example_ids": [index]}
        return {**(example.columns or {}), **own}


_KINDS: dict[str, type[Dataset]] = {"pairs": PairDataset, "labels": LabeledDataset, "prompts": PromptDataset}


class PackedDataset(Dataset):
    """Packs of examples.

    Args:
        examples: the examples.
        pack_of: int [num_examples], the pack that each example is in, counted from 0 without a gap.
    """

    def __init__(self, examples: Sequence[TokenizedExample], pack_of: np.ndarray) -> None:
        super().__init__(examples)
        self._members = np.argsort(pack_of, kind="stable").astype(np.int32)
        self._bounds = np.concatenate([[0], np.bincount(pack_of).cumsum()]).astype(np.int32)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def _sequence(self, index: int) -> dict[str, Any]:
        members: list[int] = self._members[self._bounds[index] : self._bounds[index + 1]].tolist()
        packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "example_ids": members}
        for each in members:
            example = self._examples[each]
            packed["input_ids"] += example.input_ids
            packed["labels"] += [IGNORE_INDEX, *example.labels[1:]]
            packed["position_ids"] += range(len(example.input_ids))
        return packed


def sequences_of(examples: Sequence[TokenizedExample]) -> Iterator[dict[str, Any]]:
    """Answers that are compared, or prompts alone, as sequences of supervised fine-tuning; both sides of a pair."""
    for index in range(len(examples)):
        example = examples[index]
        for side in example.sides:
            labels = side.labels if example.columns is None else side.input_ids
            yield {"input_ids": side.input_ids, "labels": labels, "example_ids": [index]}


def make_dataset(tokenized: TokenizedExamples, data: DataConfig) -> Dataset:
    """Examples as transformers' Trainer takes them.

    Args:
        tokenized: what `prepare_examples` returned.
        data: the run's data section; `packing: packed` packs the examples first.

    Returns:
        A sequence of `{"input_ids", "labels", "example_ids"}`, with `position_ids` where packed. `example_ids` are
        indices into `tokenized.examples`. Of a preference objective: `{"prompt_ids", "chosen_ids", "rejected_ids"}`,
        `{"prompt_ids", "completion_ids", "KL_completion_ids", "label"}` or `{"prompt", "prompt_ids", ...}` with the
        columns of a prompt's row, each with `example_ids`.
    """
    if kind := tokenized.report.get("kind"):
        return _KINDS[kind](tokenized.examples)
    if data.packing == "packed":
        return pack_examples(tokenized.examples, data.max_length)
    return Dataset(tokenized.examples)


def pack_examples(examples: Sequence[TokenizedExample], max_length: int) -> PackedDataset:
    """Pack examples by first-fit decreasing (Johnson 1973): the longest first, each into the first pack with room.

    No example is split, and the result depends on nothing but the examples. Inside a pack, and among packs by their
    first member, the source's order is kept.

    Args:
        examples: examples of at most `max_length` tokens.
        max_length: most tokens of a pack.

    Returns:
        A sequence of `{"input_ids", "labels", "position_ids", "example_ids"}`; positions restart, and the first label
        is -100, at each member.

    Raises:
        DataError: an example is longer than `max_length`.
    """
    lengths = np.asarray(lengths_of(examples), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    if len(lengths) and lengths[longest := int(by_length[0])] > max_length:
        raise DataError(f"{examples[longest].place}: {lengths[longest]} tokens, more than the {max_length} of a pack")
    room = _FirstWithRoom(len(lengths), max_length)
    taken = np.empty(len(lengths), dtype=np.int64)
    for index in by_length:
        taken[index] = room.take(int(lengths[index]))
    # Numbered by their first members.
    _, firsts, packs = np.unique(taken, return_index=True, return_inverse=True)
    return PackedDataset(examples, np.argsort(np.argsort(firsts))[packs])


class _FirstWithRoom:
    """A segment tree over packs that holds the most room below each node, so that first-fit takes log(n) steps."""

    def __init__(self, num_packs: int, room: int) -> None:
        self._num_leaves = 1 << max(num_packs - 1, 0).bit_length()
        self._most = array("q", [room]) * (2 * self._num_leaves)

    def take(self, length: int) -> int:
        """Take `length` tokens of room from the first pack that has them, and return its index."""
        node = 1
        while node < self._num_leaves:
            node = 2 * node if self._most[2 * node] >= length else 2 * node + 1
        pack = node - self._num_leaves
        self._most[node] -= length
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return pack
