"""Linears that are left in 16 bits, on a CPU that multiplies no 16-bit floats."""

import copy

import pytest
import torch
from torch import nn

from expertune.layers import dense_linear as module
from expertune.layers.dense_linear import use_dense_linear


@pytest.fixture
def no_16_bit_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gemm_dtype", lambda dtype, device: torch.float32)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens that our product has multiplied."""
    shapes: list[tuple[int, ...]] = []

    def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return x @ weight.t()

    monkeypatch.setattr(module, "dense_linear", dense_linear)
    return shapes


def frozen(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 40, bias=bias, dtype=dtype)).requires_grad_(False)
    use_dense_linear(model)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 64), (64,), (2, 0, 64)])
@pytest.mark.usefixtures("no_16_bit_floats")
def test_output_and_gradient_are_those_of_torchs_linear(shape: tuple[int, ...], bias: bool) -> None:
    (linear,) = frozen(bias=bias)
    assert type(linear) is nn.Linear
    x = torch.randn(shape).bfloat16().requires_grad_()
    results = []
    for y in (linear(x), nn.functional.linear(x, linear.weight, linear.bias)):
        results.append((y, torch.autograd.grad(y.float().square().sum(), x)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-5)


@pytest.mark.usefixtures("no_16_bit_floats")
def test_frozen_16_bit_linears_multiply_here_and_their_copies_too(multiplied: list[tuple[int, ...]]) -> None:
    model = frozen()
    model(torch.randn(2, 3, 64).bfloat16())
    copied = copy.deepcopy(model)
    copied[0].weight.data.zero_()
    copied[0].bias.data.zero_()
    assert not copied(torch.randn(4, 64).bfloat16()).any()
    assert multiplied == [(6, 64), (4, 64)]


@pytest.mark.usefixtures("no_16_bit_floats")
def test_trained_weights_and_other_dtypes_remain_torchs(multiplied: list[tuple[int, ...]]) -> None:
    model = frozen()
    model[0].weight.requires_grad_(True)
    model(torch.randn(2, 64).bfloat16()).sum().backward()
    assert model[0].weight.grad is not None
    frozen(torch.float32)(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="dtype"):
        frozen()(torch.randn(2, 64))
    assert multiplied == []


def test_linears_of_a_cpu_that_multiplies_16_bits_remain_torchs(
    monkeypatch: pytest.MonkeyPatch, multiplied: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(module, "gemm_dtype", lambda dtype, device: dtype)
    frozen()(torch.randn(2, 64).bfloat16())
    assert multiplied == []
