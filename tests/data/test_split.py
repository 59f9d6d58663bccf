"""Parts of a micro-batch are what the collator makes of fewer sequences."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.data.collate import LeftPaddingCollator, PaddingFreeCollator
from expertune.data.split import halve, size, split


def rows(*lengths: int) -> list[dict[str, Any]]:
    start = 0
    made = []
    for example_id, length in enumerate(lengths):
        ids = list(range(start, start + length))
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "example_ids": [example_id]})
        start += length
    return made


def pack(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": [token for row in members for token in row["input_ids"]],
        "labels": [label for row in members for label in row["labels"]],
        "position_ids": [position for row in members for position in range(len(row["input_ids"]))],
        "example_ids": [example_id for row in members for example_id in row["example_ids"]],
    }


def assert_same_batch(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
            assert ours[name].is_contiguous()
        else:
            assert ours[name] == value, name


COLLATORS = {
    "padding-free": PaddingFreeCollator(keep_example_ids=True),
    "padded": LeftPaddingCollator(8, pad_token_id=0, keep_example_ids=True),
}


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS)
def test_halve_gives_what_is_collated_of_each_half(collate: Any) -> None:
    made = rows(4, 5, 6, 5)
    halves = halve(collate(made))
    assert len(halves) == 2
    assert_same_batch(halves[0], collate(made[:2]))
    assert_same_batch(halves[1], collate(made[2:]))


def test_halve_splits_packs_between_sequences_also_inside_a_pack() -> None:
    made = rows(2, 3, 9, 3)
    collate = COLLATORS["padding-free"]
    halves = halve(collate([pack(made[:2]), pack(made[2:])]))
    assert_same_batch(halves[0], collate([pack(made[:2])]))
    assert_same_batch(halves[1], collate([pack(made[2:])]))
    quarters = halve(halves[1])
    assert_same_batch(quarters[0], collate([made[2]]))
    assert_same_batch(quarters[1], collate([made[3]]))


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS)
def test_halve_of_a_single_sequence_is_empty(collate: Any) -> None:
    assert halve(collate(rows(7))) == []


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS)
def test_halve_of_three_sequences_of_one_length_is_two_and_one(collate: Any) -> None:
    made = rows(4, 4, 4)
    halves = halve(collate(made))
    assert_same_batch(halves[0], collate(made[:2]))
    assert_same_batch(halves[1], collate(made[2:]))


def test_split_keeps_every_sequence_in_order_and_each_part_within_the_limit() -> None:
    made = rows(3, 8, 1, 4, 5, 2, 2)
    parts = split(COLLATORS["padding-free"](made), 6)
    assert [example_id for part in parts for example_id in part["example_ids"]] == list(range(7))
    assert all(size(part) <= 6 or len(part["example_ids"]) == 1 for part in parts)
    assert torch.cat([part["labels"] for part in parts], dim=1).tolist() == [
        [label for row in made for label in row["labels"]]
    ]


def test_split_leaves_a_batch_within_the_limit_as_it_is() -> None:
    batch = COLLATORS["padding-free"](rows(3, 3))
    assert split(batch, 6) == [batch]
    assert split(batch, 6)[0] is batch
    assert split(batch, None)[0] is batch
    single = COLLATORS["padding-free"](rows(9))
    assert split(single, 6)[0] is single
