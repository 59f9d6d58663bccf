"""The dense GEMM of one 4-bit matrix on a CPU against plain float32, forward and backward, on both routes."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.kernels.linear import nf4_linear
from expertune.kernels.nf4 import Nf4Stack
from tests.kernels.settings import SETTINGS

# Where sums are taken in another order the last bits differ: K is at most a few thousand here, values about one.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}
# GEMMs of 16-bit numbers are summed in float32 and rounded once, but W itself is rounded to 16 bits before: each
# of K terms is off by half a unit in the last place at random. bfloat16 keeps 8 bits, float16 keeps 11.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}

pytestmark = pytest.mark.usefixtures("route")


def matrix(out_features: int = 40, in_features: int = 128, double_quantization: bool = True) -> Nf4Stack:
    stack = Nf4Stack(1, out_features, in_features, double_quantization)
    stack.write(0, torch.randn(out_features, in_features) / in_features**0.5)
    return stack


def inputs(tokens: int, in_features: int = 128, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, in_features).to(dtype).requires_grad_()


def linear(x: Tensor, weight: Nf4Stack) -> Tensor:
    return nf4_linear(x, weight.bytes, SETTINGS)


def assert_same_as_plain(x: Tensor, weight: Nf4Stack, tolerance: dict[str, float]) -> None:
    """Output and the gradient of x agree with plain float32 arithmetic."""
    y = linear(x, weight)
    expected = x.float() @ weight.dequantize(0, torch.float32).t()
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.float(), expected, **tolerance)
    dy = torch.randn_like(expected).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, [x], dy)
    (plain,) = torch.autograd.grad(expected, [x], dy.float())
    assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
    # The error of a sum grows with the sum: scale the tolerance to the largest gradient.
    size = max(float(plain.abs().max()), 1.0) if plain.numel() else 1.0
    torch.testing.assert_close(gradient.float() / size, plain.float() / size, **tolerance)


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 23, 900])
def test_float32_gemm_and_gradient_are_those_of_plain_arithmetic(tokens: int, double_quantization: bool) -> None:
    assert_same_as_plain(inputs(tokens), matrix(double_quantization=double_quantization), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products")
def test_half_precision_gemm_stays_within_its_rounding(dtype: torch.dtype) -> None:
    assert_same_as_plain(inputs(17, dtype=dtype), matrix(), TOLERANCES[dtype])


def test_matrix_larger_than_a_tile_is_multiplied_whole() -> None:
    # 2,200 x 1,024 float32 weights are 8.6 MiB, so that rows and columns take several tiles, the last one short.
    assert_same_as_plain(inputs(5, 1024), matrix(2200, 1024), {"rtol": 1e-5, "atol": 5e-5})


@given(st.integers(0, 2**31), st.integers(0, 20), st.integers(1, 20), st.integers(1, 2))
# The route holds for all examples; how long drawing one takes says nothing.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_shape_gives_the_plain_gemm(seed: int, tokens: int, out_features: int, blocks: int) -> None:
    torch.manual_seed(seed)
    assert_same_as_plain(inputs(tokens, 64 * blocks), matrix(out_features, 64 * blocks), FLOAT32)


@pytest.mark.usefixtures("products")
def test_two_runs_give_identical_bytes() -> None:
    x, weight = inputs(17, dtype=torch.bfloat16), matrix()
    first, second = (linear(x, weight) for _ in range(2))
    assert torch.equal(first, second)
    gradients = [torch.autograd.grad(y.float().square().sum(), [x])[0] for y in (first, second)]
    assert torch.equal(*gradients)


def test_input_that_is_a_view_with_strides_is_read_as_such() -> None:
    wide = torch.randn(128, 9).t().requires_grad_()
    assert not wide.is_contiguous()
    assert_same_as_plain(wide, matrix(), FLOAT32)


def test_gradient_that_arrives_expanded_is_read_as_such() -> None:
    x, weight = inputs(9), matrix()
    plain = x @ weight.dequantize(0, torch.float32).t()
    (gradient,), (expected,) = (torch.autograd.grad(y.sum(), [x]) for y in (linear(x, weight), plain))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_checkpointed_or_compiled_gemm_gives_the_same_gradient(how: str) -> None:
    x, weight = inputs(9), matrix()

    def block(x: Tensor) -> Tensor:
        return linear(torch.tanh(x), weight).square()

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(block, x, use_reentrant=False)

    other = checkpointed if how == "checkpointed" else torch.compile(block, backend="aot_eager", fullgraph=True)
    plain, found = (torch.autograd.grad(run(x).sum(), [x])[0] for run in (block, other))
    assert torch.equal(plain, found)


def test_autocast_leaves_the_gemm_in_the_dtype_of_its_input() -> None:
    x, weight = inputs(9), matrix()
    expected = linear(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight)
    assert torch.equal(y, expected)


def test_operator_fulfils_torchs_contract_for_custom_operators() -> None:
    torch.library.opcheck(torch.ops.expertune.nf4_linear.default, (inputs(5), *matrix().bytes, SETTINGS.name))


WRONG: dict[str, tuple[Any, Any, str]] = {
    "another width": (torch.randn(5, 127), Nf4Stack(1, 40, 128), r"x must be \[tokens, 128\], got \(5, 127\)"),
    "another dtype": (torch.randn(5, 128).double(), Nf4Stack(1, 40, 128), "got torch.float64"),
    "no floats": (torch.ones(5, 128).long(), Nf4Stack(1, 40, 128), "got torch.int64"),
    "several matrices": (torch.randn(5, 128), Nf4Stack(2, 40, 128), "weight must be one matrix, got 2"),
    "a weight elsewhere": (torch.randn(5, 128), Nf4Stack(1, 40, 128, device="meta"), "weight must be on a CPU"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    x, weight, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        linear(x, weight)
