"""Grouped GEMMs in integers of 16 bits, for 16-bit tokens on CPUs with AVX2 alone, against their roundings in torch."""

import pytest
import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack, dequantize
from expertune.kernels.nf4.reference import codebook, dequantize_absmax
from tests.kernels.stacks import random_stack

# Tokens of each expert: none, one, parts of panels, and more than one item's.
TOKENS = [0, 1, 17, 0, 33, 730]
KINDS = ["double", "plain", "mxfp4"]
MOST_WEIGHT, MOST_SUM, ONE = 8192, 2**18 - 1, 32768

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library could not be built here")


@pytest.fixture(autouse=True)
def without_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 and nothing that multiplies bfloat16."""
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)


def weights(rows: int, columns: int, parts: int = 1, kind: str = "double") -> Nf4Bytes:
    """`parts` random matrices of each expert, whose rows are of different sizes."""
    return random_stack(parts * len(TOKENS), rows, columns, kind, rows_differ=True)


def multiply(
    x: Tensor,
    weight: Nf4Bytes | Tensor,
    columns: int,
    transposed: bool,
    dtype: torch.dtype = torch.bfloat16,
    **others: object,
) -> Tensor:
    """In the middle of a wider tensor, whose other columns are left alone."""
    offsets = torch.tensor(TOKENS).cumsum(0)
    wide = torch.full((sum(TOKENS), columns + 5), float("nan"))
    out = wide[:, 2 : columns + 2]
    native.grouped_gemm(x, weight, offsets, out, transposed=transposed, dtype=dtype, **others)  # type: ignore[arg-type]
    assert wide[:, :2].isnan().all()
    assert wide[:, columns + 2 :].isnan().all()
    return out


def rounded_blocks(x_RK: Tensor) -> Tensor:
    """x as the library has it: integers by block of 64, times what one is worth; float64 [R, K / 64, 64]."""
    blocks = torch.nn.functional.pad(x_RK, (0, -x_RK.shape[1] % 64)).unflatten(1, (-1, 64))
    size = blocks.abs()
    by_sum = (MOST_SUM - 64) / 64 / size.mean(2, keepdim=True)
    factor = torch.minimum(32767 / size.amax(2, keepdim=True), by_sum)
    return (blocks * factor).round().double() / factor


def unpacked(weight: Nf4Bytes, index: int) -> tuple[Tensor, Tensor]:
    """Values of the codebook [N, K], and scales of blocks of 32 [N, K / 32]."""
    packed = weight.packed[index]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1).int()
    scales = dequantize_absmax(weight, index)
    halves = weight.in_features // 32 // scales.shape[1]
    return codebook(weight.scheme, packed.device)[codes], scales.repeat_interleave(halves, dim=1)


def looked_up(values: Tensor, most: int) -> tuple[Tensor, float]:
    """Integers of a codebook's values, of which none exceeds `most`, and what 1 is among them."""
    unit = 2.0 ** torch.floor(torch.log2(most / torch.tensor(6.0 if values.abs().max() > 1 else 1.0))).item()
    return (values * unit).round().clamp(max=32767), unit


def expected(x: Tensor, weight: Nf4Bytes, parts: int, transposed: bool) -> Tensor:
    """Both factors rounded as the library rounds them, multiplied in float64; x is sorted by expert."""
    out, start = [], 0
    for expert, count in enumerate(TOKENS):
        matrices = [unpacked(weight, expert * parts + part) for part in range(parts)]
        values, scales = (torch.cat(each) for each in zip(*matrices, strict=True))
        own = x[start : start + count]
        start += count
        if transposed:
            integers, unit = looked_up(values, MOST_WEIGHT)
            w = (integers.unflatten(1, (-1, 32)) * (scales / unit)[..., None].double()).flatten(1)
            out.append(rounded_blocks(own).flatten(1) @ w.t())
        else:
            out.append(expected_input_gradient(own, values, scales))
    return torch.cat(out).float()


