"""Attention of one token to its cache, against plain arithmetic."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expertune.kernels import native
from expertune.kernels.few_tokens import answering, serves_attention
from expertune.kernels.native.attention import attend
from expertune.layers import varlen_attention as layer

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library could not be built here")

# Of the largest value, and once more of a result that is rounded to its dtype.
CLOSE, ROUNDED = 2**-20, {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def cached(dtype: torch.dtype, heads: tuple[int, int], tokens: int, sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Queries of one token, keys and values of three sequences, as views of what is wider in each dimension."""
    query = torch.randn(3, 1, heads[0] + 2, 2 * sizes[0]).to(dtype)[:, :, 1:-1, : sizes[0]].transpose(1, 2)
    key = torch.randn(3, heads[1] + 1, tokens + 5, sizes[0] + 3).to(dtype)[:, 1:, :tokens, : sizes[0]]
    value = torch.randn(3, tokens, heads[1], sizes[1]).to(dtype).transpose(1, 2)
    return query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query, key, value = (each.double() for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(
    ("heads", "tokens", "sizes"),
    [((4, 2), 1, (64, 64)), ((8, 1), 30, (128, 128)), ((3, 3), 71, (24, 40)), ((6, 2), 9, (5, 35))],
    ids=["one token", "one key head", "odd sizes", "tails"],
)
def test_one_token_attends_as_by_plain_arithmetic(
    dtype: torch.dtype, heads: tuple[int, int], tokens: int, sizes: tuple[int, int]
) -> None:
    query, key, value = cached(dtype, heads, tokens, sizes)
    found, expected = attend(query, key, value, 0.3), plain(query, key, value, 0.3)
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, (3, 1, heads[0], sizes[1]), True)
    off = (found.double() - expected).abs()
    assert (off < CLOSE * value.double().abs().max() + ROUNDED[dtype] * expected.abs()).all()


@pytest.mark.parametrize("heads", [(4, 4), (32, 8)])
def test_a_sequence_attends_alike_alone_and_among_others(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = cached(torch.float32, heads, 400, (64, 64))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = attend(query, key, value, 0.2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(attend(query, key, value, 0.2), together)
    assert all(torch.equal(attend(query[i, None], key[i, None], value[i, None], 0.2)[0], together[i]) for i in range(3))


def test_scores_that_are_large_or_not_finite_give_what_softmax_does() -> None:
    query, key, value = torch.full((1, 1, 1, 8), 100.0), torch.eye(8)[None, None] * 50, torch.eye(8)[None, None]
    for largest in (0, 3, 7):
        scores = key.clone()
        scores[..., largest, largest], scores[..., 5, 5] = 100.0, 99.99  # of which a product is 1 less
        torch.testing.assert_close(
            attend(query, scores, value, 1.0).double(), plain(query, scores, value, 1.0), rtol=0, atol=1e-3
        )
    query[0] = float("nan")
    assert attend(query, key, value, 1.0).isnan().all()


def test_a_model_attends_so_while_an_answer_is_written_and_else_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = cached(torch.bfloat16, (4, 2), 7, (16, 16))
    module = nn.Module()
    module.num_key_value_groups = 2
    calls: list[float] = []
    monkeypatch.setattr(layer, "attend", lambda *given: calls.append(given[3]) or attend(*given))
    with torch.no_grad():
        outside, _ = layer.varlen_attention(module, query, key, value, None, scaling=0.5)
        assert not calls
        assert not serves_attention(query, key, value)
        with answering():
            inside, _ = layer.varlen_attention(module, query, key, value, None, scaling=0.5)
            layer.varlen_attention(module, query, key, value, None)
            masked = torch.ones(3, 1, 1, 7, dtype=torch.bool)
            layer.varlen_attention(module, query, key, value, masked, scaling=0.5)
            assert not serves_attention(key[:, :, :2], key, value)
    assert calls == [0.5, 16**-0.5]
    assert torch.allclose(inside.float(), outside.float(), atol=0.02)
