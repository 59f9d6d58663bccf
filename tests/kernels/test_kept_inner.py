"""A layer that keeps what its first GEMM gave: the gradients of one that computes it again, without that GEMM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from expertune.kernels.amounts import kept_bytes_per_routed_token
from expertune.kernels.expert_mlp import Activation, dequant_gemm, expert_mlp, fused, operator
from tests.kernels.expert_layers import FLOAT32, HALF, SHAPES, Case, F, assert_same_as_plain, clamped_gate, make_case
from tests.kernels.settings import SETTINGS
from tests.kernels.test_mxfp4 import random_stack


def run(case: Case, keeps: bool, checkpointed: bool = False) -> list[Tensor]:
    """Output and gradients."""
    case.layer.keeps = keeps

    def layer(hidden: Tensor) -> Tensor:
        return expert_mlp(torch.tanh(hidden), *case[1:])[0]

    torch.manual_seed(11)
    out = checkpoint(layer, case.hidden, use_reentrant=False) if checkpointed else layer(case.hidden)
    dout = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, case.leaves, dout)]


def kept_by(out: Tensor) -> Tensor | None:
    """What the node of a layer's output keeps."""
    kept: Tensor | None = out.grad_fn.kept if out.grad_fn else None  # type: ignore[attr-defined]
    return kept


def assert_same(route: str, kept: list[Tensor], recomputed: list[Tensor]) -> None:
    """To the bit where both are the same GEMM; tiles of weights are other GEMMs than a whole matrix."""
    for one, other in zip(kept, recomputed, strict=True):
        if route == "fused":
            assert torch.equal(one, other)
        else:
            size = max(float(other.abs().max()), 1.0) if other.numel() else 1.0
            torch.testing.assert_close(one / size, other / size, **FLOAT32)


