"""Few tokens of an answer: the native library's one call against plain arithmetic."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.kernels import native, workspace
from expertune.kernels.expert_mlp import Activation, expert_mlp, few_tokens, operator, reference
from expertune.kernels.few_tokens import FEW, FEW_BY_AVX2, Linear, answering, dense, few, once, serves, serves_dense
from expertune.kernels.native.gemv import MOST_DENSE, MOST_ROUTED, Product, dense_gemv, gemv
from expertune.kernels.nf4 import Nf4Stack
from expertune.kernels.routes import KernelSettings
from tests.kernels.expert_layers import SHAPES, SWIGLU, Case, clamped_gate, make_case

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library could not be built here")

# Weights keep 15 bits below the largest of a block, and x 14 below the largest of its: of a sum without its signs.
CLOSE = 2**-12
# With 7 bits of what rounding left of each, of numbers that are rounded to 7 bits too.
FINE = 2**-19
# Once more for the values between two GEMMs, and an output that is rounded to bfloat16 or float16.
ROUNDED = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-17}

KINDS = ("double", "plain", "mxfp4")


def stack_of(num_matrices: int, rows: int, columns: int, kind: str = "double") -> Nf4Stack:
    if kind == "mxfp4":
        stack = Nf4Stack(num_matrices, rows, columns, scheme="mxfp4")
        stack.packed.random_(0, 256)
        stack.absmax.random_(118, 124)
        return stack
    stack = Nf4Stack(num_matrices, rows, columns, double_quantization=kind == "double")
    for index in range(num_matrices):
        stack.write(index, torch.randn(rows, columns) / columns**0.5)
    return stack


def off_by(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize(
    ("avx512", "fine"),
    [(True, False), (False, False), (True, True)],
    ids=["AVX-512 where there is one", "AVX2", "fine"],
)
@pytest.mark.parametrize("kind", KINDS)
# Blocks in odd numbers, rows that are a multiple of nothing, more tokens than share a look-up, scales that begin anew
# within 16 blocks, and rows longer than the stretch of blocks whose factors are computed together.
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, 40, 128), (1, 9, 1088), (1, 5, 8512), (3, 33, 192), (9, 7, 64), (5, 70, 1216), (18, 35, 1024)],
)
def test_product_is_that_of_plain_arithmetic(
    avx512: bool, fine: bool, kind: str, tokens: int, rows: int, columns: int
) -> None:
    weight, x, y = stack_of(1, rows, columns, kind), torch.randn(tokens, columns), torch.empty(tokens, rows)
    x[0] *= 1e4  # a token on a scale of its own
    gemv([Product(weight.bytes, x, y)], tokens, avx512=avx512, fine=fine)
    w = weight.dequantize(0, torch.float32).double()
    assert ((y - x.double() @ w.t()).abs() < (FINE if fine else CLOSE) * (x.double().abs() @ w.abs().t())).all()


@pytest.mark.parametrize("dtype", ROUNDED)
def test_linear_of_few_tokens_is_the_plain_one_up_to_rounding(dtype: torch.dtype) -> None:
    weight, settings = stack_of(1, 72, 320), KernelSettings(name="few tokens")
    x = torch.randn(FEW, 640).to(dtype)[:, :320]
    linear = Linear(weight.bytes, dtype, settings)
    with torch.inference_mode(), answering():
        assert linear.takes(x)
        y = linear(x)
    assert (y.dtype, settings.ran) == (dtype, {"fused": 1})
    assert off_by(y, x.float() @ weight.dequantize(0, torch.float32).t()) < ROUNDED[dtype]


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_last_block_of_a_long_row_counts_as_exactly_as_others(kind: str, fine: bool) -> None:
    weight, x, y = stack_of(1, 9, 8256, kind), torch.zeros(1, 8256), torch.empty(1, 9)
    x[:, -64:] = torch.randn(64)
    gemv([Product(weight.bytes, x, y)], 1, fine=fine)
    w = weight.dequantize(0, torch.float32).double()
    assert ((y - x.double() @ w.t()).abs() < (FINE if fine else CLOSE) * (x.double().abs() @ w.abs().t())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_in_16_bits_is_that_in_float32_rounded_once(dtype: torch.dtype) -> None:
    weight, x = stack_of(1, 72, 320), torch.randn(3, 320).to(dtype)
    outs = torch.empty(3, 72), torch.empty(3, 72, dtype=dtype)
    for y in outs:
        gemv([Product(weight.bytes, x, y)], 3)
    assert torch.equal(outs[1], outs[0].to(dtype))


def run_few(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, int]:
    """What the layer gives while an answer is written, and how often few tokens' way was taken."""
    calls: list[Any] = []
    forward = few_tokens.forward
    monkeypatch.setattr(operator.few_tokens, "forward", lambda *given: calls.append(given) or forward(*given))
    with torch.no_grad(), answering():
        out, _ = expert_mlp(*case)
    return out, len(calls)


