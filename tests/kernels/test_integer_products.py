"""Products in integers of 16 bits, at any sizes and scales: within what their rounding may cost, of float64, and never
a number where float32 has none."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.native.gemv import MOST_ROUTED, Product, gemv
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.nf4.reference import codebook, dequantize_absmax
from tests.kernels.stacks import random_stack

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library could not be built here")

KINDS = ("double", "plain", "mxfp4")
NO_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf])
# Of grouped_gemm_int16.h: integers of a block of tokens, one and all together, and of a weight.
MOST_EACH, MOST_SUM, MOST_WEIGHT = 32767, 2**18 - 1 - 64, 8192
# What is lost below the least float32, times tokens of 1.
LEAST = 1e-35

drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def without_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 and nothing that multiplies bfloat16."""
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)


class Grouped(NamedTuple):
    """Tokens of each expert, and the size of a product."""

    counts: list[int]
    parts: int
    rows: int
    columns: int
    transposed: bool

    @property
    def depth(self) -> int:
        return self.columns if self.transposed else self.parts * self.rows

    @property
    def width(self) -> int:
        return self.parts * self.rows if self.transposed else self.columns


@st.composite
def grouped(draw: st.DrawFn, packed: bool) -> Grouped:
    """Of one pass of the contraction and of more, experts without tokens among them."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    columns = draw(st.integers(1, 3) | st.just(9))
    return Grouped(
        counts=draw(st.lists(st.integers(0, 8), min_size=1, max_size=3)),
        parts=draw(st.integers(1, 2)) if packed else 1,
        rows=draw(st.integers(1, 40) | st.integers(513, 530)),
        columns=64 * columns if packed else 64 * columns - draw(st.integers(0, 63)),
        transposed=draw(st.booleans()),
    )


def spread(*shape: int, decades: float) -> Tensor:
    """Numbers of either sign that differ by so many decades, zeros among them."""
    numbers = torch.randn(shape) * 10 ** (decades * (torch.rand(shape) - 0.5))
    return numbers.where(torch.rand(shape) > 0.1, 0.0)


def tokens(data: st.DataObject, count: int, depth: int) -> Tensor:
    x = spread(count, depth, decades=data.draw(st.sampled_from([0, 4, 20])))
    if count and data.draw(st.booleans()):
        x[0, : depth // 2] = 0.0
        x[-1, depth // 2] = 1e4
    return x


def stack(data: st.DataObject, matrices: int, rows: int, columns: int, kind: str) -> Nf4Bytes:
    """Random codes, and scales of any sign and size that may be: zero, below the least normal float32, large."""
    weight = random_stack(1, 1, 64, kind)
    blocks, decades = rows * columns // 64, data.draw(st.sampled_from([0, 4, 20]))
    packed = torch.randint(256, (matrices, rows, columns // 2), dtype=torch.uint8)
    if kind == "plain":
        absmax = spread(matrices, blocks, decades=decades)
        absmax[torch.rand(absmax.shape) < 0.1] = data.draw(st.sampled_from([0.0, 1e-40, -1e-33, 1e15]))
        return weight._replace(packed=packed, absmax=absmax)
    if kind == "mxfp4":
        span = 1 + 2 * decades
        absmax = torch.randint(127 - span, 127 + span, (matrices, *weight.absmax.shape[1:-1], 2 * blocks))
        absmax[torch.rand(absmax.shape) < 0.1] = data.draw(st.sampled_from([0, 1, 100, 170]))
        return weight._replace(packed=packed, absmax=absmax.to(weight.absmax.dtype))
    return weight._replace(
        packed=packed,
        absmax=torch.randint(256, (matrices, blocks), dtype=torch.uint8),
        nested_absmax=spread(matrices, -(-blocks // 256), decades=decades),
        offset=spread(matrices, decades=decades),
    )


def scales_of(weight: Nf4Bytes, matrices: range) -> Tensor:
    """Scales of blocks of matrices one below the other, float64 [rows, blocks]; MXFP4's of half as many numbers."""
    return torch.cat([dequantize_absmax(weight, index) for index in matrices]).double()


def values_of(weight: Nf4Bytes, matrices: range) -> Tensor:
    """What codes of matrices one below the other stand for, float64 [rows, columns]."""
    packed = weight.packed[matrices.start : matrices.stop].flatten(0, 1)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1).int()
    return codebook(weight.scheme, packed.device)[codes].double()


def in_blocks(numbers: Tensor) -> Tensor:
    """[..., K] -> [..., K / 64, 64], zeros behind the last."""
    return torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % 64)).unflatten(-1, (-1, 64))


def off_of_tokens(x: Tensor) -> Tensor:
    """By how much numbers of x may be off, [R, K / 64]."""
    sizes = in_blocks(x).abs()
    return torch.maximum(sizes.amax(2) / (2 * MOST_EACH), sizes.sum(2) / (2 * MOST_SUM))


