"""Grouped GEMMs of the GPU, with 4-bit and with dequantized weights, against plain float32 arithmetic row by row."""

import pytest
import torch
from torch import Tensor

from expertune.kernels.gpu import configs
from expertune.kernels.gpu.grouped_gemm import Dequantized, Update, grouped_gemm, input_gradient
from expertune.kernels.gpu.launch import Target
from expertune.kernels.nf4 import Nf4Bytes

from .conftest import RELATIVE, assert_near, dense, nan, routing, stack_of

# The first expert has no rows, one fills a tile and begins another, one has a single row; the last has none either.
COUNTS = [0, 19, 1, 7, 0]


def held(weight: Nf4Bytes, dequantized: bool, dtype: torch.dtype) -> Nf4Bytes | Dequantized:
    return Dequantized(dense(weight, dtype)) if dequantized else weight


def rowwise(x_RK: Tensor, expert_R: Tensor, weights: Tensor, parts: int) -> Tensor:
    """[R, parts * N]."""
    stacked = weights.float().view(-1, parts * weights.shape[1], weights.shape[2])
    return torch.einsum("rk,rnk->rn", x_RK.float(), stacked[expert_R])


@pytest.mark.parametrize("dequantized", [False, True], ids=["nf4", "dequantized"])
@pytest.mark.parametrize(("parts", "rows", "columns"), [(1, 40, 64), (2, 32, 192)])
def test_rows_meet_the_matrices_of_their_expert(dtype, dequantized, parts, rows, columns):
    weight, routed = stack_of(len(COUNTS) * parts, rows, columns).bytes, routing(COUNTS, tokens=13)
    x = torch.randn(13, columns).to(dtype)
    out = nan(sum(COUNTS), parts * rows, dtype=dtype)
    grouped_gemm(x, held(weight, dequantized, dtype), routed.offsets_E, out, token_R=routed.token_R)
    assert_near(out, rowwise(x[routed.token_R], routed.expert_R, dense(weight, dtype), parts), RELATIVE[dtype])


@pytest.mark.parametrize("ranks", [(3,), (8, 17)], ids=["one part", "two parts of unequal rank"])
def test_low_rank_updates_reach_their_own_part_scaled(dtype, ranks):
    parts, rows, columns = len(ranks), 24, 64
    weight, routed = stack_of(len(COUNTS) * parts, rows, columns).bytes, routing(COUNTS, tokens=13)
    x = torch.randn(sum(COUNTS), columns).to(dtype)
    updates = [
        Update(torch.randn(sum(COUNTS), rank), torch.randn(len(COUNTS), rows, rank), part, 0.5 + part)
        for part, rank in enumerate(ranks)
    ]
    out = nan(sum(COUNTS), parts * rows)
    grouped_gemm(x, weight, routed.offsets_E, out, updates)
    expected = rowwise(x, routed.expert_R, dense(weight, dtype), parts).view(-1, parts, rows)
    for u in updates:
        expected[:, u.part] += u.scaling * torch.einsum("rp,rnp->rn", u.low_Rr, u.factor[routed.expert_R])
    # Beside 16-bit GEMMs the update keeps 16 bits of its own; here the sum is not rounded.
    assert_near(out, expected.flatten(1), 2e-6 if dtype == torch.float32 else 2e-5)


@pytest.mark.parametrize("dequantized", [False, True], ids=["nf4", "dequantized"])
def test_gate_and_the_routers_weight_are_applied_before_rounding(dtype, dequantized):
    rows, columns = 40, 128
    weight, routed = stack_of(len(COUNTS) * 2, rows, columns).bytes, routing(COUNTS, tokens=13)
    x, router_R = torch.randn(13, columns).to(dtype), torch.rand(sum(COUNTS))
    updates = [Update(torch.randn(sum(COUNTS), 4), torch.randn(len(COUNTS), rows, 4), part, 2.0) for part in (0, 1)]
    out = nan(sum(COUNTS), rows)
    grouped_gemm(
        x, held(weight, dequantized, dtype), routed.offsets_E, out, updates, routed.token_R, router_R, swiglu=True
    )
    both = rowwise(x[routed.token_R], routed.expert_R, dense(weight, dtype), 2).view(-1, 2, rows)
    for u in updates:
        both[:, u.part] += u.scaling * torch.einsum("rp,rnp->rn", u.low_Rr, u.factor[routed.expert_R])
    expected = torch.nn.functional.silu(both[:, 0]) * both[:, 1] * router_R[:, None]
    assert_near(out, expected, 3e-6 if dtype == torch.float32 else 2e-5)


