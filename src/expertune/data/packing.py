"""The trainer's dataset, and packing: whole examples put together into sequences of at most `max_length` tokens."""

from collections.abc import Sequence

from expertune.config import DataConfig
from expertune.data.examples import IGNORE_INDEX, TokenizedExample, TokenizedExamples
from expertune.errors import DataError


def make_dataset(tokenized: TokenizedExamples, data: DataConfig) -> list[dict[str, list[int]]]:
    """Examples as transformers' Trainer takes them.

    Args:
        tokenized: what `prepare_examples` returned.
        data: the run's data section; `packing: packed` packs the examples first.

    Returns:
        A list of `{"input_ids", "labels", "example_ids"}`, with `position_ids` where packed. `example_ids` are indices
        into `tokenized.examples`.
    """
    if data.packing == "packed":
        return pack_examples(tokenized.examples, data.max_length)
    return [
        {"input_ids": example.input_ids, "labels": example.labels, "example_ids": [index]}
        for index, example in enumerate(tokenized.examples)
    ]


def pack_examples(examples: Sequence[TokenizedExample], max_length: int) -> list[dict[str, list[int]]]:
    """Pack examples by first-fit decreasing (Johnson 1973): the longest first, each into the first pack with room.

    No example is split, and the result depends on nothing but the examples. Inside a pack, and among packs by their
    first member, the source's order is kept.

    Args:
        examples: examples of at most `max_length` tokens.
        max_length: most tokens of a pack.

    Returns:
        A list of `{"input_ids", "labels", "position_ids", "example_ids"}`; positions restart, and the first label is
        -100, at each member.

    Raises:
        DataError: an example is longer than `max_length`.
    """
    by_length = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    packs: list[list[int]] = []
    room = _FirstWithRoom(len(examples), max_length)
    for index in by_length:
        length = len(examples[index].input_ids)
        if length > max_length:
            raise DataError(f"{examples[index].place}: {length} tokens, more than the {max_length} of a pack")
        pack = room.take(length)
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
    return [_concatenate(examples, pack) for pack in sorted(sorted(pack) for pack in packs)]


def _concatenate(examples: Sequence[TokenizedExample], members: Sequence[int]) -> dict[str, list[int]]:
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "example_ids": list(members)}
    for index in members:
        example = examples[index]
        packed["input_ids"] += example.input_ids
        packed["labels"] += [IGNORE_INDEX, *example.labels[1:]]
        packed["position_ids"] += range(len(example.input_ids))
    return packed


class _FirstWithRoom:
    """A segment tree over packs that holds the most room below each node, so that first-fit takes log(n) steps."""

    def __init__(self, num_packs: int, room: int) -> None:
        self._num_leaves = 1 << max(num_packs - 1, 0).bit_length()
        self._most = [room] * (2 * self._num_leaves)

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
