"""Batches of pairs and labeled answers in parts: no example is in two of them."""

import torch

from expertune.data.split import NUM_EXAMPLES, halve, split


def test_pairs_are_split_between_pairs_until_one_is_left() -> None:
    ids = torch.arange(6)[:, None].repeat(1, 4)  # of three pairs, the chosen ones first
    batch = {"input_ids": ids, "attention_mask": ids + 10, NUM_EXAMPLES: 3, "example_ids": [7, 8, 9]}
    parts = split(batch, 8)
    assert [part["input_ids"][:, 0].tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]]
    assert [part["attention_mask"][:, 0].tolist() for part in parts] == [[10, 13], [11, 14], [12, 15]]
    assert [(part[NUM_EXAMPLES], part["example_ids"]) for part in parts] == [(1, [7]), (1, [8]), (1, [9])]
    assert halve(parts[0]) == []
    assert len(split(batch, 1)) == 3


def test_labeled_answers_are_split_unless_a_term_is_of_all_of_them() -> None:
    ids = torch.arange(4)[:, None]
    batch = {
        "input_ids": ids,
        "label": torch.tensor([True, False, True, False]),
        NUM_EXAMPLES: 4,
        "example_ids": [*"abcd"],
    }
    first, second = halve(batch)
    assert first["label"].tolist() == second["label"].tolist() == [True, False]
    assert second["example_ids"] == ["c", "d"]
    assert halve(batch | {"KL_input_ids": ids}) == []
