"""LoraUpdate: a low-rank update of frozen weights, one type from the module that holds the factors to the kernels.

Shape suffixes: E experts, S experts that have factors, r rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCHEMA = (
    "int[] parts, float[] scalings, float[] dropouts, Tensor seeds, "
    "Tensor[] a, Tensor[] b, Tensor[] slots, Tensor[] gains"
)
"""The arguments of a torch operator that `pack` makes of updates."""


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """A low-rank update of one projection of every expert: y += scaling * B[e] @ A[e] @ dropout(x).

    Where only some experts have one, S is how many, and the others' output stays as it is.

    With a gain the whole output is scaled, y = gain[e] * (W @ x' + scaling * B[e] @ A[e] @ x') + W @ (x - x') of the
    dropped input x', which is the input itself without dropout (DoRA); such an update is the only one of its part
    for the experts that it has.

    Attributes:
        part: 0 .. P-1 for a part of the first GEMM, P for down.
        a: [S, r, in_features]; S is E where every expert has one.
        b: [S, out_features, r], of A's dtype.
        scaling: alpha / r, or alpha / sqrt(r).
        dropout: probability that an element of the update's input is dropped.
        seed: of the dropout; the operator draws it, int64 [] on the device.
        slots: where each expert's factors lie, -1 for an expert without any: int64 [E]; None where all have some.
        gain: float32 [S, out_features]; None scales nothing.
    """

    part: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | int = 0
    slots: Tensor | None = None
    gain: Tensor | None = None

    def of_all(self) -> "LoraUpdate":
        """The same update with factors for every expert: zeros for those that have none, and gains of one."""
        if self.slots is None:
            return self
        # One more, which is zeros, for all that have none.
        places = torch.where(self.slots < 0, len(self.a), self.slots)
        a, b = (torch.cat([each, torch.zeros_like(each[:1])])[places] for each in (self.a, self.b))
        gain = None if self.gain is None else torch.cat([self.gain, torch.ones_like(self.gain[:1])])[places]
        return replace(self, a=a, b=b, slots=None, gain=gain)


def beyond(a: Tensor, b: Tensor, first_a: Tensor, first_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of twice the rank of what B A has beyond the product of the factors that it began with.

    B A - B0 A0 is (B - B0) A + B0 (A - A0): of factors that have not moved zero to the bit, and small where they have
    moved little, so that nothing large is taken from anything large, in whatever dtype the sum is computed.

    Args:
        a: [..., r, in_features].
        b: [..., out_features, r].
        first_a: A0, of A's shape.
        first_b: B0, of B's shape.
    """
    return beyond_a(a, first_a), beyond_b(b, first_b)


def beyond_a(a: Tensor, first_a: Tensor) -> Tensor:
    """[..., 2r, in_features] of `beyond`."""
    return torch.cat([a, a - first_a], dim=-2)


def beyond_b(b: Tensor, first_b: Tensor) -> Tensor:
    """[..., out_features, 2r] of `beyond`."""
    return torch.cat([b - first_b, first_b], dim=-1)


class OwnUpdate(NamedTuple):
    """An update of one expert: its number among all updates, where the expert's factors lie, and these alone."""

    number: int
    slot: int
    update: LoraUpdate


@lru_cache(maxsize=4096)
def slots_of(experts: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
    """`LoraUpdate.slots` of the experts that have factors, in the order of these; made once."""
    with torch.inference_mode(False):
        slots = torch.full((num_experts,), -1, dtype=torch.int64)
        slots[list(experts)] = torch.arange(len(experts))
        return slots.to(device)


def updates_by_expert(updates: Sequence[LoraUpdate]) -> Callable[[int], list[OwnUpdate]]:
    """A function that gives an expert's updates, with factors [r, in] and [out, r]."""
    places = [None if update.slots is None else update.slots.tolist() for update in updates]

    def of_expert(expert: int) -> list[OwnUpdate]:
        found = []
        for number, (update, slots) in enumerate(zip(updates, places, strict=True)):
            slot = expert if slots is None else slots[expert]
            if slot >= 0:
                found.append(OwnUpdate(number, slot, _of_slot(update, slot)))
        return found

    return of_expert


def _of_slot(update: LoraUpdate, slot: int) -> LoraUpdate:
    gain = None if update.gain is None else update.gain[slot]
    return replace(update, a=update.a[slot], b=update.b[slot], gain=gain)


def pack(updates: Sequence[LoraUpdate], seeds: Tensor) -> tuple[Any, ...]:
    """Updates as flat arguments of a torch operator (`SCHEMA`), with a seed for each, int64 [updates]."""
    return (
        [update.part for update in updates],
        [update.scaling for update in updates],
        [update.dropout for update in updates],
        seeds,
        [update.a for update in updates],
        [update.b for update in updates],
        [seeds.new_empty(0) if update.slots is None else update.slots for update in updates],
        [update.b.new_empty(0) if update.gain is None else update.gain for update in updates],
    )


def unpack(*packed: Any) -> list[LoraUpdate]:
    """The way back from `pack`; each update has its seed."""
    parts, scalings, dropouts, seeds, a, b, slots, gains = packed
    places, scaled = ([each if each.numel() else None for each in held] for held in (slots, gains))
    values = zip(parts, a, b, scalings, dropouts, seeds.unbind(), places, scaled, strict=True)
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
