"""Bytes that ranks send, against figures counted by hand."""

import itertools

import pytest

from expertune.distributed.shares import owned_experts
from expertune.planning.communication import (
    RoutedLayer,
    averaged_bytes,
    bytes_per_copy,
    copies_per_token,
    gathered_bytes,
    token_bytes,
)

# Mixtral-8x7B: 8 experts, 2 to a token, hidden states of 4096 numbers in bfloat16.
MIXTRAL = RoutedLayer(num_experts=8, top_k=2, hidden_size=4096, itemsize=2)


def test_averaged_gradients_travel_nearly_twice():
    assert averaged_bytes(1000, ranks=4) == 1500
    assert averaged_bytes(1000, ranks=1) == 0


@pytest.mark.parametrize(("num_experts", "top_k", "ranks"), [(8, 2, 4), (6, 3, 4), (7, 4, 2), (4, 4, 4), (5, 2, 1)])
def test_expected_copies_are_the_mean_over_all_choices_of_experts(num_experts, top_k, ranks):
    owner = {expert: rank for rank in range(ranks) for expert in owned_experts(num_experts, ranks, rank)}
    counts = [len({owner[e] for e in chosen}) for chosen in itertools.combinations(range(num_experts), top_k)]
    assert copies_per_token(num_experts, top_k, ranks) == pytest.approx(sum(counts) / len(counts))


def test_a_copy_is_sent_four_times_and_once_more_with_checkpointing():
    # Hidden states of 8192 bytes, router's weights of 8, two numbers of 8 bytes.
    assert bytes_per_copy(MIXTRAL, recomputes=False) == 4 * 8192 + 2 * 8 + 16
    assert bytes_per_copy(MIXTRAL, recomputes=True) == 5 * 8192 + 3 * 8 + 16


def test_tokens_of_mixtral_on_four_ranks():
    # Of 28 pairs of experts 4 lie on one rank and 24 on two: 52 / 28 ranks, of which 3/4 are others.
    assert token_bytes(MIXTRAL, 1000, 4, True) == round(1000 * 0.75 * 52 / 28 * 41_000) + 3 * 8
    assert token_bytes(MIXTRAL, 1000, 1, True) == 0


def test_shards_are_gathered_twice_except_at_the_turnarounds():
    # Layers of 100, 200 and 300 bytes: 200 and 300 in forward, 200 and 100 in backward, 3/4 of it from others.
    assert gathered_bytes([100, 200, 300], ranks=4) == 600