@contextmanager
def first_gemms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where the first GEMM is computed, one entry for each time, while open."""
    computed: list[str] = []

    def counted(function: Any, name: str) -> Any:
        return lambda *given, **named: computed.append(name) or function(*given, **named)

    with monkeypatch.context() as patch:
        for module, name in ((fused, "_multiply_gate_up"), (dequant_gemm, "_gate_up"), (dequant_gemm, "_add_inner")):
            patch.setattr(module, name, counted(getattr(module, name), name))
        yield computed


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_a_layer_that_computes_again(route: str, shape: str) -> None:
    case = make_case(**SHAPES[shape])
    assert_same(route, run(case, True), run(case, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["biases, without a gate", "most experts without tokens"])
def test_what_is_kept_is_as_large_as_a_plan_says(route: str, shape: str, dtype: torch.dtype) -> None:
    case = make_case(**SHAPES[shape], dtype=dtype)
    case.layer.keeps = True
    kept = kept_by(expert_mlp(*case)[0])
    assert kept is not None
    num_parts = case.gate_up.num_matrices // case.down.num_matrices
    assert kept.nbytes == case.index.numel() * kept_bytes_per_routed_token(F, num_parts, dtype)


@pytest.mark.parametrize("shape", ["rows that are a multiple of nothing", "a norm after each expert, with biases"])
def test_a_layer_that_keeps_is_the_plain_layer(route: str, shape: str) -> None:
    case = make_case(**SHAPES[shape])
    case.layer.keeps = True
    assert_same_as_plain(case, FLOAT32)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_same_in_chunks_of_tokens(route: str, dropout: float, checkpointed: bool) -> None:
    SETTINGS.working_set_bytes = 2**16
    case = make_case(37, dropout=dropout)
    assert_same(route, run(case, True, checkpointed), run(case, False, checkpointed))


@pytest.mark.parametrize("activation", [None, Activation(clamped_gate, columnwise=True)], ids=["swiglu", "limits"])
def test_gradients_over_published_blocks_with_biases_are_the_same(route: str, activation: Activation | None) -> None:
    case = make_case(23, biased=True, **({"activation": activation} if activation else {}))
    experts = case.down.num_matrices
    case = case._replace(gate_up=random_stack(2 * experts, 192, 128), down=random_stack(experts, 128, 192))
    assert_same(route, run(case, True), run(case, False))


def test_intermediate_size_of_several_tiles_is_kept_whole(route: str) -> None:
    case = make_case(7, hidden=1024, intermediate=1088, num_experts=2)
    assert_same(route, run(case, True), run(case, False))


@pytest.mark.parametrize("shape", ["rows that are a multiple of nothing", "a norm after each expert", "biases"])
def test_backward_computes_no_first_gemm_again(route: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(**SHAPES[shape])
    for keeps in (True, False):
        case.layer.keeps = keeps
        out, _ = expert_mlp(*case)
        with first_gemms(monkeypatch) as computed:
            out.sum().backward()
        assert (not computed) == keeps


@pytest.mark.usefixtures("products")
def test_in_bfloat16_the_output_is_the_same_and_gradients_stay_within_rounding(route: str) -> None:
    case = make_case(17, dtype=torch.bfloat16)
    assert torch.equal(run(case, True)[0], run(case, False)[0])
    case.layer.keeps = True
    assert_same_as_plain(case, HALF[torch.bfloat16])


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [({}, True), ({"dtype": torch.float16}, False), ({"gained": (2,)}, False)],
    ids=["plain", "float16", "gains"],
)
def test_layers_whose_numbers_cannot_be_kept_compute_again(route: str, changes: dict[str, Any], keeps: bool) -> None:
    case = make_case(9, **changes)
    case.layer.keeps = True
    assert (kept_by(expert_mlp(*case)[0]) is not None) == keeps


def test_nothing_is_made_to_be_kept_where_no_backward_follows(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = make_case(9), []
    case.layer.keeps = True
    monkeypatch.setattr(operator, "ask_for_huge_pages", lambda tensor: made.append(tensor.numel()) or tensor)
    with torch.no_grad():
        expert_mlp(*case)
    expert_mlp(*case)
    assert made == [0, case.index.numel() * 2 * F]


@pytest.mark.parametrize("activation", [None, Activation(clamped_gate, columnwise=True)], ids=["swiglu", "limits"])
def test_backward_leaves_what_is_kept_as_it_was(route: str, activation: Activation | None) -> None:
    case = make_case(9, **({"activation": activation} if activation else {}))
    case.layer.keeps = True
    out, _ = expert_mlp(*case)
    kept = kept_by(out)
    assert kept is not None
    before = kept.clone()
    torch.autograd.grad(out.square().sum(), case.leaves)
    assert torch.equal(kept, before)


def test_second_backward_of_a_graph_computes_what_was_kept_again(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(9, dropout=0.2)
    case.layer.keeps = True
    out, _ = expert_mlp(*case)
    gradients = []
    for again in (False, True):
        with first_gemms(monkeypatch) as computed:
            gradients.append(torch.autograd.grad(out.square().sum(), case.leaves, retain_graph=True))
        assert bool(computed) == again
    assert_same(route, *map(list, gradients))


def test_what_is_kept_is_free_when_backward_has_used_it_and_without_backward_too(route: str) -> None:
    case = make_case(12)
    case.layer.keeps = True
    hidden = torch.tanh(case.hidden)
    out, _ = expert_mlp(hidden, *case[1:])
    kept = StorageWeakRef(kept_by(out).untyped_storage())  # type: ignore[union-attr]
    freed: list[bool] = []
    hidden.register_hook(lambda _: freed.append(kept.expired()))
    assert not kept.expired()
    out.sum().backward(retain_graph=True)
    assert freed == [True]
    out = expert_mlp(*case)[0]
    kept = StorageWeakRef(kept_by(out).untyped_storage())  # type: ignore[union-attr]
    assert not kept.expired()
    del out
    assert kept.expired()


def test_gradient_that_is_none_is_one_of_zeros(route: str) -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> None:
            return None

    case = make_case(9)
    out, _ = expert_mlp(*case)
    gradients = torch.autograd.grad(Nothing.apply(out).sum(), case.leaves, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_compiled_layer_that_keeps_is_one_graph_with_the_same_gradients(route: str) -> None:
    case = make_case(7, dropout=0.2)
    case.layer.keeps = True

    def block(hidden: Tensor) -> Tensor:
        return expert_mlp(torch.tanh(hidden), *case[1:])[0].square()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for layer in (block, compiled):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(layer(case.hidden).sum(), case.leaves))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_layer_elsewhere_than_on_a_cpu_computes_again() -> None:
    case = make_case(9)
    case.layer.keeps = True
    assert operator._keeps(case.layer, case.hidden, case.updates)
    assert not operator._keeps(case.layer, case.hidden.to("meta"), case.updates)


def test_in_bfloat16_a_second_backward_of_a_graph_has_the_bits_of_the_first(route: str) -> None:
    case = make_case(17, dtype=torch.bfloat16)
    case.layer.keeps = True
    out, _ = expert_mlp(*case)
    first, second = (torch.autograd.grad(out.square().sum(), case.leaves, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
