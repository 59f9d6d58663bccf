"""Slices of a stack: each byte in one of them, by as many as there are, and written where it belongs."""

import pytest
import torch

from expertune.kernels.nf4 import Nf4Stack, Part

MATRICES = torch.randn(6, 48, 128, generator=torch.Generator().manual_seed(0))
SIZES = [1, 2, 3, 4, 6, 7, 50]


def written(double_quantization: bool, part: Part | None = None) -> Nf4Stack:
    stack = Nf4Stack(*MATRICES.shape, double_quantization)
    if part is not None:
        stack.hold(part)
    for index, matrix in enumerate(MATRICES):
        stack.write(index, matrix)
    return stack


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_slices_side_by_side_are_the_bytes_of_the_whole(size: int, double_quantization: bool) -> None:
    whole = written(double_quantization)
    slices = [written(double_quantization, Part(rank, size)) for rank in range(size)]
    for number, buffer in enumerate(whole.bytes):
        expected = buffer.detach().reshape(-1).view(torch.uint8)
        assert torch.equal(torch.cat([each.bytes[number] for each in slices]), expected)
    assert max(each.nbytes for each in slices) <= whole.nbytes / size + 4 * 16


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_slices_end_with_an_expert_where_they_divide_the_experts(size: int) -> None:
    whole = Nf4Stack(*MATRICES.shape).whole
    each = 6 // size
    for rank in range(size):
        read = Part(rank, size).experts(whole, matrices=1)
        assert read == [range(rank * each, (rank + 1) * each)] * 4


@pytest.mark.parametrize("size", SIZES)
def test_each_expert_is_read_for_some_slice_and_no_slice_reads_many_more_than_its_share(size: int) -> None:
    whole = Nf4Stack(*MATRICES.shape).whole
    read = [Part(rank, size).experts(whole, matrices=2) for rank in range(size)]
    assert {expert for parts in read for part in parts for expert in part} == {0, 1, 2}
    assert max(len(part) for parts in read for part in parts) <= 3 / size + 2


def test_slice_cannot_be_dequantized() -> None:
    with pytest.raises(ValueError, match="a slice of the bytes is here, 1 of 2"):
        written(True, Part(0, 2)).dequantize(0, torch.float32)
