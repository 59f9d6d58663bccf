import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertune.config import DataConfig
from expertune.data import IGNORE_INDEX, TokenizedExample, TokenizedExamples, make_dataset, pack_examples
from expertune.errors import DataError


def example(length, first=100):
    ids = list(range(first, first + length))
    return TokenizedExample(ids, list(ids), f"rows.jsonl: row {first}", "", "", length)


def rows_of(lengths):
    return [example(length, 1000 * index) for index, length in enumerate(lengths)]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 32), max_size=60), max_length=st.integers(32, 64))
def test_every_example_is_packed_once_and_whole(lengths, max_length):
    examples = rows_of(lengths)
    packs = pack_examples(examples, max_length)
    assert sorted(example_id for pack in packs for example_id in pack["example_ids"]) == list(range(len(examples)))
    for pack in packs:
        members = [examples[example_id] for example_id in pack["example_ids"]]
        assert len(pack["input_ids"]) <= max_length
        assert pack["input_ids"] == [token for member in members for token in member.input_ids]
        assert pack["position_ids"] == [position for member in members for position in range(len(member.input_ids))]
        assert pack["labels"] == [label for member in members for label in (IGNORE_INDEX, *member.labels[1:])]


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40))
def test_packs_are_those_of_first_fit_decreasing(lengths):
    room, expected = [], []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        pack = next((number for number, free in enumerate(room) if free >= lengths[index]), len(room))
        if pack == len(room):
            room.append(32)
            expected.append([])
        room[pack] -= lengths[index]
        expected[pack].append(index)
    found = [pack["example_ids"] for pack in pack_examples(rows_of(lengths), 32)]
    assert found == sorted(sorted(pack) for pack in expected)


def test_packs_keep_the_order_of_the_source():
    packs = pack_examples(rows_of([3, 9, 4, 6]), 10)
    assert [pack["example_ids"] for pack in packs] == [[0], [1], [2, 3]]


def test_example_longer_than_a_pack_is_an_error():
    with pytest.raises(DataError, match=r"rows\.jsonl: row 100: 11 tokens, more than the 10 of a pack"):
        pack_examples([example(11)], 10)


def test_no_examples_make_no_packs():
    assert list(pack_examples([], 10)) == []


@pytest.mark.parametrize("packing", ["padding-free", "padded"])
def test_dataset_without_packing_has_an_example_for_each_example(packing):
    tokenized = TokenizedExamples(rows_of([2, 3]), {})
    dataset = make_dataset(tokenized, DataConfig(train="rows.jsonl", packing=packing))
    assert dataset[1] == {"input_ids": [1000, 1001, 1002], "labels": [1000, 1001, 1002], "example_ids": [1]}
    assert len(dataset) == 2


def test_dataset_with_packing_has_packs():
    tokenized = TokenizedExamples(rows_of([2, 3]), {})
    (pack,) = make_dataset(tokenized, DataConfig(train="rows.jsonl", packing="packed", max_length=8))
    assert pack["example_ids"] == [0, 1]
    assert pack["position_ids"] == [0, 1, 0, 1, 2]
