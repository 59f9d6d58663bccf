"""The whole expert layer against plain float32, forward and backward, on every route, in chunks and whole."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertune.kernels.dropout import dropout
from expertune.kernels.expert_mlp import Activation, LoraUpdate, dequant_gemm, expert_mlp, fused, plan
from expertune.kernels.lora import draw_seeds
from tests.kernels.expert_layers import FLOAT32, HALF, SHAPES, SWIGLU, Case, F, assert_same_as_plain, make_case
from tests.kernels.settings import SETTINGS


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_plain_arithmetic(route: str, shape: str) -> None:
    assert_same_as_plain(make_case(**SHAPES[shape]), FLOAT32)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products")
def test_half_precision_stays_within_its_rounding(route: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    coarsest = max((dtype, adapter_dtype), key=lambda kind: HALF.get(kind, {"atol": 0.0})["atol"])
    assert_same_as_plain(make_case(17, dtype=dtype, adapter_dtype=adapter_dtype), HALF[coarsest])


def test_intermediate_size_of_several_tiles_is_summed_whole(route: str) -> None:
    # 3 matrices of 1,088 x 1,024 float32 weights are 13 MiB, so that backward takes several tiles, the last one short.
    assert_same_as_plain(make_case(7, hidden=1024, intermediate=1088, num_experts=2), {"rtol": 1e-5, "atol": 1e-4})


@pytest.mark.parametrize("gained", [(), (0, 1, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_working_set_of_a_few_tokens_gives_the_same_layer(route: str, dropout: float, gained: tuple[int, ...]) -> None:
    case = make_case(37, dropout=dropout, gained=gained)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        out, _ = expert_mlp(*case)
        return [out, *torch.autograd.grad(out.square().sum(), case.leaves)]

    whole = run()
    SETTINGS.working_set_bytes = 2**16  # four tokens
    for one, other in zip(whole, run(), strict=True):
        size = max(float(one.detach().abs().max()), 1.0)
        torch.testing.assert_close(one / size, other / size, **FLOAT32)


def test_dropped_inputs_take_room_where_they_are_made(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computing = {"fused": fused, "dequant_gemm": dequant_gemm}[route]
    calls, forward = [], computing.forward
    monkeypatch.setattr(computing, "forward", lambda *given: calls.append(given) or forward(*given))
    SETTINGS.working_set_bytes = 2**16

    def chunks(dropout: float) -> int:
        calls.clear()
        expert_mlp(*make_case(37, dropout=dropout))
        return len(calls)

    whole = chunks(0.0)
    assert whole > 1
    assert (chunks(0.3) == whole) == (route == "fused")


@pytest.mark.parametrize("shape", ["a gate with limits", "an activation over whole rows", "biases, without a gate"])
def test_activation_by_autograd_computes_a_few_tokens_at_a_time(
    route: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, seen = SHAPES[shape], []

    def function(gate_up: Tensor) -> Tensor:
        seen.append(len(gate_up))
        return given["activation"].function(gate_up)

    monkeypatch.setattr(plan, "_ACTIVATED_BYTES", 4 * 4 * given.get("num_parts", 2) * F)
    case = make_case(**given | {"activation": Activation(function)})
    expert_mlp(*case)[0].sum().backward()
    # In forward and in backward each routed token once, or where something comes after the experts once more.
    assert max(seen) == 4
    assert sum(seen) in (2 * case.index.numel(), 3 * case.index.numel())
    assert_same_as_plain(make_case(**given | {"activation": Activation(function)}), FLOAT32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    num_experts, num_parts = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    return make_case(
        draw(st.integers(0, 12)),
        draw(st.integers(1, num_experts)),
        num_experts,
        ranks := draw(st.lists(st.tuples(st.integers(0, num_parts), st.integers(1, 9)), max_size=4)),
        gained=[part for part in range(3) if [each for each, _ in ranks].count(part) == 1 and draw(st.booleans())],
        activation=SWIGLU if num_parts == 2 else Activation(torch.tanh, columnwise=True),
        num_parts=num_parts,
        hidden=64 * draw(st.integers(1, 2)),
        intermediate=64 * draw(st.integers(1, 3)),
        double_quantization=draw(st.booleans()),
    )


@given(cases())
def test_any_routing_gives_the_plain_layer(case: Case) -> None:
    assert_same_as_plain(case, FLOAT32)


def test_router_weight_of_zero_still_has_its_gradient(route: str) -> None:
    case = make_case(9)
    with torch.no_grad():
        case.weights[::2] = 0
    assert_same_as_plain(case, FLOAT32)


def test_experts_without_tokens_get_zero_gradients_not_garbage(route: str) -> None:
    case = make_case(6, top_k=1, num_experts=5)
    case.index.fill_(2)
    out, _ = expert_mlp(*case)
    out.sum().backward()
    for update in case.updates:
        for factor in (update.a, update.b):
            assert factor.grad is not None
            assert not factor.grad[[0, 1, 3, 4]].any()
            assert factor.grad[2].any()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("products")
def test_two_runs_give_identical_bytes(route: str, dtype: torch.dtype, dropout: float) -> None:
    case = make_case(40, dtype=dtype, dropout=dropout)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        out, low_rank = expert_mlp(*case)
        return [out, *low_rank, *torch.autograd.grad(out.float().square().sum(), case.leaves)]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_dropout_is_the_same_in_backward_as_in_forward(route: str) -> None:
    case = make_case(11, dropout=0.4)
    case = case._replace(hidden=case.hidden.detach().double().float().requires_grad_())
    step = 1e-2 * torch.randn_like(case.updates[0].b)

    def run(updates: list[LoraUpdate]) -> Tensor:
        torch.manual_seed(5)
        return expert_mlp(*case._replace(updates=updates))[0].sum()

    # The layer is linear in B of gate times up's value only nearly, so that the step is small and taken both ways.
    first = case.updates[0]
    plus, minus = (
        run([replace(first, b=first.b.detach() + sign * step), *case.updates[1:]]).item() for sign in (0.5, -0.5)
    )
    (gradient,) = torch.autograd.grad(run(case.updates), [first.b])
    assert float((gradient * step).sum()) == pytest.approx(plus - minus, rel=2e-2)


def test_dropout_leaves_the_frozen_gemm_alone_and_keeps_the_mean(route: str) -> None:
    case = make_case(64, ranks=((2, 4),), dropout=0.5)
    with torch.no_grad():
        base, _ = expert_mlp(*case._replace(updates=[]))
        update = case.updates[0]
        full = expert_mlp(*case._replace(updates=[replace(update, dropout=0.0)]))[0] - base
        dropped = [expert_mlp(*case)[0] - base for _ in range(200)]
    assert not torch.equal(dropped[0], dropped[1])
    error = torch.stack(dropped).mean(dim=0) - full
    assert error.norm() < 0.15 * full.norm()


@pytest.mark.parametrize("biased", [False, True])
def test_gain_with_dropout_scales_what_the_dropped_input_gives_forward_and_backward(route: str, biased: bool) -> None:
    """As PEFT's DoRA: W x + (gain - 1) * W x' + gain * s * B A x', of x' the dropped input."""
    case = make_case(11, top_k=1, num_experts=1, dropout=0.4, gained=(0, 1, 2), biased=biased)
    torch.manual_seed(5)
    out, _ = expert_mlp(*case)
    torch.manual_seed(5)
    seeds = draw_seeds(case.updates, torch.device("cpu"))
    number_N = torch.arange(11)

    def project(x: Tensor, matrix: Tensor, part: int) -> Tensor:
        update = next(each for each in case.updates if each.part == part)
        kept = dropout(torch.ones_like(x), number_N, seeds[case.updates.index(update)], 0.4)
        low = (x * kept) @ update.a[0].t() @ update.b[0].t()
        assert update.gain is not None
        return x @ matrix.t() + (update.gain[0] - 1) * ((x * kept) @ matrix.t()) + update.gain[0] * update.scaling * low

    gate, up = (project(case.hidden, case.gate_up.dequantize(part, torch.float32), part) for part in range(2))
    gate_up = torch.cat([gate, up], dim=1) + (case.biases[0][0] if case.biases else 0.0)
    y = project(SWIGLU.function(gate_up), case.down.dequantize(0, torch.float32), 2)
    expected = case.weights * (y + (case.biases[1][0] if case.biases else 0.0))
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(out / size, expected / size, **FLOAT32)
    dout = torch.randn_like(out)
    gradients, plain = (torch.autograd.grad(each, case.leaves, dout) for each in (out, expected))
    for gradient, wanted in zip(gradients, plain, strict=True):
        size = max(float(wanted.abs().max()), 1.0)
        torch.testing.assert_close(gradient / size, wanted / size, **FLOAT32)


def test_layer_without_dropout_draws_nothing_from_the_generator(route: str) -> None:
    case, state = make_case(5), torch.get_rng_state()
    expert_mlp(*case)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gained", [(), (0, 2)], ids=["plain", "gains"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_updates_of_some_experts_are_those_with_zeros_for_the_others(
    route: str, dropout: float, gained: tuple[int, ...]
) -> None:
    case = make_case(23, num_experts=5, dropout=dropout, experts=((4, 1), (0, 2, 3), (3,)), gained=gained)
    whole = case._replace(updates=[update.of_all() for update in case.updates])

    def run(of: Case) -> list[Tensor]:
        torch.manual_seed(2)
        out, _ = expert_mlp(*of)
        return [out, *torch.autograd.grad(out.square().sum(), case.leaves)]

    for one, other in zip(run(case), run(whole), strict=True):
        size = max(float(one.detach().abs().max()), 1.0)
        torch.testing.assert_close(one / size, other / size, **FLOAT32)
