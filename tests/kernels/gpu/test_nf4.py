"""Dequantizing on a GPU gives the bits that bitsandbytes gives, whole or a part, in any place of a stack."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from expertune.kernels.gpu import nf4
from expertune.kernels.nf4 import Nf4Bytes
from expertune.kernels.nf4.reference import nf4_codebook

from .conftest import CPU, dense, nan, stack_of


@given(
    matrices=st.integers(1, 3),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    double=st.booleans(),
    half=st.booleans(),
)
def test_any_shape_dequantizes_to_the_bits_of_the_cpu(matrices, rows, blocks, double, half):
    dtype = torch.float16 if half else torch.float32
    stack = stack_of(matrices, rows, 64 * blocks, double)
    out = nan(matrices * rows, 64 * blocks, dtype=dtype)
    nf4.dequantize(stack.bytes, slice(0, matrices), out)
    assert torch.equal(out.view(matrices, rows, -1), dense(stack.bytes, dtype))


def test_part_of_some_matrices_is_cut_from_the_whole(dtype):
    stack = stack_of(4, 7, 320)
    out = nan(2 * 3, 200, dtype=dtype)[:, :128]
    nf4.dequantize(stack.bytes, slice(1, 3), out, rows=slice(2, 5), columns=slice(64, 192))
    assert torch.equal(out.view(2, 3, 128), dense(stack.bytes, dtype)[1:3, 2:5, 64:192])


def test_blocks_beyond_the_first_nested_scale_are_found():
    stack = stack_of(2, 40, 64 * 9)  # 360 blocks, two nested scales
    out = nan(2 * 40, 64 * 9)
    nf4.dequantize(stack.bytes, slice(0, 2), out)
    assert torch.equal(out.view(2, 40, -1), dense(stack.bytes))


def test_nothing_to_dequantize_writes_nothing():
    out = nan(0, 64)
    assert nf4.dequantize(stack_of(1, 4, 64).bytes, slice(1, 1), out) is out


def test_matrix_beyond_two_to_the_31_bytes_is_found():
    # Memory that nobody touches but in the last matrix's last row.
    rows, columns = 2**15, 2**16
    packed = torch.empty(3, rows, columns // 2, dtype=torch.uint8)
    absmax = torch.empty(3, rows * columns // 64, dtype=torch.float32)
    packed[2, -1, :64] = torch.arange(64, dtype=torch.uint8)
    absmax[2, -1024:-1022] = torch.tensor([0.5, 2.0])
    weight = Nf4Bytes(packed, absmax, torch.empty(3, 0), torch.empty(0))
    out = nan(1, 128)
    nf4.dequantize(weight, slice(2, 3), out, rows=slice(rows - 1, rows), columns=slice(0, 128))
    codes = torch.stack((torch.arange(64) >> 4, torch.arange(64) & 15), dim=1).flatten()
    assert torch.equal(out[0], nf4_codebook(CPU)[codes] * torch.tensor([0.5, 2.0]).repeat_interleave(64))


@triton.jit
def values_of(codes_ptr, out_ptr):
    codes = tl.load(codes_ptr + tl.arange(0, 16))
    tl.store(out_ptr + tl.arange(0, 16), nf4.select_value(codes))


def test_twin_of_the_shuffle_knows_every_value_exactly():
    out = nan(16)
    values_of[(1,)](torch.arange(16, dtype=torch.uint8), out)
    assert torch.equal(out, nf4_codebook(CPU))


def test_shuffle_takes_each_nibble_of_four_bytes_in_its_order():
    """The assembly, line by line: which bits reach which output, and that a lane's number is read modulo 16."""
    lines = [line.strip() for line in nf4._SHUFFLE_ASM.value.splitlines()]
    shifts, found = {"$8": 0}, {}
    for line in lines:
        if line.startswith("shr.u32 code"):
            shifts["code"] = int(line.rstrip(";").rpartition(",")[2])
        if line.startswith("shfl.sync.idx.b32"):
            output, source, lane, segment, mask = (part.strip() for part in line[18:].rstrip(";").split(","))
            assert (source, int(segment, 16), int(mask, 16)) == ("entry", 0x101F, 0xFFFFFFFF)
            found[output] = shifts[lane]
    # High nibbles of bytes 0..3 are even columns and come first; low nibbles are odd ones.
    expected = [8 * byte + 4 * half for half, byte in itertools.product((1, 0), range(4))]
    assert [found[f"${number}"] for number in range(8)] == expected


@pytest.mark.parametrize("table", [0, 1])
def test_tables_are_contiguous_float32(table):
    held = nf4.tables(CPU)[table]
    assert held.dtype == torch.float32
    assert held.is_contiguous()
