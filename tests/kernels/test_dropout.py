"""Dropout by a counter: the same on every route, in parts as in the whole, and as likely as it should be."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.kernels import dropout as room
from expertune.kernels import native
from expertune.kernels.dropout import CounterDropout, dropout, in_library
from expertune.kernels.nf4 import Nf4Stack


def plain(x: Tensor, number: Tensor, seed: int, probability: float) -> Tensor:
    """Straight from the hash, in torch."""
    elements = number[:, None] * x.shape[1] + torch.arange(x.shape[1])
    kept = room._hash(elements, seed) >= round(probability * 2**32)
    return torch.where(kept, x / (1 - probability), 0.0)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**61 + 12345])
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_native_mask_is_the_one_of_plain_arithmetic(rows: int, seed: int) -> None:
    if not native.available():
        pytest.skip(native.status().reason)
    x, number = torch.randn(rows, 130), torch.randperm(rows) + 2**25
    torch.testing.assert_close(dropout(x, number, seed, 0.3), plain(x, number, seed, 0.3))


def test_rows_are_dropped_by_their_number_wherever_they_lie() -> None:
    x = torch.randn(9, 64)
    whole = dropout(x, torch.arange(9), 5, 0.4)
    order = torch.tensor([8, 0, 3])
    assert torch.equal(dropout(x, order, 5, 0.4, index=order), whole[order])
    columns = dropout(x[:, 16:40].contiguous(), torch.arange(9), 5, 0.4, first_column=16, columns=64)
    assert torch.equal(columns, whole[:, 16:40])


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.999])
def test_share_that_is_dropped_is_the_probability(probability: float) -> None:
    x = torch.ones(1000, 1000)
    out = dropout(x, torch.arange(1000), 11, probability)
    # Five standard deviations of a million coins.
    assert abs(float((out == 0).float().mean()) - probability) <= 5 * (probability * (1 - probability)) ** 0.5 / 1000
    assert float(out.max()) == pytest.approx(1 / (1 - probability), rel=1e-5)


def test_masks_of_neighboring_seeds_rows_and_columns_do_not_follow_each_other() -> None:
    x = torch.ones(400, 400)
    one, other = (dropout(x, torch.arange(400), seed, 0.5) != 0 for seed in (7, 8))
    for shifted in (other, one.roll(1, 0), one.roll(1, 1)):
        assert abs(float((one == shifted).float().mean()) - 0.5) < 5 * 0.5 / 400


def test_layer_draws_anew_each_time_and_the_same_in_a_recomputation() -> None:
    layer, x = CounterDropout(0.5), torch.randn(4, 5, 64, requires_grad=True)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.manual_seed(3)
    again = checkpoint(lambda x: layer(x).square().sum(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], expected)


def test_gradient_of_the_layer_goes_through_what_was_kept() -> None:
    x = torch.randn(6, 64, requires_grad=True)
    out = CounterDropout(0.25)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, (out.detach() != 0).float() / 0.75)


def test_layer_leaves_evaluation_alone() -> None:
    layer, x = CounterDropout(0.5).eval(), torch.randn(3, 64)
    assert torch.equal(layer(x), x)


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
@pytest.mark.parametrize("rank", [3, 8, 40])
def test_gemms_of_low_rank_factors_drop_what_is_dropped_of_whole_rows(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    tokens, width, offsets = 23, 391, torch.tensor([0, 7, 7, 23])
    x, h = (torch.randn(tokens, columns, generator=generator) for columns in (width, rank))
    number = torch.randperm(100, generator=generator)[:tokens]
    index = torch.randint(tokens, (tokens,), generator=generator)
    a = torch.randn(4, rank, width, generator=generator)
    dropped = dropout(x, number, 2**40 + 5, 0.3, index)
    inside = in_library(number, 2**40 + 5, 0.3, width)

    found, wanted = torch.empty(tokens, rank), torch.empty(tokens, rank)
    native.grouped_gemm(dropped, a, offsets, wanted, transposed=True)
    native.grouped_gemm(x, a, offsets, found, transposed=True, index=index, dropout=inside)
    assert torch.equal(found, wanted)

    gradient, of_dropped = torch.empty(4, rank, width), torch.empty(4, rank, width)
    native.outer(h, dropped, offsets, of_dropped)
    native.outer(h, x, offsets, gradient, index, dropout=inside)
    assert torch.equal(gradient, of_dropped)

    stack = Nf4Stack(4, 64, 448)
    for matrix in range(4):
        stack.write(matrix, torch.randn(64, 448, generator=generator))
    for dtype in (torch.float32, torch.bfloat16):
        y, added, low = torch.empty(tokens, 448), torch.empty(tokens, 448), torch.empty(tokens, width)
        update = native.Update(h, a, 31, 31 + width, dropout=inside)
        for out, updates in ((y, ()), (added, [update])):
            native.grouped_gemm(
                x[:, :64].contiguous(), stack.bytes, offsets, out, transposed=False, updates=updates, dtype=dtype
            )
        native.grouped_gemm(h, a, offsets, low, transposed=False)
        y[:, 31 : 31 + width] += dropout(low, number, 2**40 + 5, 0.3)
        torch.testing.assert_close(added, y, rtol=1e-5, atol=1e-5)