@pytest.mark.parametrize("dequantized", [False, True], ids=["nf4", "dequantized"])
@pytest.mark.parametrize(("parts", "rows", "columns"), [(1, 40, 64), (2, 32, 192)])
def test_input_gradient_sums_over_all_parts(dtype, dequantized, parts, rows, columns):
    weight, routed = stack_of(len(COUNTS) * parts, rows, columns).bytes, routing(COUNTS, tokens=13)
    dy = torch.randn(13, parts * rows).to(dtype)
    out = nan(sum(COUNTS), columns, dtype=dtype)
    input_gradient(dy, held(weight, dequantized, dtype), routed.offsets_E, out, routed.token_R)
    stacked = dense(weight, dtype).float().view(-1, parts * rows, columns)
    expected = torch.einsum("rn,rnk->rk", dy[routed.token_R].float(), stacked[routed.expert_R])
    assert_near(out, expected, RELATIVE[dtype])
    start = torch.randn_like(expected)
    added = start.clone()
    input_gradient(dy, held(weight, dequantized, dtype), routed.offsets_E, added, routed.token_R, add=True)
    assert_near(added - start, expected, 2e-6)


def test_some_experts_leave_other_experts_rows_alone(dtype):
    weight, routed = stack_of(len(COUNTS), 32, 64).bytes, routing(COUNTS, tokens=13)
    x, chosen = torch.randn(sum(COUNTS), 64).to(dtype), slice(2, 4)
    here = (routed.expert_R >= 2) & (routed.expert_R < 4)
    weights = dense(weight, dtype)
    for each in (weight, Dequantized(weights[chosen], first=2)):
        out = nan(sum(COUNTS), 32)
        grouped_gemm(x, each, routed.offsets_E, out, experts=chosen)
        assert_near(out[here], rowwise(x, routed.expert_R, weights, 1)[here], 2e-6)
        assert out[~here].isnan().all()


def test_without_double_quantization_the_scales_are_taken_as_they_are(dtype):
    weight, routed = stack_of(len(COUNTS), 32, 128, double_quantization=False).bytes, routing(COUNTS, tokens=13)
    x, dy = torch.randn(sum(COUNTS), 128).to(dtype), torch.randn(sum(COUNTS), 32).to(dtype)
    out, dx = nan(sum(COUNTS), 32), nan(sum(COUNTS), 128)
    grouped_gemm(x, weight, routed.offsets_E, out)
    input_gradient(dy, weight, routed.offsets_E, dx)
    weights = dense(weight, dtype)
    assert_near(out, rowwise(x, routed.expert_R, weights, 1), 2e-6)
    assert_near(dx, torch.einsum("rn,rnk->rk", dy.float(), weights.float()[routed.expert_R]), 2e-6)


def test_no_rows_at_all_is_no_work():
    weight = stack_of(3, 32, 64).bytes
    out = nan(0, 32)
    grouped_gemm(torch.empty(0, 64), weight, torch.zeros(3, dtype=torch.int64), out)
    input_gradient(torch.empty(0, 32), weight, torch.zeros(3, dtype=torch.int64), nan(0, 64))


def test_stack_beyond_two_to_the_31_bytes_is_addressed():
    """Rows so far apart that the last expert lies beyond what 32 bits can number; only these rows are memory."""
    small, stride = stack_of(3, 16, 64), 2**26
    packed = torch.empty(3 * 16 * stride, dtype=torch.uint8).as_strided((3, 16, 32), (16 * stride, stride, 1))
    packed.copy_(small.packed)
    far = small.bytes._replace(packed=packed)
    routed = routing([0, 0, 5], tokens=5)
    x, dy = torch.randn(5, 64), torch.randn(5, 16)
    for weight in (small.bytes, far):
        out, dx = nan(5, 16), nan(5, 64)
        grouped_gemm(x, weight, routed.offsets_E, out)
        input_gradient(dy, weight, routed.offsets_E, dx)
        matrix = dense(small.bytes)[2]
        assert_near(out, x @ matrix.t(), 2e-6)
        assert_near(dx, dy @ matrix, 2e-6)


def test_dequantized_weights_of_other_experts_are_refused():
    weights = dense(stack_of(4, 16, 64).bytes)
    with pytest.raises(ValueError, match="dequantized weights begin at expert 0, rows at expert 1"):
        grouped_gemm(
            torch.empty(2, 64), Dequantized(weights), torch.tensor([1, 2, 2, 2]), nan(2, 16), experts=slice(1, 3)
        )


def test_sweep_offers_no_tile_whose_loop_would_run_over_and_a_gemm_refuses_one():
    target = Target("cuda", 90)
    for in_features, widths in ((192, {64}), (256, {64, 128})):
        for swiglu in (False, True):
            found = configs.candidates(target, configs.Gemm(torch.bfloat16, True, swiglu, False, 80, in_features))
            assert {config.BK for config in found} == widths
    weight = stack_of(2, 32, 192).bytes
    with configs.forced(configs.Config(16, 32, 128, 4, 1, 2)), pytest.raises(ValueError, match="128 input features"):
        grouped_gemm(torch.randn(2, 192), weight, torch.tensor([1, 2]), nan(2, 32))
