"""What a plan counts by arithmetic is what tensors take."""

import pytest
import torch

from expertune.kernels.amounts import DTYPES, stack_bytes
from expertune.kernels.nf4 import Nf4Stack, Part


def test_dtypes_are_as_wide_as_those_of_torch_with_the_same_name():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {
        name: getattr(torch, name).itemsize for name in DTYPES
    }


@pytest.mark.parametrize("slices", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("shape", [(1, 64), (48, 128), (300, 320), (64, 16448)])
@pytest.mark.parametrize(("scheme", "double"), [("nf4", True), ("nf4", False), ("mxfp4", False)])
def test_bytes_of_a_stack_are_those_of_its_buffers(shape, scheme, double, slices):
    for num_matrices in (1, 5, 16):
        stack = Nf4Stack(num_matrices, *shape, double, "meta", scheme)
        expected = sum(len(Part(0, slices).of(buffer)) for buffer in stack.whole)
        assert stack_bytes(num_matrices, shape, double, scheme, slices) >= expected
        if slices == 1:
            assert stack_bytes(num_matrices, shape, double, scheme) == stack.nbytes
        else:
            each = [Part(0, slices).each(buffer) for buffer in stack.whole]
            assert stack_bytes(num_matrices, shape, double, scheme, slices) == sum(each)


def test_a_matrix_that_ends_within_a_block_takes_all_of_it():
    assert stack_bytes(1, (3, 100), True) == stack_bytes(1, (1, 320), True)
