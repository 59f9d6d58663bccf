"""Tokens of each expert over a whole training."""

import random
from itertools import pairwise
from typing import Any

import pytest

from expertune.train.expert_load import add_tokens


@pytest.mark.parametrize(("num_layers", "num_experts", "most"), [(2, 8, 64), (60, 256, 8)])
def test_series_of_tokens_by_expert_stays_small_and_loses_no_token(
    num_layers: int, num_experts: int, most: int
) -> None:
    chance, series, total = random.Random(0), dict[str, Any](), [0] * num_experts
    for step in range(1, 151):
        counts = [chance.randrange(100) for _ in range(num_experts)]
        total = [sum(pair) for pair in zip(total, counts, strict=True)]
        add_tokens(series, step, {f"layers.{layer}": counts for layer in range(num_layers)})
        assert len(series["steps"]) <= most
    steps = series["steps"]
    assert [steps[0][0], steps[-1][1]] == [1, 150]
    assert all(left[1] + 1 == right[0] for left, right in pairwise(steps))
    assert {last - first + 1 for first, last in steps[:-1]} == {series["every"]}
    for of_layer in series["counts"].values():
        assert [sum(of_expert) for of_expert in zip(*of_layer, strict=True)] == total


def test_step_without_counted_layers_adds_nothing() -> None:
    series: dict[str, Any] = {}
    add_tokens(series, 1, {})
    assert series == {}
