"""MXFP4 checkpoints: a stack's blocks kept as they are, or dequantized to be quantized as any other weights.

MXFP4 (OCP Microscaling Formats 1.0, section 5.2) keeps a stack of matrices [E, N, K] as `X_blocks` (uint8
[E, N, K/32, 16], the first weight of a byte in its low half) and `X_scales` (uint8 [E, N, K/32], an exponent of two
plus 127). Blocks are kept, their halves swapped, or dequantized one matrix at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertune.checkpoint.formats.interface import Kept, Piece, Target
from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import DequantizedEntry, TensorEntry
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.experts import layout
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import MXFP4_BLOCK_SIZE
from expertune.kernels.nf4.reference import codebook

_BLOCKS, _SCALES = "_blocks", "_scales"
_SCALE_BIAS = 127


def recognizes(config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """See `Format`; names alone never say it."""
    return config is not None and config.get("quant_method") == "mxfp4"


def unreadable(config: Mapping[str, Any]) -> None:
    """See `Format`; all of it can be read."""


def parts_of(keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """See `Format`; a stack is its `blocks` and `scales`."""
    known = set(keys)
    parts = {}
    for key in keys:
        name = key.removesuffix(_BLOCKS)
        if name != key:
            if name + _SCALES not in known:
                raise CheckpointError(
                    f"tensor {key} has no {name + _SCALES} beside it; copy the checkpoint again from where it came"
                )
            parts[name] = {"blocks": key, "scales": name + _SCALES}
    return parts


def kept(pieces: Sequence[Piece], model: nn.Module, names: NameMap) -> Kept:
    """See `Format`; stacks of experts stay, linears are quantized as those of any other checkpoint."""
    is_expert = (piece.format is not None and names.locate(piece.key).projection is not None for piece in pieces)
    return Kept("mxfp4" if any(is_expert) else None)


def place(target: Target, piece: Piece, entries: Mapping[str, TensorEntry]) -> bool:
    """See `Format`; blocks are copied into experts that are held in MXFP4, and dequantized for all others."""
    blocks, scales = entries["blocks"], entries["scales"]
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != MXFP4_BLOCK_SIZE // 2:
        raise CheckpointError(
            f"{blocks.shard}: {blocks.key} of shape {blocks.shape} does not fit scales {scales.shape}"
        )
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or len(blocks.shape) != 4:
        raise UnsupportedModelError(f"{blocks.shard}: {blocks.key} is not packed as MXFP4 experts are")
    destination = target.names.locate(piece.key)
    experts = target.model.get_submodule(destination.name) if destination.projection else None
    if isinstance(experts, Nf4Experts) and experts.down.scheme == "mxfp4":
        _copy_blocks(target, experts, blocks, scales, destination)
        return True
    spec = target.names.specs.get(destination.name)
    transposed = spec is not None and spec.is_transposed
    return target.place(_dequantized_entry(piece.key, blocks, scales, transposed), destination)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 blocks as the floats they stand for, exactly.

    Args:
        blocks: uint8 [..., K/32, 16].
        scales: uint8 [..., K/32].

    Returns:
        float32 [..., K].
    """
    values = codebook("mxfp4", blocks.device)
    weights = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1).flatten(-2)
    return torch.ldexp(weights, (scales.int() - _SCALE_BIAS)[..., None]).flatten(-2)


def _dequantized_entry(key: str, blocks: TensorEntry, scales: TensorEntry, transposed: bool) -> DequantizedEntry:
    """A stack of MXFP4 matrices [E, N, K] that reads as transformers stacks its experts."""
    num_experts, out_features, in_features = blocks.shape[0], blocks.shape[1], blocks.shape[2] * MXFP4_BLOCK_SIZE

    def dequantize(expert: int) -> Tensor:
        matrix = dequantize_mxfp4(blocks.read_part(expert), scales.read_part(expert))
        return matrix.T if transposed else matrix

    shape = (num_experts, in_features, out_features) if transposed else (num_experts, out_features, in_features)
    header = replace(blocks, key=key, shape=shape, dtype=torch.float32)
    return DequantizedEntry(**vars(header), dequantize=dequantize)


def _copy_blocks(
    target: Target, experts: Nf4Experts, blocks: TensorEntry, scales: TensorEntry, destination: Destination
) -> None:
    """The blocks of experts that are read here, into their module: a byte's first weight goes into its high half."""
    spec, projection = experts.spec, destination.projection
    weight = spec.weight_names[projection == "down"]
    parts = layout.fused_projections(spec, weight)
    stack, _ = experts.locate(experts.read_here.start, parts[0])
    expected = (spec.num_experts, stack.out_features * len(parts), stack.in_features)
    shape = (*blocks.shape[:2], blocks.shape[2] * MXFP4_BLOCK_SIZE)
    if shape != expected:
        raise CheckpointError(f"{blocks.shard}: tensor {blocks.key} holds {shape} weights, expected {expected}")

    def by_projection(values_N: Tensor) -> tuple[Tensor, ...]:
        return layout.to_matrices(spec, weight, values_N.T if spec.is_transposed else values_N)

    for expert in experts.read_here:
        packed = blocks.read_part(expert).flatten(1)
        packed = (packed << 4) | (packed >> 4)
        both = zip(parts, by_projection(packed), by_projection(scales.read_part(expert)), strict=True)
        for part, codes, exponents in both:
            target.claim(blocks, destination.name, part, expert)
            stack, index = experts.locate(expert, part)
            stack.put(index, packed=codes, absmax=exponents.reshape(-1))