def bound(x: Tensor, w: Tensor, off_w: Tensor, off_x: Tensor) -> Tensor:
    """How far x @ w.T may be from it: rounding of tokens [R, K / 64], of weights [N, K / 64], and of float32 sums."""
    of_tokens = off_x @ in_blocks(w).abs().sum(2).t()
    of_weights = in_blocks(x).abs().sum(2) @ off_w.t()
    of_sums = (off_x.shape[1] + 8) * 2**-23 * (x.abs() @ w.abs().t())
    return 1.01 * (of_tokens + of_weights) + of_sums + LEAST * (1 + x.abs().amax(1, keepdim=True))


def bound_of_product(x: Tensor, weight: Nf4Bytes, matrices: range) -> tuple[Tensor, Tensor]:
    """What a product is in float64, and how far from it integers may be."""
    values, scales = values_of(weight, matrices), scales_of(weight, matrices)
    size = values.shape[1] // scales.shape[1]
    w = values * scales.repeat_interleave(size, dim=1)
    # MXFP4's values are whole numbers of 1024ths.
    off_w = torch.zeros(len(w), w.shape[1] // 64) if weight.scheme == "mxfp4" else scales.abs() / (2 * MOST_WEIGHT)
    return x @ w.t(), bound(x, w, off_w.double(), off_of_tokens(x))


def bound_of_input_gradient(x: Tensor, weight: Nf4Bytes, matrices: range) -> tuple[Tensor, Tensor]:
    """Rows are divided by their largest scale and tokens multiplied with it; 64 of them have integers in common."""
    values, scales = values_of(weight, matrices), scales_of(weight, matrices)
    size = values.shape[1] // scales.shape[1]
    w = values * scales.repeat_interleave(size, dim=1)
    largest = scales.abs().amax(1)
    magnitude = torch.where((largest > 1e-30) & (largest < 1e30), largest, 1.0)
    most = in_blocks((scales.abs() / magnitude[:, None]).t()).amax(2)  # [blocks, rows / 64]
    # A scale to half of an 8192th, times the largest value; a product to half of one, of MXFP4 to half of a 1024th; the
    # codebook's own.
    part = 3 / 8192 + 1 / 2048 if weight.scheme == "mxfp4" else 1 / 8192 + 1.5 / 32768
    off_w = (part * most).repeat_interleave(size, dim=0)
    tokens = x * magnitude
    return x @ w, bound(tokens, (w / magnitude[:, None]).t(), off_w, off_of_tokens(tokens)) + LEAST


def multiply(x: Tensor, weight: Nf4Bytes | Tensor, shape: Grouped, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    out = torch.full((len(x), shape.width), -7.0)
    offsets = torch.tensor(shape.counts).cumsum(0)
    native.grouped_gemm(x, weight, offsets, out, transposed=shape.transposed, dtype=dtype)
    return out


def assert_within(found: Tensor, wanted: Tensor, most: Tensor) -> None:
    off = (found.double() - wanted).abs()
    assert (off <= most).all(), f"off by {float((off / most).max()):.3g} times what rounding may cost"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@drawn
def test_product_with_4_bit_weights_is_within_its_rounding(kind: str, data: st.DataObject) -> None:
    shape = data.draw(grouped(packed=True))
    weight = stack(data, len(shape.counts) * shape.parts, shape.rows, shape.columns, kind)
    x = tokens(data, sum(shape.counts), shape.depth)
    found = multiply(x, weight, shape).split(shape.counts)
    bounded = bound_of_product if shape.transposed else bound_of_input_gradient
    for expert, (own, y) in enumerate(zip(x.split(shape.counts), found, strict=True)):
        if len(own):
            matrices = range(expert * shape.parts, (expert + 1) * shape.parts)
            assert_within(y, *bounded(own.double(), weight, matrices))


@given(data=st.data())
@drawn
def test_product_with_weights_in_bfloat16_is_within_its_rounding(data: st.DataObject) -> None:
    shape = data.draw(grouped(packed=False))
    decades = data.draw(st.sampled_from([0, 4, 20]))
    weight = spread(len(shape.counts), shape.rows, shape.columns, decades=decades).bfloat16()
    x = tokens(data, sum(shape.counts), shape.depth)
    found = multiply(x, weight, shape).split(shape.counts)
    for own, y, matrix in zip(x.double().split(shape.counts), found, weight.double(), strict=True):
        if len(own):
            w = matrix if shape.transposed else matrix.t()
            off_w = in_blocks(w).abs().amax(2) / (2 * MOST_WEIGHT)
            assert_within(y, own @ w.t(), bound(own, w, off_w, off_of_tokens(own)))


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@drawn
def test_product_of_few_tokens_is_within_its_rounding(kind: str, fine: bool, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    # A row of more than 128 blocks is multiplied in stretches.
    count, columns = data.draw(st.integers(1, 11)), 64 * data.draw(st.integers(1, 20) | st.integers(127, 138))
    rows = data.draw(st.integers(1, 35))
    weight, x, y = stack(data, 1, rows, columns, kind), tokens(data, count, columns), torch.full((count, rows), -7.0)
    gemv([Product(weight, x, y)], count, avx512=data.draw(st.booleans()), fine=fine)
    values, scales, own = values_of(weight, range(1)), scales_of(weight, range(1)), x.double()
    w = values * scales.repeat_interleave(columns // scales.shape[1], dim=1)
    off_w = scales.abs().unflatten(1, (columns // 64, -1)).amax(2) * (0 if kind == "mxfp4" else 1 / 32768)
    off_x = in_blocks(own).abs().amax(2) / (2 * 16128)
    # `fine` keeps 7 bits more of both, and of their products with each other all but the least.
    left = 1 / 32 if fine else 1.0
    assert_within(y, own @ w.t(), bound(own, w, left * off_w, left * off_x))


def spoil_scale(data: st.DataObject, weight: Nf4Bytes, matrix: int, bad: float) -> None:
    """One number of a matrix's scales is none."""
    if weight.scheme == "mxfp4":
        scales, bad = weight.absmax[matrix], 255  # an exponent that stands for none
    elif weight.double_quantization:
        scales = data.draw(st.sampled_from([weight.nested_absmax[matrix], weight.offset[matrix : matrix + 1]]))
    else:
        scales = weight.absmax[matrix]
    scales.view(-1)[data.draw(st.integers(0, scales.numel() - 1))] = bad


def assert_no_number_is_made_up(multiply: Callable[[torch.dtype], Tensor], before: Tensor, untouched: Tensor) -> None:
    """Where float32 gives no number 16 bits give none, and rows that nothing has touched keep their bytes."""
    exact, found = multiply(torch.float32), multiply(torch.bfloat16)
    assert not exact.isfinite().all()
    assert not found[~exact.isfinite()].isfinite().any()
    assert torch.equal(found[untouched], before[untouched])


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
@given(data=st.data(), bad=NO_NUMBERS, of_token=st.booleans())
@drawn
def test_what_is_not_finite_gives_no_number(kind: str, data: st.DataObject, bad: float, of_token: bool) -> None:
    shape = data.draw(grouped(packed=kind != "bfloat16").filter(lambda shape: sum(shape.counts) > 0))
    experts, depth = len(shape.counts), shape.depth
    x, weight = torch.randn(sum(shape.counts), depth), torch.randn(experts, shape.rows, shape.columns).bfloat16()
    packed = kind != "bfloat16" and random_stack(experts * shape.parts, shape.rows, shape.columns, kind)
    before = multiply(x, packed or weight, shape)
    expert_of = torch.repeat_interleave(torch.arange(experts), torch.tensor(shape.counts))
    token = data.draw(st.integers(0, len(x) - 1))
    expert = int(expert_of[token])
    if of_token:
        x[token, data.draw(st.integers(0, depth - 1))] = bad
    elif packed:
        spoil_scale(data, packed, expert * shape.parts + data.draw(st.integers(0, shape.parts - 1)), bad)
    else:
        weight[expert].view(-1)[data.draw(st.integers(0, weight[expert].numel() - 1))] = bad
    untouched = torch.arange(len(x)) != token if of_token else expert_of != expert
    assert_no_number_is_made_up(lambda dtype: multiply(x, packed or weight, shape, dtype), before, untouched)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), bad=NO_NUMBERS, of_token=st.booleans())
@drawn
def test_what_is_not_finite_among_few_tokens_gives_no_number(
    kind: str, data: st.DataObject, bad: float, of_token: bool
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    count, rows, columns = data.draw(st.integers(1, 11)), data.draw(st.integers(1, 35)), data.draw(st.integers(1, 9))
    weight, x = random_stack(1, rows, 64 * columns, kind), torch.randn(count, 64 * columns)
    shape = Grouped([count], 1, rows, 64 * columns, transposed=True)

    def few(dtype: torch.dtype, fine: bool) -> Tensor:
        if dtype == torch.float32:
            return multiply(x, weight, shape, dtype)
        y = torch.full((count, rows), -7.0)
        gemv([Product(weight, x, y)], count, fine=fine)
        return y

    before = [few(torch.bfloat16, fine) for fine in (False, True)]
    token = data.draw(st.integers(0, count - 1))
    if of_token:
        x[token, data.draw(st.integers(0, 64 * columns - 1))] = bad
    else:
        spoil_scale(data, weight, 0, bad)
    untouched = torch.arange(count) != token if of_token else torch.zeros(count, dtype=torch.bool)
    for fine, plain in enumerate(before):
        assert_no_number_is_made_up(lambda dtype, fine=bool(fine): few(dtype, fine), plain, untouched)  # type: ignore[misc]


def test_as_many_tokens_as_a_call_has_are_multiplied() -> None:
    weight, x = random_stack(1, 9, 128, "double"), torch.randn(MOST_ROUTED, 128)
    y = torch.full((MOST_ROUTED, 9), -7.0)
    gemv([Product(weight, x, y)], MOST_ROUTED)
    wanted, most = bound_of_product(x.double(), weight, range(1))
    assert_within(y, wanted, most)
