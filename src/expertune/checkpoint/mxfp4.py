"""Checkpoints in MXFP4: a stack's blocks kept as they are, or read as the floats they stand for.

MXFP4 (OCP Microscaling Formats 1.0, section 5.2) keeps a stack of matrices [E, N, K] as `X_blocks` (uint8
[E, N, K/32, 16], the first weight of a byte in its low half) and `X_scales` (uint8 [E, N, K/32], an exponent of two
plus 127). Blocks are kept, their halves swapped, or decoded one matrix at a time to be quantized as any other.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertune.checkpoint.names import Destination
from expertune.checkpoint.reader import DecodedEntry, TensorEntry
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts import layout
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import MXFP4_BLOCK_SIZE

if TYPE_CHECKING:
    from expertune.checkpoint.prequantized import Loader, Piece

# FP4 (e2m1): one bit of sign, two of exponent, one of mantissa.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 blocks as the floats they stand for, exactly.

    Args:
        blocks: uint8 [..., K/32, 16].
        scales: uint8 [..., K/32].

    Returns:
        float32 [..., K].
    """
    values = torch.tensor(FP4_VALUES, device=blocks.device)
    weights = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1).flatten(-2)
    return torch.ldexp(weights, (scales.int() - _SCALE_BIAS)[..., None]).flatten(-2)


def decoded_entry(
    piece: "Piece", entries: Mapping[str, TensorEntry], loader: "Loader", destination: Destination
) -> TensorEntry:
    """A stack of MXFP4 matrices [E, N, K] that reads as transformers stacks its experts."""
    blocks, scales = _entries(entries)
    num_experts, rows, columns = blocks.shape[0], blocks.shape[1], blocks.shape[2] * MXFP4_BLOCK_SIZE
    spec = loader.names.specs.get(destination.name)
    transposed = spec is not None and spec.is_transposed

    @functools.lru_cache(maxsize=1)  # gate and up are asked for one after the other
    def decode(expert: int) -> Tensor:
        matrix = decode_mxfp4(blocks.read_part(expert), scales.read_part(expert))
        return matrix.T if transposed else matrix

    shape = (num_experts, columns, rows) if transposed else (num_experts, rows, columns)
    header = replace(blocks, key=piece.key, shape=shape, dtype=torch.float32)
    return DecodedEntry(**vars(header), decode=decode)


def _entries(entries: Mapping[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry]:
    """Blocks and scales of a stack, of shapes that belong together."""
    blocks, scales = entries["blocks"], entries["scales"]
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != MXFP4_BLOCK_SIZE // 2:
        raise CheckpointError(
            f"{blocks.shard}: {blocks.key} of shape {blocks.shape} does not fit scales {scales.shape}"
        )
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or len(blocks.shape) != 4:
        raise UnsupportedModelError(f"{blocks.shard}: {blocks.key} is not packed as MXFP4 experts are")
    return blocks, scales


def copy_blocks(
    loader: "Loader", experts: Nf4Experts, entries: Mapping[str, TensorEntry], destination: Destination
) -> None:
    """The blocks of all experts, as they are, into their module: a byte's first weight goes into its high half."""
    blocks, scales = _entries(entries)
    spec, projection = experts.spec, destination.projection
    weight = spec.weight_names[projection == "down"]
    parts = layout.fused_projections(spec, weight)
    stack, _ = experts.locate(0, parts[0])
    expected = (spec.num_experts, stack.rows * len(parts), stack.columns)
    shape = (*blocks.shape[:2], blocks.shape[2] * MXFP4_BLOCK_SIZE)
    if shape != expected:
        raise CheckpointError(f"{blocks.shard}: tensor {blocks.key} holds {shape} weights, expected {expected}")

    def by_projection(rows: Tensor) -> tuple[Tensor, ...]:
        return layout.to_matrices(spec, weight, rows.T if spec.is_transposed else rows)

    for expert in range(spec.num_experts):
        packed = blocks.read_part(expert).flatten(1)
        packed = (packed << 4) | (packed >> 4)
        both = zip(parts, by_projection(packed), by_projection(scales.read_part(expert)), strict=True)
        for part, codes, exponents in both:
            loader.claim(blocks, destination.name, part, expert)
            stack, index = experts.locate(expert, part)
            with torch.no_grad():
                stack.packed[index].copy_(codes)
                stack.absmax[index].copy_(exponents.reshape(-1))
