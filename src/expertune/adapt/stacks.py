"""The factors of a stack of experts as PEFT on transformers 5 holds them: one A and one B for all of the stack.

A [E * r, in] is expert-major and B [out, E * r] rank-major (`ParamWrapper.get_delta_weight` of PEFT 0.21): [E, r, in]
and [out, r, E]. Separate gate and up are exact there at twice the rank, with a B that is block-diagonal.

Shape suffixes: E experts, r rank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec


def fuse(spec: ExpertsSpec, weight: str, pairs: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a stack as PEFT holds them, from the factors of its projections.

    Args:
        spec: of the experts module.
        weight: which of `spec.weight_names`.
        pairs: for each of its projections A [E, r, in] and B [E, out, r]; ranks may differ.
        rank: of the result; each projection has an equal share of it, filled up with zeros.

    Returns:
        A [E * rank, in] and B [out of all projections, E * rank].
    """
    share = rank // len(pairs)
    a = torch.cat([pad(part, share, dim=1) for part, _ in pairs], dim=1)
    columns = [
        torch.nn.functional.pad(part, (index * share, rank - index * share - part.shape[2]))
        for index, (_, part) in enumerate(pairs)
    ]
    # Output features first, [out, E, rank]: the family's order is one of output features.
    wide = max((part.dtype for part in columns), key=lambda dtype: dtype.itemsize)
    b = layout.join_rows(spec, weight, [part.to(wide).transpose(0, 1) for part in columns])
    return a.reshape(-1, a.shape[2]), b.transpose(1, 2).reshape(b.shape[0], -1)


def unfuse(spec: ExpertsSpec, weight: str, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The way back: A [E, rank, in], which all projections share, and for each B [E, out, rank]; views where possible.

    Args:
        spec: of the experts module.
        weight: which of `spec.weight_names`.
        a: [E * rank, in].
        b: [out of all projections, E * rank].
    """
    stacked = a.reshape(spec.num_experts, -1, a.shape[1])
    features = b.reshape(b.shape[0], -1, spec.num_experts)
    return stacked, [part.permute(2, 0, 1) for part in layout.split_rows(spec, weight, features)]


def separate(a: Tensor, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of each projection from a stack's: its own share of the rank where B is block-diagonal, else all of A."""
    share = a.shape[1] // len(parts)
    blocks = [slice(index * share, (index + 1) * share) for index in range(len(parts))]

    def is_own(part: Tensor, block: slice) -> bool:
        return not part[:, :, : block.start].any() and not part[:, :, block.stop :].any()

    if a.shape[1] % len(parts) or not all(is_own(part, block) for part, block in zip(parts, blocks, strict=True)):
        yield from ((a, part) for part in parts)
    else:
        yield from ((a[:, block], part[:, :, block]) for part, block in zip(parts, blocks, strict=True))


def pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Zeros after the end of a dimension; nothing is copied where none are needed."""
    if tensor.shape[dim] >= size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
