"""Cross entropy in chunks against plain float32 over all logits, forward and backward, at every awkward shape."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from expertune.kernels import amounts, native
from expertune.kernels.linear_cross_entropy import chunked, linear_cross_entropy, reference, tiles
from expertune.kernels.linear_cross_entropy.per_token import linear_log_probs
from tests.kernels.output_heads import FLOAT32, TOLERANCES, Case, assert_same_as_plain, make_case


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and several tiles of the vocabulary, the last of each short."""
    monkeypatch.setitem(amounts.LOGITS_BYTES, "cpu", 4 * 157 * 5)
    monkeypatch.setattr(amounts, "_MIN_LOGIT_ROWS", 5)
    monkeypatch.setattr(chunked, "_TILE_MULTIPLE", 8)
    monkeypatch.setitem(amounts.LOGIT_TILE_BYTES, "cpu", 4 * 33 * 24)


@pytest.fixture(params=[True, False], ids=["native library", "torch"])
def by_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients of a tile by the native library, and by torch's operators, wherever the test runs."""
    if request.param and not native.available():
        pytest.skip(native.status().reason)
    monkeypatch.setattr(tiles, "_native", lambda z_nv: request.param)


SHAPES: dict[str, dict[str, Any]] = {
    "some labels": {},
    "all labels": {"labeled": 1.0},
    "no label": {"labeled": 0.0},
    "one row": {"rows": 1, "labeled": 1.0},
    "no rows": {"rows": 0},
    "one word": {"vocabulary": 1},
    "odd sizes": {"rows": 7, "vocabulary": 101, "width": 13},
    "no update": {"ranks": ()},
    "rank 1": {"ranks": (1,)},
    "rank 17": {"ranks": (17,)},
    "rank above the width": {"ranks": (50,)},
    "two adapters": {"ranks": (3, 5)},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0},
    "scaled, capped and biased": {"scale": 1.7, "softcap": 3.0, "bias": True},
    "more columns than are worked on at once": {"vocabulary": 700, "ranks": (3, 5), "softcap": 3.0, "bias": True},
}