def expected_input_gradient(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Rows of W are divided by their largest scale, and tokens multiplied with it, before both are rounded."""
    magnitude = scales.abs().amax(1)
    tokens = rounded_blocks(x * magnitude)
    missing = -len(values) % 64
    left = torch.nn.functional.pad(scales / magnitude[:, None], (0, 0, 0, missing)).unflatten(0, (-1, 64))
    most = left.abs().amax(1, keepdim=True)
    ratios = (left * (MOST_WEIGHT / most)).round()
    integers, unit = looked_up(torch.nn.functional.pad(values, (0, 0, 0, missing)), ONE)
    products = integers.view(*ratios.shape, 32).double() * ratios[..., None]
    w = ((products + ONE // 2) / ONE).floor() * (most * (ONE / MOST_WEIGHT / unit))[..., None]
    return torch.einsum("rbd,bdnj->rnj", tokens, w).flatten(1)


def dense_weights(rows: int, columns: int) -> Tensor:
    """A random matrix in bfloat16 for each expert, whose rows lie apart and are of different sizes."""
    sizes = 10 ** torch.linspace(-3, 3, rows)[:, None]
    return (torch.randn(len(TOKENS), rows, columns + 3) * sizes).bfloat16()[:, :, :columns]


def expected_dense(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Weights are multiples of 8192ths of the largest of 64 along the contraction."""
    out = []
    for own, w in zip(x.split(TOKENS), weight if transposed else weight.transpose(1, 2), strict=True):
        blocks = torch.nn.functional.pad(w.double(), (0, -w.shape[1] % 64)).unflatten(1, (-1, 64))
        most = blocks.abs().amax(2, keepdim=True)
        rounded = (blocks * (MOST_WEIGHT / most)).round() * (most / MOST_WEIGHT)
        out.append(rounded_blocks(own).flatten(1) @ rounded.flatten(1).t())
    return torch.cat(out).float()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def dense(weight: Nf4Bytes, index: int = 0) -> Tensor:
    """Float64."""
    return dequantize(weight, index, torch.empty(weight.out_features, weight.in_features)).double()


def both_ways(x: Tensor, weight: Nf4Bytes, dtype: torch.dtype = torch.bfloat16) -> list[tuple[Tensor, Tensor]]:
    """What one square matrix gives and what it should in float64, product and input gradient."""
    offsets, w, pairs = torch.tensor([len(x)]), dense(weight), []
    for transposed in (True, False):
        out = torch.full((len(x), w.shape[0]), float("nan"))
        native.grouped_gemm(x, weight, offsets, out, transposed=transposed, dtype=dtype)
        pairs.append((out, x.double() @ (w.t() if transposed else w)))
    return pairs


def square(size: int, kind: str = "plain") -> Nf4Stack:
    stack = Nf4Stack(1, size, size, double_quantization=kind == "double", scheme="mxfp4" if kind == "mxfp4" else "nf4")
    if kind == "mxfp4":
        stack.packed.random_(256)
        stack.absmax.random_(118, 130)
    else:
        stack.write(0, torch.randn(size, size))
    return stack


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "parts"), [(1, 64, 1), (40, 192, 2), (333, 640, 1), (65, 1088, 3)])
def test_products_and_input_gradients_are_those_of_rounded_factors(
    kind: str, rows: int, columns: int, parts: int
) -> None:
    weight = weights(rows, columns, parts, kind)
    for transposed in (True, False):
        depth, width = (columns, parts * rows) if transposed else (parts * rows, columns)
        x = torch.randn(sum(TOKENS), depth, generator=torch.Generator().manual_seed(1))
        wanted, found = expected(x, weight, parts, transposed), multiply(x, weight, width, transposed)
        # A number halfway between two integers may go either way, by the last bit of its scale.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.std()))
        assert relative_error(found, wanted) < 3e-5


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 193), (333, 640), (70, 1100)])
def test_matrices_in_bfloat16_are_multiplied_so_too(rows: int, columns: int) -> None:
    weight = dense_weights(rows, columns)
    for transposed in (True, False):
        depth, width = (columns, rows) if transposed else (rows, columns)
        x = torch.randn(sum(TOKENS), depth)
        wanted, found = expected_dense(x, weight, transposed), multiply(x, weight, width, transposed)
        assert (found - wanted).abs().lt(1e-3 * wanted.std(0)).all()
        assert relative_error(found, wanted) < 3e-5


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_number_of_a_matrix_that_is_not_finite_shows_in_what_it_gives(bad: float) -> None:
    weight, x = torch.randn(len(TOKENS), 192, 192).bfloat16(), torch.randn(sum(TOKENS), 192)
    whole = [multiply(x, weight, 192, transposed) for transposed in (True, False)]
    weight[2, 50, 100] = bad  # the matrix of 17 tokens
    for transposed, column, before in zip((True, False), (50, 100), whole, strict=True):
        found = multiply(x, weight, 192, transposed)
        assert not found[1:18, column].isfinite().any()
        found[1:18, column] = before[1:18, column]
        assert torch.equal(found, before)