FEW_SHAPES = {name: shape | {"tokens": min(shape["tokens"], FEW)} for name, shape in SHAPES.items()}
ELSEWHERE = ("gain", "norm after")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FEW_SHAPES)
def test_expert_layer_of_few_tokens_is_the_plain_one(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(**FEW_SHAPES[name], dtype=dtype)
    out, calls = run_few(case, monkeypatch)
    assert calls == (not any(word in name for word in ELSEWHERE))
    expected = reference.expert_mlp(*case[:5], case.layer.activation, case.updates, case.biases)
    # What goes elsewhere in bfloat16 is rounded to it on its way.
    assert off_by(out, expected.detach()) < (2**-4 if dtype == torch.bfloat16 and not calls else ROUNDED[dtype])


@pytest.mark.parametrize("activation", [SWIGLU, Activation(clamped_gate, columnwise=True)], ids=["swiglu", "limits"])
def test_experts_in_mxfp4_are_the_plain_ones(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(1, num_experts=8, biased=True, dtype=torch.float16, activation=activation)
    held = case.gate_up, case.down
    stacks = [stack_of(each.num_matrices, each.out_features, each.in_features, "mxfp4") for each in held]
    case = case._replace(gate_up=stacks[0], down=stacks[1])
    out, calls = run_few(case, monkeypatch)
    assert calls == 1
    expected = reference.expert_mlp(*case[:5], activation, case.updates, case.biases)
    assert off_by(out, expected.detach()) < ROUNDED[torch.float16]


def test_autocast_does_not_round_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = torch.randn(192, 192) / 192**0.5
    activation = Activation(lambda gate_up: clamped_gate(gate_up) @ mixing)
    case = make_case(2, dtype=torch.bfloat16, activation=activation)
    expected, _ = run_few(case, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, calls = run_few(case, monkeypatch)
    assert calls == 1
    assert torch.equal(out, expected)


def test_number_of_threads_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(5, dtype=torch.bfloat16, hidden=512, intermediate=768, biased=True)
    outs = []
    for threads in (1, *[2] * 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outs.append(run_few(case, monkeypatch)[0])
        for memory in workspace.of_this_thread().values():
            memory.fill_(float("nan"))  # a thread that is ahead of the others must not find the last turn's numbers
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_small_numbers_beside_an_outlier_are_off_by_its_rounding_and_not_more() -> None:
    weight, x, y = stack_of(1, 40, 128), torch.full((1, 128), 0.5), torch.empty(1, 40)
    x[0, 3] = 2000.0  # of the first block of 64
    gemv([Product(weight.bytes, x, y)], 1)
    w = weight.dequantize(0, torch.float32).double()
    off = (y - x.double() @ w.t()).abs()
    # Each number of a block is rounded to 1/32766 of its largest, weights to 1/32768 of theirs.
    weights = w.abs().view(40, 2, 64)
    of_x = weights.sum(dim=2) @ (torch.tensor([2000.0, 0.5]).double() / 32766)
    of_w = weights.amax(dim=2) @ torch.tensor([2000.0 + 63 * 0.5, 64 * 0.5]).double() / 32768
    assert (off < 1.02 * (of_x + of_w)).all()
    # A block without one is as exact as ever.
    x[0, 3] = 0.5
    gemv([Product(weight.bytes, x, y)], 1)
    assert ((y - x.double() @ w.t()).abs() < CLOSE * (x.double() @ w.abs().t())).all()


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize(("kind", "codes"), [("plain", (0xFF, 0x00)), ("mxfp4", (0x77, 0xFF))])
def test_largest_sums_that_are_possible_do_not_overflow(kind: str, codes: tuple[int, int], fine: bool) -> None:
    x = torch.ones(4, 192)
    x[2] = 100.5  # between two integers, where the largest is
    x[2, ::64] = 16128.0
    x[1::2] = -x[::2]
    for code in codes:  # the largest value of the codebook, and the most negative one
        weight = stack_of(1, 9, 192, kind)
        weight.packed.fill_(code)
        weight.absmax.fill_(127 if kind == "mxfp4" else 1.0)
        w = weight.dequantize(0, torch.float32).double()
        expected, most = x.double() @ w.t(), x.abs().amax(1, keepdim=True) @ w.abs().sum(1)[None].float()
        for some in (slice(0, 4), *(slice(token, token + 1) for token in range(4))):
            y = torch.empty_like(expected[some], dtype=torch.float32)
            gemv([Product(weight.bytes, x[some], y)], len(y), fine=fine)
            assert ((y - expected[some]).abs() < (2**-19 if fine else 2**-14) * most[some]).all()


@pytest.mark.parametrize("fine", [False, True])
def test_zeros_give_zeros_and_numbers_too_small_to_scale_vanish(fine: bool) -> None:
    weight, x, y = stack_of(1, 8, 192), torch.zeros(3, 192), torch.full((3, 8), float("nan"))
    x[1] = 1e-40  # below the least normal float32
    x[2, :64], x[2, 64:] = 1e-36, torch.randn(128)
    gemv([Product(weight.bytes, x, y)], 3, fine=fine)
    assert not y[:2].any()
    assert off_by(y[2], x[2] @ weight.dequantize(0, torch.float32).t()) < CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_16_bits_and_hidden_that_is_a_view_give_the_plain_layer(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(3, dtype=torch.bfloat16)
    wide = torch.empty(3, 2 * case.hidden.shape[1], dtype=torch.bfloat16)
    wide[:, ::2] = case.hidden.detach()
    updates = [
        dataclasses.replace(each, a=each.a.detach().to(dtype), b=each.b.detach().to(dtype)) for each in case.updates
    ]
    case = case._replace(hidden=wide[:, ::2], updates=updates)
    assert not case.hidden.is_contiguous()
    out, calls = run_few(case, monkeypatch)
    assert calls == 1
    exact = [dataclasses.replace(each, a=each.a.float(), b=each.b.float()) for each in updates]
    expected = reference.expert_mlp(*case[:5], case.layer.activation, exact, case.biases)
    assert off_by(out, expected.detach()) < ROUNDED[torch.bfloat16]


def test_more_routed_tokens_than_a_call_has_go_elsewhere() -> None:
    settings = KernelSettings()
    x = torch.empty(1, 64, dtype=torch.bfloat16)
    with torch.no_grad(), answering():
        served = [serves(x, routed, 1000, settings) for routed in (MOST_ROUTED, MOST_ROUTED + 1)]
    assert served == [True, False]
    weight = stack_of(1, 8, 64)
    for routed in (0, MOST_ROUTED + 1):
        with pytest.raises(ValueError, match=f"1 to 256 routed tokens, got {routed}"):
            gemv([Product(weight.bytes, torch.randn(routed, 64), torch.empty(routed, 8))], routed)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_matrix_is_multiplied_as_by_torch(dtype: torch.dtype, tokens: int) -> None:
    x, weight = torch.randn(tokens, 1, 100).to(dtype), torch.randn(70, 108).to(dtype)[:, :100]
    y = dense(x, weight)
    assert (y.dtype, y.shape) == (dtype, (tokens, 1, 70))
    assert off_by(y, x.double() @ weight.double().t()) < ROUNDED[dtype]


@pytest.mark.parametrize("tokens", [0, MOST_DENSE + 1])
def test_more_tokens_than_a_dense_product_takes_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 4 tokens, got {tokens}"):
        dense_gemv(torch.randn(tokens, 64), torch.randn(8, 64), torch.empty(tokens, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_matrix_is_multiplied_here_where_torch_is_slow(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(5, 1, 96).to(dtype), torch.randn(70, 96).to(dtype)
    monkeypatch.setattr("expertune.kernels.few_tokens.cpu_instruction_sets", lambda: ("avx2", "fma3"))
    with torch.no_grad():
        assert not serves_dense(x, weight)  # no answer is being written
        with answering():
            served = [serves_dense(some, weight) for some in (x, x[:1], x.half(), x.expand(5, 100, 96))]
    assert served == [True, True, False, False]


def test_more_tokens_on_a_cpu_whose_grouped_products_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def having(*names: str) -> list[int]:
        for module in ("few_tokens", "cpu"):
            monkeypatch.setattr(f"expertune.kernels.{module}.cpu_instruction_sets", lambda: names)
        return [few(dtype) for dtype in (torch.bfloat16, torch.float32)]

    assert having("avx2") == [FEW_BY_AVX2, FEW_BY_AVX2]
    assert having("avx2", "avx512_f") == [FEW_BY_AVX2, FEW]
    assert having("avx2", "avx512_f", "avx512_bf16") == [FEW, FEW]


def test_what_is_made_of_weights_is_made_once_an_answer() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    assert [once("weight", make), once("weight", make)] == [0, 1]  # no answer is being written
    for expected in (2, 3):
        with answering():
            assert [once("weight", make), once("weight", make)] == [expected] * 2


def test_weights_that_change_between_answers_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, dtype=torch.float32)
    first, _ = run_few(case, monkeypatch)
    weight = Nf4Stack(case.gate_up.num_matrices, case.gate_up.out_features, case.gate_up.in_features)
    for index in range(weight.num_matrices):
        weight.write(index, -case.gate_up.dequantize(index, torch.float32))
    case = case._replace(gate_up=weight)
    second, _ = run_few(case, monkeypatch)
    expected = reference.expert_mlp(*case[:5], case.layer.activation, case.updates, case.biases)
    assert off_by(second, expected.detach()) < ROUNDED[torch.float32] < off_by(first, expected.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_gives_no_number(bad: float) -> None:
    weight, x, y = stack_of(1, 8, 192), torch.randn(2, 192), torch.empty(2, 8)
    x[1, 70] = bad
    gemv([Product(weight.bytes, x, y)], 2)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_training_and_a_route_that_was_asked_for_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, dtype=torch.bfloat16)
    monkeypatch.setattr(operator.few_tokens, "forward", None)
    with answering():
        expert_mlp(*case)  # a gradient may be wanted
    with torch.no_grad():
        expert_mlp(*case)  # a reference's forward is compared with training's
    with torch.no_grad(), answering():
        case.layer.settings.route = "dequant_gemm"
        expert_mlp(*case)
        case.layer.settings.route = "auto"
    many = dataclasses.replace(case.updates[0], dropout=0.5)
    with torch.no_grad(), answering():
        expert_mlp(*case._replace(updates=[many]))
