"""The whole expert layer against plain float32, forward and backward, on every route, in chunks and whole."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.kernels.expert_mlp import Activation, ExpertLayer, LoraUpdate, expert_mlp, reference
from expertune.kernels.expert_mlp.plan import Chunk, combine, sort_by_expert
from expertune.kernels.lora import pack
from expertune.kernels.nf4 import Nf4Stack
from tests.kernels.settings import SETTINGS

FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}
# W, the activations and each GEMM are rounded to 16 bits on the way; see tests/kernels/test_linear.py.
HALF = {torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5}, torch.float16: {"rtol": 2**-8, "atol": 2**-8}}

D, F = 128, 192


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped_gate(gate_up: Tensor) -> Tensor:
    """Limits and a shift, as some families have them."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


def normed_gate(gate_up: Tensor) -> Tensor:
    """Not columnwise: each element depends on the whole row."""
    inner = swiglu(gate_up)
    return inner / (1 + inner.square().mean(dim=-1, keepdim=True))


def norm(rows: Tensor) -> Tensor:
    """After an expert: over the whole row."""
    return torch.nn.functional.rms_norm(rows, rows.shape[-1:]) * 0.7


SWIGLU = Activation(swiglu, columnwise=True, swiglu=True)


class Case(NamedTuple):
    """A layer with its leaves: hidden, the router's weights, and the updates' factors want gradients."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Nf4Stack
    down: Nf4Stack
    layer: ExpertLayer
    updates: list[LoraUpdate]
    replay: Sequence[Tensor] = ()
    biases: tuple[Tensor, Tensor] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weights, *(factor for update in self.updates for factor in (update.a, update.b))]


def stack_of(num_matrices: int, rows: int, columns: int, double_quantization: bool = True) -> Nf4Stack:
    stack = Nf4Stack(num_matrices, rows, columns, double_quantization)
    for index in range(num_matrices):
        stack.write(index, torch.randn(rows, columns) / columns**0.5)
    return stack


def make_case(
    tokens: int,
    top_k: int = 2,
    num_experts: int = 4,
    ranks: Sequence[tuple[int, int]] = ((0, 8), (1, 8), (2, 8)),
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    activation: Activation = SWIGLU,
    num_parts: int = 2,
    hidden: int = D,
    intermediate: int = F,
    double_quantization: bool = True,
    dropout: float = 0.0,
    biased: bool = False,
) -> Case:
    """A case with random values; `ranks` lists (part, rank) of each update."""
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)]) if tokens else None
    updates = []
    for u, (part, rank) in enumerate(ranks):
        width, height = (intermediate, hidden) if part == num_parts else (hidden, intermediate)
        a = (torch.randn(num_experts, rank, width) / width**0.5).to(adapter_dtype).requires_grad_()
        b = (torch.randn(num_experts, height, rank) / rank**0.5).to(adapter_dtype).requires_grad_()
        updates.append(LoraUpdate(part, a, b, scaling=0.5 + u / 4, dropout=dropout))
    return Case(
        torch.randn(tokens, hidden).to(dtype).requires_grad_(),
        torch.empty(0, top_k, dtype=torch.int64) if index is None else index,
        torch.rand(tokens, top_k).to(dtype).requires_grad_(),
        stack_of(num_experts * num_parts, intermediate, hidden, double_quantization),
        stack_of(num_experts, hidden, intermediate, double_quantization),
        ExpertLayer(activation, settings=SETTINGS),
        updates,
        biases=(torch.randn(num_experts, num_parts * intermediate), torch.randn(num_experts, hidden))
        if biased
        else None,
    )


def assert_same_as_plain(case: Case, tolerance: dict[str, float]) -> None:
    """Output and the gradient of every leaf agree with plain float32 arithmetic."""
    out, _ = expert_mlp(*case)
    expected = reference.expert_mlp(*case[:5], case.layer.activation, case.updates, case.biases)
    assert out.dtype == case.hidden.dtype
    # The error of a sum grows with the sum, and its order is the CPU's: scale the tolerance to the largest value.
    size = max(float(expected.detach().abs().max()), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(out.float() / size, expected / size, **tolerance)
    dout = torch.randn_like(expected).to(out.dtype)
    gradients = torch.autograd.grad(out, case.leaves, dout)
    plain = torch.autograd.grad(expected, case.leaves, dout.float(), allow_unused=True)
    for gradient, wanted, leaf in zip(gradients, plain, case.leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        # Likewise: to the largest gradient of the leaf.
        size = max(float(wanted.abs().max()), 1.0) if wanted.numel() else 1.0
        torch.testing.assert_close(gradient.float() / size, wanted.float() / size, **tolerance)


SHAPES: dict[str, dict[str, Any]] = {
    "rows that are a multiple of nothing": {"tokens": 23, "num_experts": 3},
    "one token": {"tokens": 1},
    "one choice": {"tokens": 9, "top_k": 1},
    "every expert chosen": {"tokens": 5, "top_k": 4},
    "most experts without tokens": {"tokens": 3, "num_experts": 16},
    "one expert": {"tokens": 9, "top_k": 1, "num_experts": 1},
    "no update": {"tokens": 9, "ranks": ()},
    "down alone": {"tokens": 9, "ranks": ((2, 4),)},
    "gate alone, rank 1": {"tokens": 9, "ranks": ((0, 1),)},
    "ranks that are a multiple of nothing": {"tokens": 9, "ranks": ((0, 3), (1, 17), (2, 5))},
    "two adapters": {"tokens": 9, "ranks": ((0, 4), (1, 4), (2, 4), (0, 2), (2, 7))},
    "experts without a gate": {
        "tokens": 9,
        "num_parts": 1,
        "ranks": ((0, 4), (1, 6)),
        "activation": Activation(torch.nn.functional.gelu, columnwise=True),
    },
    "a gate with limits": {"tokens": 9, "activation": Activation(clamped_gate, columnwise=True)},
    "SwiGLU by autograd": {"tokens": 9, "activation": Activation(swiglu, columnwise=True)},
    "an activation over whole rows": {"tokens": 9, "activation": Activation(normed_gate)},
    "biases": {"tokens": 9, "biased": True},
    "biases, SwiGLU by autograd": {"tokens": 9, "biased": True, "activation": Activation(swiglu, columnwise=True)},
    "biases, limits and experts without tokens": {
        "tokens": 3,
        "num_experts": 16,
        "biased": True,
        "activation": Activation(clamped_gate, columnwise=True),
    },
    "biases, without a gate": {
        "tokens": 9,
        "num_parts": 1,
        "ranks": ((0, 4), (1, 6)),
        "biased": True,
        "activation": Activation(torch.nn.functional.gelu, columnwise=True),
    },
    "a norm after each expert": {"tokens": 9, "activation": Activation(swiglu, True, True, after=norm)},
    "a norm after each expert, with biases": {
        "tokens": 9,
        "biased": True,
        "activation": Activation(swiglu, columnwise=True, swiglu=True, after=norm),
    },
    "no double quantization": {"tokens": 9, "double_quantization": False},
    "more rows than a panel of the fused route holds": {"tokens": 900, "num_experts": 2, "top_k": 1},
}


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_working_set_of_a_few_tokens_gives_the_same_layer(route: str, dropout: float) -> None:
    case = make_case(37, dropout=dropout)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        out, _ = expert_mlp(*case)
        return [out, *torch.autograd.grad(out.square().sum(), case.leaves)]

    whole = run()
    SETTINGS.working_set_bytes = 2**16  # four tokens
    for one, other in zip(whole, run(), strict=True):
        size = max(float(one.detach().abs().max()), 1.0)
        torch.testing.assert_close(one / size, other / size, **FLOAT32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    num_experts, num_parts = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    return make_case(
        draw(st.integers(0, 12)),
        draw(st.integers(1, num_experts)),
        num_experts,
        draw(st.lists(st.tuples(st.integers(0, num_parts), st.integers(1, 9)), max_size=4)),
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


def test_replay_returns_what_was_computed_and_gives_the_same_gradients(route: str) -> None:
    case = make_case(12, dropout=0.1)
    torch.manual_seed(7)
    out, low_rank = expert_mlp(*case)
    expected = torch.autograd.grad(out.square().sum(), case.leaves)
    torch.manual_seed(7)
    replayed, again = expert_mlp(*case._replace(replay=[out.detach(), *(tensor.detach() for tensor in low_rank)]))
    assert torch.equal(replayed, out)
    for one, other in zip(again, low_rank, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(torch.autograd.grad(replayed.square().sum(), case.leaves), expected, strict=True):
        assert torch.equal(one, other)


def test_activation_checkpointing_gives_the_same_gradients(route: str) -> None:
    case = make_case(12, dropout=0.2)

    def block(hidden: Tensor) -> Tensor:
        return expert_mlp(torch.tanh(hidden), *case[1:])[0].square()

    torch.manual_seed(1)
    plain = torch.autograd.grad(block(case.hidden).sum(), case.leaves)
    torch.manual_seed(1)
    recomputed = torch.autograd.grad(checkpoint(block, case.hidden, use_reentrant=False).sum(), case.leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_compiled_layer_is_one_graph_with_the_same_gradients(route: str) -> None:
    case = make_case(7, dropout=0.2)

    def block(hidden: Tensor) -> Tensor:
        return expert_mlp(torch.tanh(hidden), *case[1:])[0].square()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for run in (block, compiled):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(run(case.hidden).sum(), case.leaves))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_operator_fulfils_torchs_contract_for_custom_operators(route: str) -> None:
    case = make_case(5, ranks=((0, 4), (2, 3)))
    torch.library.opcheck(
        torch.ops.expertune.expert_mlp.default,
        (
            case.hidden,
            case.index,
            case.weights,
            [*case.gate_up.bytes, *case.down.bytes],
            case.layer.name,
            *pack(case.updates, torch.zeros(2, dtype=torch.int64)),
            [],
            True,
        ),
    )


def test_copy_of_a_layer_is_found_under_its_own_name() -> None:
    case = make_case(5)
    copied = copy.deepcopy(case.layer)
    assert copied.name != case.layer.name
    assert torch.equal(expert_mlp(*case)[0], expert_mlp(*case._replace(layer=copied))[0])


def test_name_of_a_layer_is_free_again_when_the_layer_is_gone() -> None:
    first = ExpertLayer(SWIGLU, "a layer")
    second = ExpertLayer(SWIGLU, "a layer")
    assert (first.name, second.name) == ("a layer", "a layer#2")
    del first
    assert ExpertLayer(SWIGLU, "a layer").name == "a layer"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of another width": ({"hidden": torch.randn(6, 64)}, r"hidden must be \[tokens, 128\], got \(6, 64\)"),
    "hidden of another dtype": ({"hidden": torch.randn(6, 128).double()}, "got torch.float64"),
    "index of another dtype": ({"index": torch.zeros(6, 2).int()}, r"top_k_index must be int64 \[6, k\]"),
    "index of other tokens": ({"index": torch.zeros(5, 2).long()}, r"got torch.int64 \(5, 2\)"),
    "weights of another shape": ({"weights": torch.rand(6, 3)}, r"top_k_weights must be floating point \(6, 2\)"),
    "down of another shape": ({"down": Nf4Stack(4, 64, 192)}, r"down must be matrices \(128, 192\), got \(64, 192\)"),
    "experts that do not share out": ({"down": Nf4Stack(3, 128, 192)}, "8 matrices cannot be shared out to 3 experts"),
    "a bias of another width": (
        {"biases": (torch.randn(4, 192), torch.randn(4, 128))},
        r"the bias of gate_up must be floating point \(4, 384\)",
    ),
    "weights elsewhere": ({"gate_up": Nf4Stack(8, 192, 128, device="meta")}, "gate_up is on meta, hidden is on cpu"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    changes, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        expert_mlp(*make_case(6)._replace(**changes))


WRONG_UPDATES: dict[str, tuple[dict[str, Any], str]] = {
    "a part too many": ({"part": 3}, "part must be from 0 to 2, got 3"),
    "A of down's width on gate": ({"a": torch.randn(4, 8, 192)}, r"A must be \[4, r, 128\], got \(4, 8, 192\)"),
    "B transposed": ({"b": torch.randn(4, 8, 192)}, r"B must be \[4, 192, 8\], got \(4, 8, 192\)"),
    "factors of two dtypes": ({"b": torch.randn(4, 192, 8).half()}, "B is torch.float16, A is torch.float32"),
    "everything dropped": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "factors elsewhere": ({"a": torch.empty(4, 8, 128, device="meta")}, "A is on meta, hidden is on cpu"),
}


@pytest.mark.parametrize("wrong", WRONG_UPDATES)
def test_updates_that_do_not_fit_are_refused_with_what_was_received(wrong: str) -> None:
    case = make_case(6)
    changes, message = WRONG_UPDATES[wrong]
    with pytest.raises(ValueError, match=message):
        expert_mlp(*case._replace(updates=[replace(case.updates[0], **changes)]))


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Experts of each token [T, K], no expert twice for one token, and E."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=12))
    return torch.tensor([token[:top_k] for token in tokens]), num_experts


@given(choices(), st.integers(0, 100))
def test_sorted_tokens_are_grouped_by_expert_and_keep_their_order_inside(case: tuple[Tensor, int], first: int) -> None:
    index, num_experts = case
    weights = torch.rand(index.shape)
    routed = sort_by_expert(Chunk(weights, index, weights, first), num_experts)
    flat = index.flatten().tolist()
    by_expert = [row for expert in range(num_experts) for row in range(len(flat)) if flat[row] == expert]
    assert routed.number_R.tolist() == [first + row for row in by_expert]
    assert routed.token_R.tolist() == [row // index.shape[1] for row in by_expert]
    assert torch.equal(routed.weight_R, weights.flatten()[by_expert])
    assert routed.offsets_E.tolist() == [sum(chosen <= expert for chosen in flat) for expert in range(num_experts)]


@given(choices())
def test_combine_sums_what_each_tokens_experts_gave(case: tuple[Tensor, int]) -> None:
    index, num_experts = case
    weights = torch.ones(index.shape)
    routed = sort_by_expert(Chunk(weights, index, weights), num_experts)
    values = torch.randn(index.shape[0], index.shape[1], 3)
    combined = combine(values.flatten(0, 1)[routed.number_R], routed.inverse_R, index.shape[0])
    torch.testing.assert_close(combined, values.sum(dim=1))


def test_layer_without_dropout_draws_nothing_from_the_generator(route: str) -> None:
    case, state = make_case(5), torch.get_rng_state()
    expert_mlp(*case)
    assert torch.equal(torch.get_rng_state(), state)
