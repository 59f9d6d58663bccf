"""Dense 4-bit linears: bitsandbytes' layer in bytes and files, with our product."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from expertune.checkpoint.nf4_linears import quantized_linear
from expertune.layers.nf4_linear import Nf4Linear


def pair(bias: bool = True, double: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Nf4Linear, nn.Linear]:
    """Our layer, and a plain linear over its dequantized weight."""
    plain = nn.Linear(128, 80, bias=bias)
    ours = quantized_linear(plain, plain.weight.detach(), double, dtype, torch.device("cpu"))
    with torch.no_grad():
        plain.weight.copy_(bnb.functional.dequantize_4bit(ours.weight.data, ours.weight.quant_state))
    return ours, plain


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 128), (1, 128), (128,), (2, 0, 128)])
def test_output_and_gradient_are_those_of_the_dequantized_weight(
    shape: tuple[int, ...], bias: bool, double: bool
) -> None:
    ours, plain = pair(bias, double)
    x = torch.randn(shape, requires_grad=True)
    results: list[tuple[Tensor, Tensor]] = []
    for layer in (ours, plain):
        y = layer(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_product_runs_in_the_layers_dtype_and_comes_back_in_the_inputs() -> None:
    ours, plain = pair(dtype=torch.bfloat16)
    x = torch.randn(4, 128)
    y = ours(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain(x), rtol=2**-6, atol=2**-5)


def test_bytes_are_shared_with_bitsandbytes_and_saved_as_its_own() -> None:
    ours, _ = pair()
    assert isinstance(ours, bnb.nn.Linear4bit)
    assert ours.nf4_bytes().packed.data_ptr() == ours.weight.data.data_ptr()
    stock = bnb.nn.Linear4bit(128, 80, quant_type="nf4")
    assert ours.state_dict().keys() >= stock.state_dict().keys()
    assert any(name.endswith("nested_absmax") for name in ours.state_dict())
