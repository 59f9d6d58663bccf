"""The grouped GEMM of 4-bit experts against plain float32, forward and backward, at every awkward shape."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.kernels.grouped_linear import LoraUpdate, grouped_linear, reference
from expertune.kernels.nf4 import Nf4Stack

# Where sums are taken in another order the last bits differ: K is at most a few thousand here, values about one.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}
# GEMMs of 16-bit numbers are summed in float32 and rounded once, but W itself is rounded to 16 bits before: each
# of K terms is off by half a unit in the last place at random. bfloat16 keeps 8 bits, float16 keeps 11.
TOLERANCES = {
    torch.float32: FLOAT32,
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-5},
    torch.float16: {"rtol": 2**-9, "atol": 2**-8},
}


pytestmark = pytest.mark.usefixtures("route")


class Case(NamedTuple):
    """A GEMM with its leaves: `x`, the updates' own inputs, A and B all want gradients."""

    x: Tensor
    weight: Nf4Stack
    offsets: Tensor
    updates: list[LoraUpdate]

    @property
    def leaves(self) -> list[Tensor]:
        own_x = [update.x_RK for update in self.updates if update.x_RK is not None]
        return [self.x, *own_x, *(factor for update in self.updates for factor in (update.a_ErK, update.b_ENr))]


def stack_of(num_matrices: int, rows: int, columns: int, double_quantization: bool = True) -> Nf4Stack:
    stack = Nf4Stack(num_matrices, rows, columns, double_quantization)
    for index in range(num_matrices):
        stack.write(index, torch.randn(rows, columns) / columns**0.5)
    return stack


def make_case(
    rows_per_expert: Sequence[int],
    ranks: Sequence[tuple[int, int]] = (),
    *,
    num_parts: int = 2,
    rows: int = 40,
    columns: int = 128,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    own_x: bool = False,
    double_quantization: bool = True,
) -> Case:
    """A case with random values; `ranks` lists (part, rank) of each update."""
    num_experts = len(rows_per_expert)
    x = torch.randn(sum(rows_per_expert), columns).to(dtype).requires_grad_()
    updates = [
        LoraUpdate(
            part,
            (torch.randn(num_experts, rank, columns) / columns**0.5).to(adapter_dtype).requires_grad_(),
            (torch.randn(num_experts, rows, rank) / rank**0.5).to(adapter_dtype).requires_grad_(),
            scaling=0.5 + u,
            x_RK=torch.randn_like(x).requires_grad_() if own_x else None,
        )
        for u, (part, rank) in enumerate(ranks)
    ]
    offsets = torch.tensor(rows_per_expert).cumsum(0)
    return Case(x, stack_of(num_experts * num_parts, rows, columns, double_quantization), offsets, updates)


def assert_same_as_plain(case: Case, tolerance: dict[str, float]) -> None:
    """Output and the gradient of every leaf agree with plain float32 arithmetic."""
    y = grouped_linear(case.x, case.weight, case.offsets, case.updates)
    expected = reference.grouped_linear(case.x, case.weight, case.offsets, case.updates)
    assert y.dtype == case.x.dtype
    torch.testing.assert_close(y.float(), expected, **tolerance)
    dy = torch.randn_like(expected).to(y.dtype)
    gradients = torch.autograd.grad(y, case.leaves, dy)
    for gradient, plain, leaf in zip(
        gradients, torch.autograd.grad(expected, case.leaves, dy.float()), case.leaves, strict=True
    ):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        # The error of a sum grows with the sum: scale the tolerance to the largest gradient of the leaf.
        size = max(float(plain.abs().max()), 1.0) if plain.numel() else 1.0
        torch.testing.assert_close(gradient.float() / size, plain.float() / size, **tolerance)


