"""The dataset for the trainer, and packing: whole rows put together into rows of at most `max_length` tokens."""

from collections.abc import Sequence

from expertune.config import DataConfig
from expertune.data.rows import IGNORE_INDEX, TokenizedRow, TokenizedRows
from expertune.errors import DataError


def make_dataset(tokenized: TokenizedRows, data: DataConfig) -> list[dict[str, list[int]]]:
    """Rows as transformers' Trainer takes them.

    Args:
        tokenized: what `prepare_rows` returned.
        data: the run's data section; `packing: packed` packs the rows first.

    Returns:
        A list of `{"input_ids", "labels", "row_ids"}`, with `position_ids` where packed. `row_ids` are indices into
        `tokenized.rows`.
    """
    if data.packing == "packed":
        return pack_rows(tokenized.rows, data.max_length)
    return [
        {"input_ids": row.input_ids, "labels": row.labels, "row_ids": [index]}
        for index, row in enumerate(tokenized.rows)
    ]


def pack_rows(rows: Sequence[TokenizedRow], max_length: int) -> list[dict[str, list[int]]]:
    """Pack rows by first-fit decreasing (Johnson 1973): the longest first, each into the first pack with room.

    No row is split, and the result depends on nothing but the rows. Inside a pack, and among packs by their first
    member, the source's order is kept.

    Args:
        rows: rows of at most `max_length` tokens.
        max_length: most tokens of a pack.

    Returns:
        A list of `{"input_ids", "labels", "position_ids", "row_ids"}`; positions restart, and the first label is -100,
        at each member.

    Raises:
        DataError: a row is longer than `max_length`.
    """
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    packs: list[list[int]] = []
    room = _FirstWithRoom(len(rows), max_length)
    for index in by_length:
        length = len(rows[index].input_ids)
        if length > max_length:
            raise DataError(f"{rows[index].place}: {length} tokens, more than the {max_length} of a pack")
        pack = room.take(length)
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
    return [_concatenate(rows, pack) for pack in sorted(sorted(pack) for pack in packs)]


def _concatenate(rows: Sequence[TokenizedRow], members: Sequence[int]) -> dict[str, list[int]]:
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "row_ids": list(members)}
    for index in members:
        row = rows[index]
        packed["input_ids"] += row.input_ids
        packed["labels"] += [IGNORE_INDEX, *row.labels[1:]]
        packed["position_ids"] += range(len(row.input_ids))
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
