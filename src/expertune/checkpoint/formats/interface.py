"""What a format of packed weights is to the loader, and the loader to a format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from expertune.checkpoint.names import Destination, NameMap
from expertune.checkpoint.reader import TensorEntry
from expertune.kernels.nf4 import Scheme


@dataclass(frozen=True)
class Piece:
    """Tensors of a checkpoint that make one weight.

    Attributes:
        key: the weight's name on disk.
        parts: part of the weight -> name on disk; of an ordinary tensor only `weight`.
        format: what packed it; None for an ordinary tensor.
    """

    key: str
    parts: Mapping[str, str]
    format: "Format | None" = None


@dataclass(frozen=True)
class Kept:
    """How packed weights are held where their bytes stay as they are.

    Attributes:
        scheme: what the experts' codes stand for; None where no experts are packed.
        double_quantization: whether the experts' scales are held in 8 bits; None where that is still free.
        linears: the 4-bit linears by live name; None where the format leaves that to us.
    """

    scheme: Scheme | None = None
    double_quantization: bool | None = None
    linears: Mapping[str, nn.Linear] | None = None


class Target(Protocol):
    """The model that is being filled, as far as a format needs it.

    Attributes:
        model: its experts have been swapped; other modules are still the family's own.
        names: its name map.
        requantizes: whether packed experts that cannot stay as they are may be quantized again.
        dtype: dtype of the products.
        device: where bytes live.
    """

    model: nn.Module
    names: NameMap
    requantizes: bool
    dtype: torch.dtype
    device: torch.device

    def place(self, entry: TensorEntry, destination: Destination) -> bool:
        """Place an ordinary tensor; False where the model has no place for it."""

    def claim(self, entry: TensorEntry, name: str, projection: str | None, expert: int | None) -> None:
        """Refuse a weight that is stored twice."""


class Format(Protocol):
    """One module of this folder."""

    def recognizes(self, config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
        """Whether a checkpoint is of this format, by its `quantization_config` or, where it has none, tensor names."""

    def unreadable(self, config: Mapping[str, Any]) -> str | None:
        """The variant of this format that a `quantization_config` names, if it is one that cannot be read."""

    def parts_of(self, keys: Sequence[str]) -> dict[str, dict[str, str]]:
        """Which tensors make one packed weight: its name on disk -> part -> name on disk.

        Raises:
            CheckpointError: a tensor without the one that belongs to it.
        """

    def kept(self, pieces: Sequence[Piece], model: nn.Module, names: NameMap) -> Kept:
        """How these weights are held if they stay as they are."""

    def place(self, target: Target, piece: Piece, entries: Mapping[str, TensorEntry]) -> bool:
        """Read one packed weight, and put it where it goes; False where the model has no place for it.

        Raises:
            CheckpointError, UnsupportedModelError: it is damaged, or packed otherwise than can be read; names it.
        """
