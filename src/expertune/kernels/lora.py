"""LoraUpdate: a low-rank update of frozen weights, one type from the module that holds the factors to the kernels.

Shape suffixes: E experts, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCHEMA = "int[] parts, float[] scalings, float[] dropouts, Tensor seeds, Tensor[] a, Tensor[] b"
"""The arguments of a torch operator that `pack` makes of updates."""


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """A low-rank update of one projection of every expert: y += scaling * B[e] @ A[e] @ dropout(x).

    Attributes:
        part: 0 .. P-1 for a part of the first GEMM, P for down.
        a: [E, r, in_features].
        b: [E, out_features, r], of A's dtype.
        scaling: alpha / r, or alpha / sqrt(r).
        dropout: probability that an element of the update's input is dropped.
        seed: of the dropout; the operator draws it, int64 [] on the device.
    """

    part: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | int = 0


def pack(updates: Sequence[LoraUpdate], seeds: Tensor) -> tuple[Any, ...]:
    """Updates as flat arguments of a torch operator (`SCHEMA`), with a seed for each, int64 [updates]."""
    return (
        [update.part for update in updates],
        [update.scaling for update in updates],
        [update.dropout for update in updates],
        seeds,
        [update.a for update in updates],
        [update.b for update in updates],
    )


def unpack(
    parts: list[int], scalings: list[float], dropouts: list[float], seeds: Tensor, a: list[Tensor], b: list[Tensor]
) -> list[LoraUpdate]:
    """The way back from `pack`; each update has its seed."""
    values = zip(parts, a, b, scalings, dropouts, seeds.unbind(), strict=True)
    return [LoraUpdate(*each) for each in values]


def draw_seeds(updates: Sequence[LoraUpdate], device: torch.device) -> Tensor:
    """A dropout seed for each update, int64 [updates].

    Drawn from torch's own generator of the device, so that a run's seed decides, and checkpointing draws the same
    again; on a GPU they stay there, and a captured graph draws new ones each time. Without dropout nothing is drawn: an
    evaluation must not move what training draws next.
    """
    if any(update.dropout > 0 for update in updates):
        return torch.randint(2**62, (len(updates),), device=device)
    return torch.zeros(len(updates), dtype=torch.int64)