@pytest.mark.parametrize("kind", ["plain", "mxfp4"])
def test_largest_sums_that_are_possible_do_not_overflow(kind: str) -> None:
    stack = square(192, kind)
    stack.packed.fill_(0x77 if kind == "mxfp4" else 0xFF)  # the largest value of the codebook
    stack.absmax.fill_(127 if kind == "mxfp4" else 1.0)
    x = torch.zeros(5, 192)
    x[0] = 1.0  # all alike: the largest sum of a block
    x[1, ::64] = 1.0  # one alone: the largest integer
    x[2] = -torch.arange(1, 193)
    x[3, :128] = 3e38  # the largest that a number can be; its sum in float64 is beyond float32
    x[4, 7:9] = torch.tensor([1.0, 1e-3])
    for found, wanted in both_ways(x, stack.bytes):
        torch.testing.assert_close(found[[0, 1, 2, 4]].double(), wanted[[0, 1, 2, 4]], rtol=1e-3, atol=0)
        assert found[3].isposinf().all()
    stack.packed.fill_(0xFF if kind == "mxfp4" else 0x00)  # and the most negative one
    for found, wanted in both_ways(x, stack.bytes):
        torch.testing.assert_close(found[[0, 1, 2, 4]].double(), wanted[[0, 1, 2, 4]], rtol=1e-3, atol=0)
        assert found[3].isneginf().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_token_that_is_not_finite_gives_nothing_finite_and_leaves_the_others_alone(bad: float) -> None:
    weight, x = square(192).bytes, torch.randn(9, 192)
    whole = [found for found, _ in both_ways(x, weight)]
    x[4, 100] = bad
    for (found, _), before in zip(both_ways(x, weight), whole, strict=True):
        assert not found[4].isfinite().any()
        others = torch.arange(9) != 4
        assert torch.equal(found[others], before[others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scale_that_is_not_finite_shows_in_what_its_weights_give(bad: float) -> None:
    stack = square(192)
    stack.absmax[0, 3 * 50 + 1] = bad  # row 50, columns 64 to 128
    (product, _), (gradient, _) = both_ways(torch.randn(9, 192), stack.bytes)
    assert not product[:, 50].isfinite().any()
    assert product[:, torch.arange(192) != 50].isfinite().all()
    assert gradient[:, 64:128].isnan().all()
    assert gradient[:, :64].isfinite().all()
    assert gradient[:, 128:].isfinite().all()


def test_zeros_give_zeros_and_numbers_too_small_to_scale_vanish() -> None:
    weight, x = square(192).bytes, torch.zeros(4, 192)
    x[1], x[2] = 1e-40, 1e-35  # below the least normal float32, and a little above
    x[3, :64], x[3, 64:] = 1e-35, torch.randn(128)
    for found, wanted in both_ways(x, weight):
        assert not found[:3].any()
        assert relative_error(found[3], wanted[3]) < 3e-4
    stack = square(192)
    stack.absmax.zero_()
    for found, _ in both_ways(torch.randn(9, 192), stack.bytes):
        assert not found.any()


@pytest.mark.parametrize("kind", KINDS)
def test_largest_scale_of_a_row_is_found_wherever_it_stands(kind: str) -> None:
    """Rows of more than two vectors of 8-bit scales, that begin and end within what shares a scale of scales."""
    weight = weights(3, 5440, kind=kind)
    weight.absmax.fill_(0.01 if kind == "plain" else 118 if kind == "mxfp4" else 128)
    scales = weight.absmax.view(len(TOKENS), 3, -1)
    for expert in range(len(TOKENS)):
        for row in range(3):
            scales[expert, row, (31 * expert + 29 * row) % scales.shape[2]] = 1.0 if kind == "plain" else 129
    x = torch.randn(sum(TOKENS), 3)
    wanted = expected(x, weight, 1, transposed=False)
    torch.testing.assert_close(multiply(x, weight, 5440, False), wanted, rtol=0, atol=1e-3 * float(wanted.std()))


@pytest.mark.parametrize("kind", ["double", "plain"])
def test_scales_may_be_negative(kind: str) -> None:
    """What quantizing scales leaves of those of a small row is."""
    stack = square(192, kind)
    if kind == "plain":
        stack.absmax[:, ::3] *= -2.0
    else:
        stack.offset.zero_()  # the mean of the scales
    assert 0.2 < (dequantize_absmax(stack.bytes, 0) < 0).float().mean() < 0.8
    stack.absmax[0, :3] = stack.absmax[0].min()  # and may be all that a row has
    for found, wanted in both_ways(torch.randn(9, 192), stack.bytes):
        assert relative_error(found, wanted) < 3e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_product_left_in_a_threads_memory_does_not_count(kind: str) -> None:
    weight, left = weights(40, 192, kind=kind), weights(192, 256)
    x, gradient = torch.randn(sum(TOKENS), 192), torch.randn(sum(TOKENS), 40)
    before = multiply(x, weight, 40, True), multiply(gradient, weight, 192, False)
    nothing = torch.full((sum(TOKENS), 256), float("nan"))
    for way, found in enumerate(before):
        multiply(nothing, left, 192, True, torch.float32)
        again = multiply(gradient, weight, 192, False) if way else multiply(x, weight, 40, True)
        assert torch.equal(again, found)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_a_fifth_of_that_of_factors_in_bfloat16(kind: str) -> None:
    weight, x = square(512, kind).bytes, torch.randn(64, 512)
    half = dense(weight).bfloat16().double()  # MXFP4's values are exact in it: only tokens are rounded
    for (found, wanted), w in zip(both_ways(x, weight), (half.t(), half), strict=True):
        assert relative_error(found, wanted) < relative_error(x.bfloat16().double() @ w, wanted) / 5


def test_input_gradient_is_accurate_where_rows_and_columns_of_blocks_differ_in_size() -> None:
    """Their gradients differ the other way, so that each row counts alike."""
    sizes = 10 ** (torch.rand(512, 1) * 3)
    stack = square(512)
    stack.write(0, torch.randn(512, 512) / sizes)
    x = torch.randn(64, 512) * sizes.t()
    (_, _), (found, wanted) = both_ways(x, stack.bytes)
    assert relative_error(found, wanted) < 5e-4
    stack.absmax[0, ::8] *= 100.0  # and their blocks of 64 columns too
    (_, _), (found, wanted) = both_ways(x, stack.bytes)
    assert relative_error(found, wanted) < 5e-4


def test_float16_is_computed_so_too_and_float32_is_not() -> None:
    weight, x = square(192).bytes, torch.randn(9, 192).half().float()
    for (found, wanted), (same, _) in zip(both_ways(x, weight, torch.float16), both_ways(x, weight), strict=True):
        assert torch.equal(found, same)
        assert 1e-5 < relative_error(found, wanted) < 3e-4
    for found, wanted in both_ways(x, weight, torch.float32):
        assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("rank", [1, 37])
def test_updates_of_some_columns_and_some_experts_are_added_in_float32(rank: int) -> None:
    weight, slots = weights(70, 192, 2), torch.tensor([0, 1, -1, -1, 2, 3])
    of_each = torch.repeat_interleave(slots, torch.tensor(TOKENS))
    for transposed, column, column_end in ((True, 70, 140), (True, 0, 140), (False, 0, 192), (False, 5, 77)):
        depth, width = (192, 140) if transposed else (140, 192)
        x, h = torch.randn(sum(TOKENS), depth), torch.randn(sum(TOKENS), rank)
        b = torch.randn(4, *((column_end - column, rank) if transposed else (rank, column_end - column)))
        wanted = multiply(x, weight, width, transposed)
        added = torch.einsum("tr,tnr->tn", h, b[of_each] if transposed else b[of_each].transpose(1, 2))
        wanted[:, column:column_end] += added.where(of_each[:, None] >= 0, 0)
        update = native.Update(h, b, column, column_end, slots)
        found = multiply(x, weight, width, transposed, updates=[update])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packed", [True, False], ids=["4 bits", "bfloat16"])
def test_same_bytes_by_one_thread_and_by_several(packed: bool) -> None:
    weight, threads, found = (weights if packed else dense_weights)(333, 1088), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for transposed in (True, False):
                x = torch.randn(sum(TOKENS), 1088 if transposed else 333, generator=torch.Generator().manual_seed(2))
                found.append(multiply(x, weight, 333 if transposed else 1088, transposed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("packed", [True, False], ids=["4 bits", "bfloat16"])
def test_token_gives_the_same_bytes_alone_and_among_others_wherever_it_lies(packed: bool, transposed: bool) -> None:
    weight = (weights if packed else dense_weights)(333, 1088)
    depth, width = (1088, 333) if transposed else (333, 1088)
    x = torch.randn(sum(TOKENS), depth)
    whole = multiply(x, weight, width, transposed)
    order = torch.randperm(len(x))
    assert torch.equal(multiply(x[order], weight, width, transposed, index=order.argsort()), whole)
    wide = torch.full((len(x), depth + 3), float("nan"))
    wide[:, 1 : depth + 1] = x
    assert torch.equal(multiply(wide[:, 1 : depth + 1], weight, width, transposed), whole)
    expert_of = torch.repeat_interleave(torch.arange(len(TOKENS)), torch.tensor(TOKENS))
    for token in (0, 1, 17, 50, 51, 770, 780):
        out, offsets = torch.empty(1, width), (torch.arange(len(TOKENS)) >= expert_of[token]).long()
        native.grouped_gemm(x[token : token + 1], weight, offsets, out, transposed=transposed, dtype=torch.bfloat16)
        assert torch.equal(out[0], whole[token])


@pytest.mark.parametrize(
    ("multiplies", "in_16_bits"),
    [
        (0, {torch.bfloat16: native.INTEGERS, torch.float16: native.INTEGERS}),
        (1, {torch.bfloat16: 1, torch.float16: 0}),
        (native.AMX, {torch.bfloat16: native.AMX, torch.float16: 0}),
    ],
    ids=["no 16-bit floats", "AVX512-BF16", "AMX"],
)
def test_integers_are_chosen_only_where_no_16_bit_floats_are_multiplied(
    multiplies: int, in_16_bits: dict[torch.dtype, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: multiplies)
    assert {dtype: native.arithmetic(dtype) for dtype in in_16_bits} == in_16_bits
    assert native.arithmetic(torch.float32) == 0