SHAPES = {
    "rows that are a multiple of nothing": ([3, 5, 1, 14], [(0, 8), (1, 8)]),
    "empty experts first, between and last": ([0, 7, 0, 0, 4, 0], [(0, 4), (1, 4)]),
    "all rows to one expert": ([0, 0, 23, 0], [(0, 8), (1, 8)]),
    "one token": ([0, 1, 0], [(0, 2), (1, 2)]),
    "one expert": ([9], [(0, 4)]),
    "no update": ([4, 6], []),
    "rank 1": ([4, 6], [(1, 1)]),
    "rank 3": ([4, 6], [(0, 3)]),
    "rank 17": ([4, 6], [(0, 17), (1, 17)]),
    "rank above the output width": ([4, 6], [(0, 50)]),
    "two adapters on one part": ([4, 6], [(0, 4), (0, 7)]),
    "two adapters on both parts": ([4, 6], [(0, 4), (1, 4), (0, 2), (1, 6)]),
    "no rows": ([0, 0, 0], [(0, 4), (1, 2)]),
}


@pytest.mark.parametrize("own_x", [False, True], ids=["shared input", "own input after dropout"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gemm_and_gradients_are_those_of_plain_arithmetic(shape: str, own_x: bool) -> None:
    assert_same_as_plain(make_case(*SHAPES[shape], own_x=own_x), FLOAT32)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products")
def test_half_precision_gemm_stays_within_its_rounding(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    case = make_case([5, 0, 12], [(0, 8), (1, 3)], dtype=dtype, adapter_dtype=adapter_dtype)
    coarsest = max((dtype, adapter_dtype), key=lambda kind: TOLERANCES[kind]["atol"])
    assert_same_as_plain(case, TOLERANCES[coarsest])


def test_update_of_float32_factors_is_rounded_once_to_the_rows_dtype() -> None:
    case = make_case([6], [(0, 4)], num_parts=1, dtype=torch.bfloat16)
    (update,) = case.updates
    alone = grouped_linear(case.x, case.weight, case.offsets).float()
    low_rank = update.scaling * (case.x.float() @ update.a_ErK[0].t()) @ update.b_ENr[0].t()
    y = grouped_linear(case.x, case.weight, case.offsets, case.updates).float()
    # Half a unit in the last of bfloat16's 8 bits for the frozen GEMM, and for the sum: none for the update.
    assert ((y - (alone + low_rank)).abs() <= 2**-8 * (alone.abs() + y.abs()) * 1.01).all()


def test_two_adapters_of_different_dtypes_share_one_input() -> None:
    one = make_case([3, 4], [(0, 4)])
    other = make_case([3, 4], [(0, 4)], adapter_dtype=torch.bfloat16)
    for updates in (one.updates + other.updates, other.updates + one.updates):
        assert_same_as_plain(one._replace(updates=updates), TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_parts_lie_side_by_side(num_parts: int, double_quantization: bool) -> None:
    case = make_case([3, 4], num_parts=num_parts, double_quantization=double_quantization)
    assert_same_as_plain(case, FLOAT32)
    y = grouped_linear(case.x, case.weight, case.offsets)
    second = case.weight.dequantize(num_parts, torch.float32)
    torch.testing.assert_close(y[3:, :40], case.x[3:] @ second.t(), **FLOAT32)


def test_matrices_larger_than_a_tile_are_multiplied_whole() -> None:
    # 1,100 x 1,024 float32 weights are 4.3 MiB a part, so that rows and columns take several tiles, the last one short.
    case = make_case([2, 3], [(0, 4), (1, 4)], rows=1100, columns=1024)
    assert_same_as_plain(case, {"rtol": 1e-5, "atol": 5e-5})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    num_parts = draw(st.integers(1, 2))
    return make_case(
        draw(st.lists(st.integers(0, 6), min_size=1, max_size=5)),
        draw(st.lists(st.tuples(st.integers(0, num_parts - 1), st.integers(1, 9)), max_size=3)),
        num_parts=num_parts,
        rows=draw(st.integers(1, 20)),
        columns=64 * draw(st.integers(1, 2)),
        own_x=draw(st.booleans()),
        double_quantization=draw(st.booleans()),
    )


@given(cases())
# The route holds for all examples; how long drawing one takes says nothing.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_distribution_of_rows_gives_the_plain_gemm(case: Case) -> None:
    assert_same_as_plain(case, FLOAT32)


def test_experts_without_rows_get_zero_gradients_not_garbage() -> None:
    case = make_case([3, 0, 2], [(0, 4)])
    grouped_linear(case.x, case.weight, case.offsets, case.updates).sum().backward()
    (update,) = case.updates
    for factor in (update.a_ErK, update.b_ENr):
        assert factor.grad is not None
        assert not factor.grad[1].any()
        assert factor.grad[0].any()


@pytest.mark.usefixtures("products")
def test_two_runs_give_identical_bytes() -> None:
    case = make_case([5, 9, 0, 3], [(0, 8), (1, 8)], dtype=torch.bfloat16)
    first, second = (
        [y.detach(), *torch.autograd.grad(y.float().square().sum(), case.leaves)]
        for y in (grouped_linear(case.x, case.weight, case.offsets, case.updates) for _ in range(2))
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_each_row_depends_on_its_own_expert_alone() -> None:
    case = make_case([4, 4], [(0, 4)])
    y = grouped_linear(case.x, case.weight, case.offsets, case.updates)
    case.weight.write(2, torch.randn(40, 128))
    after = grouped_linear(case.x, case.weight, case.offsets, case.updates)
    assert torch.equal(y[:4], after[:4])
    assert not torch.equal(y[4:, :40], after[4:, :40])
    assert torch.equal(y[4:, 40:], after[4:, 40:])


def test_rows_that_are_a_view_with_strides_are_read_as_such() -> None:
    case = make_case([4, 5], [(0, 4)])
    wide = torch.randn(128, 9).t().requires_grad_()
    assert not wide.is_contiguous()
    assert_same_as_plain(case._replace(x=wide), FLOAT32)


def test_gradient_that_arrives_expanded_is_read_as_such() -> None:
    case = make_case([4, 5], [(0, 4), (1, 4)])
    y = grouped_linear(case.x, case.weight, case.offsets, case.updates)
    expected = reference.grouped_linear(case.x, case.weight, case.offsets, case.updates)
    for gradient, plain in zip(
        torch.autograd.grad(y.sum(), case.leaves), torch.autograd.grad(expected.sum(), case.leaves), strict=True
    ):
        torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-4)


def test_frozen_inputs_get_no_gradient_and_factors_still_do() -> None:
    case = make_case([4, 5], [(0, 4)])
    x = case.x.detach()
    grouped_linear(x, case.weight, case.offsets, case.updates).sum().backward()
    assert x.grad is None
    assert case.updates[0].a_ErK.grad is not None
    assert case.weight.packed.grad is None


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    case = make_case([4, 0, 5], [(0, 4), (1, 4)], own_x=True)

    def block(x: Tensor) -> Tensor:
        return grouped_linear(torch.tanh(x), case.weight, case.offsets, case.updates).square()

    plain = torch.autograd.grad(block(case.x).sum(), case.leaves)
    recomputed = torch.autograd.grad(checkpoint(block, case.x, use_reentrant=False).sum(), case.leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_compiled_gemm_is_one_graph_with_the_same_gradients() -> None:
    case = make_case([4, 0, 5], [(0, 4), (1, 4)], own_x=True)

    def block(x: Tensor) -> Tensor:
        return grouped_linear(torch.tanh(x), case.weight, case.offsets, case.updates).square()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    plain, traced = (torch.autograd.grad(run(case.x).sum(), case.leaves) for run in (block, compiled))
    for one, other in zip(plain, traced, strict=True):
        assert torch.equal(one, other)


def test_autocast_leaves_the_gemm_in_the_dtype_of_its_rows() -> None:
    case = make_case([4, 5], [(0, 4)])
    expected = grouped_linear(case.x, case.weight, case.offsets, case.updates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(case.x, case.weight, case.offsets, case.updates)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("own_x", [False, True])
def test_operator_fulfils_torchs_contract_for_custom_operators(own_x: bool) -> None:
    case = make_case([3, 0, 2], [(0, 4), (1, 2)], own_x=own_x)
    weight, updates = case.weight, case.updates
    torch.library.opcheck(
        torch.ops.expertune.grouped_linear.default,
        (
            case.x,
            weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            case.offsets,
            [update.part for update in updates],
            [update.scaling for update in updates],
            [update.a_ErK for update in updates],
            [update.b_ENr for update in updates],
            [case.x if update.x_RK is None else update.x_RK for update in updates],
        ),
    )


def good() -> Case:
    return make_case([3, 2], [(0, 4)])


def test_rows_of_another_width_are_refused_with_their_shape() -> None:
    case = good()
    with pytest.raises(ValueError, match=r"x must be \[rows, 128\], got \(5, 127\)"):
        grouped_linear(case.x[:, 1:], case.weight, case.offsets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_rows_of_another_dtype_are_refused_by_name(dtype: torch.dtype) -> None:
    case = good()
    with pytest.raises(ValueError, match=f"got {dtype}"):
        grouped_linear(case.x.detach().to(dtype), case.weight, case.offsets)


@pytest.mark.parametrize("offsets", [torch.tensor([3.0, 5.0]), torch.tensor([3, 5]).int(), torch.tensor([[3, 5]])])
def test_offsets_of_another_dtype_or_shape_are_refused(offsets: Tensor) -> None:
    case = good()
    with pytest.raises(ValueError, match="offsets must be int64"):
        grouped_linear(case.x, case.weight, offsets)


def test_experts_that_do_not_share_out_the_matrices_are_refused() -> None:
    case = good()
    with pytest.raises(ValueError, match="4 matrices cannot be shared out to 3 experts"):
        grouped_linear(case.x, case.weight, torch.tensor([1, 2, 5]))


def test_tensors_on_different_devices_are_refused_by_name() -> None:
    case = good()
    with pytest.raises(ValueError, match="weight is on meta, x is on cpu"):
        grouped_linear(case.x, Nf4Stack(4, 40, 128, device="meta"), case.offsets)


WRONG_UPDATES = {
    "A of another width": ({"a_ErK": torch.randn(2, 4, 64)}, r"A must be \[2, r, 128\], got \(2, 4, 64\)"),
    "A without experts": ({"a_ErK": torch.randn(4, 128)}, r"A must be \[2, r, 128\], got \(4, 128\)"),
    "A of other experts": ({"a_ErK": torch.randn(3, 4, 128)}, r"A must be \[2, r, 128\], got \(3, 4, 128\)"),
    "B of another rank": ({"b_ENr": torch.randn(2, 40, 5)}, r"B must be \[2, 40, 4\], got \(2, 40, 5\)"),
    "B transposed": ({"b_ENr": torch.randn(2, 4, 40)}, r"B must be \[2, 40, 4\], got \(2, 4, 40\)"),
    "B of another dtype": ({"b_ENr": torch.randn(2, 40, 4).half()}, "B is torch.float16, A is torch.float32"),
    "factors that are no floats": (
        {"a_ErK": torch.ones(2, 4, 128).int(), "b_ENr": torch.ones(2, 40, 4).int()},
        "A must be float32, float16 or bfloat16, got torch.int32",
    ),
    "factors elsewhere": ({"a_ErK": torch.empty(2, 4, 128, device="meta")}, "A is on meta, x is on cpu"),
    "a part too many": ({"part": 2}, "part must be below 2, got 2"),
    "a negative part": ({"part": -1}, "part must be below 2, got -1"),
    "an input of another shape": ({"x_RK": torch.randn(4, 128)}, r"x must be \(5, 128\), got \(4, 128\)"),
}


@pytest.mark.parametrize("wrong", WRONG_UPDATES)
def test_updates_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    case = good()
    changes, message = WRONG_UPDATES[wrong]
    with pytest.raises(ValueError, match=message):
        grouped_linear(case.x, case.weight, case.offsets, [replace(case.updates[0], **changes)])