@pytest.mark.parametrize("own_x", [False, True], ids=["shared input", "own input after dropout"])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_of_single_rows_and_their_gradients_are_those_of_plain_arithmetic(
    shape: str, own_x: bool, small_chunks: None
) -> None:
    case = make_case(**SHAPES[shape], own_x=own_x)
    found = linear_log_probs(**case.arguments)
    rows = [index for index, label in enumerate(case.labels.tolist()) if label != -100]
    one_by_one = []
    for row in rows:
        labels = torch.full_like(case.labels, -100)
        labels[row] = case.labels[row]
        one_by_one.append(-reference.linear_cross_entropy(**case.arguments | {"labels_T": labels}))
    expected = found.detach().new_zeros(found.shape)
    expected = (
        expected.index_put((torch.tensor(rows, dtype=torch.int64),), torch.stack(one_by_one)) if rows else expected
    )
    torch.testing.assert_close(found, expected, **FLOAT32)
    weights = torch.randn(found.shape)
    gradients = torch.autograd.grad((found * weights).sum(), case.leaves)
    if rows:
        plain = torch.autograd.grad((expected * weights).sum(), case.leaves)
        for gradient, exact in zip(gradients, plain, strict=True):
            torch.testing.assert_close(gradient, exact, **FLOAT32)
    else:
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("own_x", [False, True], ids=["shared input", "own input after dropout"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_loss_and_gradients_are_those_of_plain_arithmetic(shape: str, own_x: bool) -> None:
    assert_same_as_plain(make_case(**SHAPES[shape], own_x=own_x))


@pytest.mark.parametrize("own_x", [False, True], ids=["shared input", "own input after dropout"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_chunks")
def test_many_chunks_and_tiles_with_short_last_ones_give_the_same(shape: str, own_x: bool) -> None:
    assert_same_as_plain(make_case(**SHAPES[shape], own_x=own_x))


@pytest.mark.parametrize("in_dtype", [False, True], ids=["GEMMs in float32", "GEMMs in the dtype"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.usefixtures("small_chunks", "by_library")
def test_library_and_torch_both_give_the_plain_loss(
    dtype: torch.dtype, in_dtype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "gemm_dtype", lambda dtype, device: dtype if in_dtype else torch.float32)
    # Products by torch, as on a CPU with AVX512-BF16 and without AMX, whatever this one has.
    monkeypatch.setattr(native, "arithmetic", lambda dtype: 1)
    # Of few ranks, and of as many as have GEMMs of their own.
    for own_x, labeled, ranks in ((False, 0.6, (3, 5)), (True, 1.0, (3, 5)), (True, 0.6, (tiles.GEMM_RANK, 5))):
        case = make_case(dtype=dtype, ranks=ranks, own_x=own_x, labeled=labeled, bias=True, scale=1.7, softcap=3.0)
        assert_same_as_plain(case, TOLERANCES[dtype])
    assert_same_as_plain(make_case(dtype=dtype, ranks=()), TOLERANCES[dtype])


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_half_precision_stays_within_its_rounding(
    dtype: torch.dtype, adapter_dtype: torch.dtype, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GEMMs in float32 over converted tiles of the weight, or in the dtype itself.
    monkeypatch.setattr(chunked, "gemm_dtype", lambda dtype, device: dtype if has_instructions else torch.float32)
    case = make_case(dtype=dtype, adapter_dtype=adapter_dtype, ranks=(3, 5), bias=True)
    coarsest = max((dtype, adapter_dtype), key=lambda kind: TOLERANCES[kind]["atol"])
    assert_same_as_plain(case, TOLERANCES[coarsest])


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
@pytest.mark.usefixtures("small_chunks")
def test_head_in_bfloat16_is_multiplied_in_integers_where_16_bit_floats_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)
    monkeypatch.setattr(chunked, "gemm_dtype", lambda dtype, device: torch.float32)
    ways: list[tuple[int, bool]] = []
    multiply = native.grouped_gemm

    def watched(x: Tensor, weight: Tensor, *rest: Any, transposed: bool, dtype: torch.dtype) -> None:
        ways.append((native.arithmetic(dtype), transposed))
        multiply(x, weight, *rest, transposed=transposed, dtype=dtype)

    monkeypatch.setattr(native, "grouped_gemm", watched)
    case = make_case(dtype=torch.bfloat16, width=200, ranks=(3,), bias=True, scale=1.7, softcap=3.0)
    assert_same_as_plain(case._replace(updates=[]), {"rtol": 2**-8, "atol": 2**-9})
    assert_same_as_plain(case, TOLERANCES[torch.bfloat16])
    assert set(ways) == {(native.INTEGERS, True), (native.INTEGERS, False)}
    ways.clear()
    for other in (make_case(dtype=torch.bfloat16, weight_dtype=torch.float32), make_case(dtype=torch.float16)):
        assert_same_as_plain(other, TOLERANCES[torch.bfloat16])
    assert not ways


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_weight_of_another_dtype_is_converted_and_the_gemm_is_exact(weight_dtype: torch.dtype) -> None:
    assert_same_as_plain(make_case(weight_dtype=weight_dtype, bias=True))


@given(st.data())
def test_any_sizes_give_the_plain_loss(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    case = make_case(
        rows=data.draw(st.integers(0, 12)),
        vocabulary=data.draw(st.integers(1, 40)),
        width=data.draw(st.integers(1, 9)),
        ranks=data.draw(st.lists(st.integers(1, 5), max_size=2)),
        labeled=data.draw(st.floats(0, 1)),
        own_x=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, 0.25])),
        softcap=data.draw(st.sampled_from([None, 1.5])),
    )
    assert_same_as_plain(case)


def test_rows_without_a_label_cost_nothing_and_get_zero_gradients() -> None:
    case = make_case(rows=40, labeled=0.0)
    case.labels[7] = 3
    garbage = case.hidden.detach().clone()
    garbage[torch.arange(40) != 7] = torch.inf
    loss = linear_cross_entropy(**case._replace(hidden=garbage.requires_grad_()).arguments)
    torch.testing.assert_close(loss, reference.linear_cross_entropy(**case.arguments))
    (gradient,) = torch.autograd.grad(loss, garbage)
    assert gradient[7].any()
    assert not gradient[torch.arange(40) != 7].any()


def test_large_logits_do_not_overflow() -> None:
    case = make_case(ranks=())
    assert_same_as_plain(case._replace(weight=100 * case.weight), {"rtol": 1e-5, "atol": 1e-3})


def test_loss_that_is_not_finite_stays_so() -> None:
    case = make_case(labeled=1.0)
    case.hidden.data[3, 3] = torch.nan
    assert linear_cross_entropy(**case.arguments).isnan()


@pytest.mark.parametrize("vocabulary", [257, 300], ids=["alone in a slice of 256 columns", "beside others"])
@pytest.mark.usefixtures("by_library")
def test_one_column_that_is_nan_makes_the_loss_nan(vocabulary: int) -> None:
    case = make_case(vocabulary=vocabulary, labeled=1.0, ranks=(), bias=True)
    assert case.bias is not None
    case.labels.clamp_(max=vocabulary - 3)
    case.bias[-1] = torch.nan
    for other in (0.0, torch.inf):
        case.bias[-2] = other
        assert reference.linear_cross_entropy(**case.arguments).isnan()
        assert linear_cross_entropy(**case.arguments).isnan()


@pytest.mark.usefixtures("by_library")
def test_columns_that_are_ruled_out_do_not_count_though_a_slice_has_no_others() -> None:
    case = make_case(vocabulary=600, bias=True)
    assert case.bias is not None
    case.labels.clamp_(max=255)
    case.bias[256:] = -torch.inf
    assert_same_as_plain(case)


@pytest.mark.usefixtures("small_chunks")
def test_two_runs_give_identical_bytes() -> None:
    case = make_case(dtype=torch.bfloat16, ranks=(3, 5), own_x=True)
    first, second = (
        [loss.detach(), *torch.autograd.grad(loss, case.leaves)]
        for loss in (linear_cross_entropy(**case.arguments) for _ in range(2))
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


class Memory(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.expertune.linear_cross_entropy.default:
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                # Views and operators in place make nothing.
                made = isinstance(tensor, Tensor) and tensor._base is None and not func._schema.is_mutable
                self.largest = max(self.largest, tensor.nbytes if made else 0)
        return out


def run_inside(case: Case) -> int:
    """The largest tensor that a forward with gradients makes; the operator's body, which torch calls as one node."""
    updates = case.updates
    head = chunked.Head(
        case.weight,
        None,
        1.0,
        None,
        [update.scaling for update in updates],
        [False] * len(updates),
        [update.a_rD for update in updates],
        [update.b_Vr for update in updates],
    )
    with torch.no_grad(), Memory() as memory:
        chunked.forward(case.hidden, head, case.labels, [], True, True)
    return memory.largest


def test_temporaries_do_not_grow_with_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(amounts.LOGITS_BYTES, "cpu", 2**20)
    few, many = (run_inside(make_case(rows, 4096, 16, labeled=1.0)) for rows in (128, 2048))
    assert few == many
    assert many <= 2**20


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_logits_of_one_chunk_are_gone_when_those_of_the_next_are_made(
    gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    logits_of_chunk, num_chunks = chunked._logits, 0

    def watched(*args: Any) -> Any:
        nonlocal num_chunks
        num_chunks += 1
        # Nothing but the tile that was used last may linger in a name.
        assert sum(tile() is not None for tile in made) <= 1
        result = logits_of_chunk(*args)
        made.extend(weakref.ref(tile) for tile in result[0])
        return result

    monkeypatch.setattr(chunked, "_logits", watched)
    with torch.set_grad_enabled(gradients):
        linear_cross_entropy(**make_case(labeled=1.0).arguments)
    assert num_chunks == 5


def test_half_precision_weight_is_never_held_whole_in_float32() -> None:
    case = make_case(64, 50_000, 256, labeled=1.0, dtype=torch.bfloat16)
    # Beside a tile of the weight, logits of the 64 tokens where the machine multiplies bfloat16 as it is.
    logits_bytes = 64 * 50_000 * 4
    assert run_inside(case) <= max(amounts.LOGIT_TILE_BYTES["cpu"], 1.01 * logits_bytes) < case.weight.numel() * 4


def test_frozen_inputs_get_no_gradient_and_the_others_still_do() -> None:
    case = make_case(own_x=True)
    (update,) = case.updates
    expected = torch.autograd.grad(reference.linear_cross_entropy(**case.arguments), case.leaves)
    adapter_only = case._replace(hidden=case.hidden.detach())
    for leaf, exact in zip(case.leaves[1:], expected[1:], strict=True):
        (gradient,) = torch.autograd.grad(linear_cross_entropy(**adapter_only.arguments), leaf)
        torch.testing.assert_close(gradient, exact, **FLOAT32)
    frozen = replace(update, a_rD=update.a_rD.detach(), b_Vr=update.b_Vr.detach(), x_TD=update.x_TD.detach())
    loss = linear_cross_entropy(**case._replace(updates=[frozen]).arguments)
    torch.testing.assert_close(torch.autograd.grad(loss, case.hidden)[0], expected[0], **FLOAT32)
    shared = case._replace(updates=[replace(frozen, x_TD=None)])
    exact = torch.autograd.grad(reference.linear_cross_entropy(**shared.arguments), case.hidden)[0]
    gradient = torch.autograd.grad(linear_cross_entropy(**shared.arguments), case.hidden)[0]
    torch.testing.assert_close(gradient, exact, **FLOAT32)


def test_without_gradients_the_loss_is_the_same() -> None:
    case = make_case()
    with torch.no_grad():
        loss = linear_cross_entropy(**case.arguments)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(**case.arguments).detach())


def test_second_derivatives_are_refused() -> None:
    case = make_case()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(**case.arguments), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    case = make_case()

    def block(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(**case._replace(hidden=torch.tanh(hidden)).arguments)

    plain = torch.autograd.grad(block(case.hidden), case.leaves)
    recomputed = torch.autograd.grad(checkpoint(block, case.hidden, use_reentrant=False), case.leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_autocast_leaves_the_arithmetic_alone() -> None:
    case = make_case()
    expected = linear_cross_entropy(**case.arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(**case.arguments)
    assert torch.equal(loss, expected)


def test_rows_that_are_a_view_with_strides_are_read_as_such() -> None:
    case = make_case(rows=9, width=33)
    wide = torch.randn(33, 9).t().requires_grad_()
    assert not wide.is_contiguous()
    assert_same_as_plain(case._replace(hidden=wide))
