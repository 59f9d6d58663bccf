"""A frozen matrix of 16 bits on a CPU, against float64, forward and backward: natively and in tiles."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from expertune.kernels import dense_linear as module
from expertune.kernels import native, workspace
from expertune.kernels.dense_linear import dense_linear

# One unit in the last place of the result, and for bfloat16 what 13 bits of each factor add.
TOLERANCES = {torch.bfloat16: 2**-8 + 2**-11, torch.float16: 2**-11 + 2**-20}


@pytest.fixture(params=["native", "native in parts", "torch in parts"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "native":
        monkeypatch.setattr(module, "_EVEN", 16)
        monkeypatch.setattr(module, "LINEAR_PART_BYTES", 4 * 300)
    if request.param == "torch in parts":
        monkeypatch.setattr(native, "available", lambda: False)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 8), (7, 130, 33), (96, 257, 1000), (3, 1, 1)])
def test_product_and_input_gradient_of_a_16_bit_matrix_are_float64s(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, depth, columns = shape
    x = torch.randn(tokens, depth).to(dtype).requires_grad_()
    weight = torch.randn(columns, depth).to(dtype)
    dy = torch.randn(tokens, columns).to(dtype)
    y = dense_linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert relative_error(y.detach(), x.detach().double() @ weight.double().t()) < TOLERANCES[dtype]
    assert relative_error(dx, dy.double() @ weight.double()) < TOLERANCES[dtype]


def test_columns_of_a_wider_matrix_and_tokens_that_lie_apart_are_multiplied() -> None:
    x, weight = torch.randn(64, 5).bfloat16().t(), torch.randn(20, 100).bfloat16()[:, 20:84]
    assert relative_error(dense_linear(x, weight), x.double() @ weight.double().t()) < TOLERANCES[torch.bfloat16]


def test_no_tokens_give_nothing_and_get_no_gradient() -> None:
    x = torch.randn(0, 64).bfloat16().requires_grad_()
    y = dense_linear(x, torch.randn(8, 64).bfloat16())
    assert (tuple(y.shape), y.dtype) == ((0, 8), torch.bfloat16)
    assert tuple(torch.autograd.grad(y.sum(), x)[0].shape) == (0, 64)


@pytest.mark.parametrize("shape", [(0, 64), (8, 0)], ids=["no outputs", "no inputs"])
def test_matrix_without_numbers_gives_zeros_as_torch_does(shape: tuple[int, int]) -> None:
    x, weight = torch.randn(3, shape[1]).bfloat16().requires_grad_(), torch.empty(shape).bfloat16()
    y = dense_linear(x, weight)
    assert torch.equal(y, x.detach() @ weight.t())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(3, shape[1]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_kept_in_float32_does_not_grow_with_a_heads_vocabulary(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, depth, vocabulary, part = 32, 64, 20_000, 2**16
    monkeypatch.setattr(module, "LINEAR_PART_BYTES", part)
    workspace.clear()
    x = torch.randn(tokens, depth).to(dtype).requires_grad_()
    y = dense_linear(x, torch.randn(vocabulary, depth).to(dtype))
    torch.autograd.grad(y, x, torch.randn_like(y))
    kept = sum(memory.nbytes for memory in workspace.of_this_thread().values())
    assert kept <= 2 * part + 2 * tokens * depth * 4
    workspace.clear()


def test_checkpointed_gradient_is_the_plain_one_to_the_bit() -> None:
    x, weight = torch.randn(9, 64).bfloat16().requires_grad_(), torch.randn(33, 64).bfloat16()
    (plain,) = torch.autograd.grad(dense_linear(x, weight).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(dense_linear, x, weight, use_reentrant=False).sum(), x)
    assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("x", "weight", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), "both bfloat16 or both float16, got torch.float32"),
        (torch.zeros(2, 3).half(), torch.zeros(4, 3).bfloat16(), "got torch.float16, torch.bfloat16"),
        (torch.zeros(2, 3).half(), torch.zeros(4, 5).half(), r"\(2, 3\) and weight \(4, 5\)"),
    ],
)
def test_other_dtypes_and_shapes_are_refused_by_name(x: Tensor, weight: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dense_linear(x, weight)
