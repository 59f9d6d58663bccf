"""MXFP4, the second codebook: the same values as transformers dequantizes, the same GEMMs as plain arithmetic."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expertune.kernels import native
from expertune.kernels.expert_mlp import Activation, operator
from expertune.kernels.expert_mlp.grouped import GroupedRoute
from expertune.kernels.gpu import mxfp4
from expertune.kernels.nf4 import MXFP4_BLOCK_SIZE, Nf4Stack, cpu, dequantize, reference
from tests.kernels.expert_layers import FLOAT32, SWIGLU, assert_same_as_plain, clamped_gate, make_case


def random_stack(num_matrices: int, rows: int, columns: int, exponents: tuple[int, int] = (118, 124)) -> Nf4Stack:
    """Random codes, with scales of 2 ** (e - 127)."""
    stack = Nf4Stack(num_matrices, rows, columns, scheme="mxfp4")
    stack.packed.data.random_(0, 256)
    stack.absmax.random_(*exponents)
    return stack


def as_published(stack: Nf4Stack) -> tuple[Tensor, Tensor]:
    """Blocks [M, N, K/32, 16] and exponents [M, N, K/32] as published: first weight in the low half."""
    swapped = (stack.packed << 4) | (stack.packed >> 4)
    shape = (stack.num_matrices, stack.out_features, stack.in_features // MXFP4_BLOCK_SIZE)
    return swapped.view(*shape, 16), stack.absmax.view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_values_are_those_of_transformers(dtype: torch.dtype) -> None:
    stack = random_stack(3, 40, 192)
    theirs = convert_moe_packed_tensors(*as_published(stack), dtype=dtype).transpose(1, 2)
    for index in range(3):
        assert torch.equal(stack.dequantize(index, dtype), theirs[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
def test_the_native_library_gives_the_reference_bits_for_every_exponent(dtype: torch.dtype) -> None:
    stack = Nf4Stack(1, 128, 128, scheme="mxfp4")
    stack.packed.data.random_(0, 256)
    # 2 ** -127 upwards; the largest ones overflow for no value, 255 is not a number and in no checkpoint.
    stack.absmax.copy_((torch.arange(512) % 252).view(1, -1))
    found, expected = torch.empty(128, 128, dtype=dtype), torch.empty(128, 128, dtype=dtype)
    cpu.dequantize(stack.bytes, 0, found, slice(0, 128), slice(0, 128))
    reference.dequantize(stack.bytes, 0, expected, slice(0, 128), slice(0, 128))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_part_of_a_matrix_is_dequantized_as_it_lies_in_the_whole() -> None:
    stack = random_stack(2, 24, 192)
    whole = stack.dequantize(1, torch.float32)
    part = dequantize(stack.bytes, 1, torch.empty(10, 128), rows=slice(5, 15), columns=slice(64, 192))
    assert torch.equal(part, whole[5:15, 64:192])


@pytest.mark.parametrize("activation", [SWIGLU, Activation(clamped_gate, columnwise=True)], ids=["swiglu", "limits"])
@pytest.mark.parametrize("tokens", [1, 23])
def test_an_expert_layer_and_its_gradients_are_those_of_plain_arithmetic(
    route: str, activation: Activation, tokens: int
) -> None:
    case = make_case(tokens, activation=activation, biased=True)
    experts = case.down.num_matrices
    stacks = {"gate_up": random_stack(2 * experts, 192, 128), "down": random_stack(experts, 128, 192)}
    assert_same_as_plain(case._replace(**stacks), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantization_on_the_gpu_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    stack = random_stack(3, 20, 192)
    stack.packed.data[1, 0, :16] = torch.arange(256, dtype=torch.uint8)[::16] + torch.arange(16, dtype=torch.uint8)
    out = torch.full((2 * 10, 128), float("nan"), dtype=dtype)
    mxfp4.dequantize(stack.bytes, slice(1, 3), out, rows=slice(0, 10), columns=slice(0, 128))
    expected = torch.stack([stack.dequantize(index, dtype)[:10, :128] for index in (1, 2)])
    assert torch.equal(out.view(2, 10, 128), expected)


def test_dequantization_on_the_gpu_knows_the_least_power_of_two() -> None:
    stack = random_stack(1, 1, 64)
    stack.absmax.copy_(torch.tensor([[0, 250]]))
    out = torch.full((1, 64), float("nan"))
    assert torch.equal(mxfp4.dequantize(stack.bytes, slice(0, 1), out), stack.dequantize(0, torch.float32))


def test_a_gpus_layer_dequantizes_first_and_gives_plain_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_route", lambda *_: GroupedRoute(True))
    case = make_case(7, hidden=64, intermediate=64)
    experts = case.down.num_matrices
    stacks = {"gate_up": random_stack(2 * experts, 64, 64), "down": random_stack(experts, 64, 64)}
    assert_same_as_plain(case._replace(**stacks), FLOAT32)


def test_a_stack_takes_a_byte_for_two_weights_and_one_for_each_block_of_32() -> None:
    stack = Nf4Stack(3, 64, 128, scheme="mxfp4")
    assert stack.nbytes == 3 * 64 * (128 // 2 + 128 // 32)


def test_a_matrix_cannot_be_written_into_a_stack_of_published_blocks() -> None:
    with pytest.raises(ValueError, match="it quantizes nothing"):
        Nf4Stack(1, 64, 64, scheme="mxfp4").write(0, torch.randn(64, 64))
