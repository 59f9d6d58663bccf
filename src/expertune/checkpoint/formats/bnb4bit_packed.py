"""One weight as bitsandbytes packed it into 4 bits: its quantization state, held to what our kernels multiply.

Shape suffixes: N output features, K input features.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertune.checkpoint.linears import NF4_STATE
from expertune.checkpoint.reader import DequantizedEntry, TensorEntry
from expertune.errors import CheckpointError, UnsupportedModelError
from expertune.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from expertune.kernels.nf4.reference import dynamic_codebook, nf4_codebook
from expertune.storage import how_to_replace

if TYPE_CHECKING:  # to recognize a checkpoint and count its bytes takes none of it
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True)
class Packed:
    """A weight as bitsandbytes packed it; `state` is the JSON of its quantization state."""

    entry: TensorEntry
    parts: Mapping[str, TensorEntry]
    state: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that was packed."""
        return tuple(self.state["shape"])

    @property
    def nested(self) -> bool:
        """Whether its scales are themselves held in 8 bits."""
        return "nested_absmax" in self.parts

    @property
    def dequantized(self) -> DequantizedEntry:
        """The weight that was packed, of its dtype then, by bitsandbytes' own code."""
        from bitsandbytes.functional import dequantize_4bit

        header = replace(self.entry, shape=self.shape, dtype=getattr(torch, self.state["dtype"]))
        return DequantizedEntry(
            **vars(header), dequantize=lambda: dequantize_4bit(self.entry.read(), self._quant_state())
        )

    def scales(self) -> Tensor:
        """Scale of each block, float32 [N*K/64], by bitsandbytes' own code."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self._quant_state()
        if not self.nested:
            return state.absmax.view(-1)
        return (dequantize_blockwise(state.absmax, state.state2) + state.offset).view(-1)

    def read_state(self) -> dict[str, Tensor]:
        """Its quantization state by part."""
        return {part: entry.read() for part, entry in self.parts.items() if part != "weight"}

    def _quant_state(self) -> "QuantState":
        from bitsandbytes.functional import QuantState

        return QuantState.from_dict(self.read_state(), torch.device("cpu"))


def read_packed(key: str, entries: Mapping[str, TensorEntry]) -> Packed:
    """The state of a packed weight, checked against what our kernels multiply.

    Args:
        key: the weight's name on disk.
        entries: its tensors by part.

    Raises:
        CheckpointError: a part is missing or damaged; names it.
        UnsupportedModelError: packed in other blocks, or with another codebook.
    """
    if any(part.startswith("quant_state.") and part != NF4_STATE for part in entries):
        shard = next(iter(entries.values())).shard
        raise UnsupportedModelError(
            f"{shard}: {key}: 4-bit values of another kind than nf4: give the 16-bit checkpoint"
        )
    for part in ("weight", "absmax", "quant_map", NF4_STATE):
        if part not in entries:
            shard = next(iter(entries.values())).shard
            raise CheckpointError(f"{shard}: {key}: its {part} is missing; {how_to_replace(shard)}")
    entry = entries["weight"]
    try:
        state = json.loads(bytes(entries[NF4_STATE].read().numpy()))
        shape, block_size, nested = tuple(state["shape"]), state["blocksize"], state.get("nested_blocksize")
        getattr(torch, state["dtype"])
        offset = float(state["nested_offset"]) if "nested_absmax" in entries else 0.0
        numel = torch.Size(shape).numel()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{entry.shard}: the quantization state of {key} is damaged ({error!r}); {how_to_replace(entry.shard)}"
        ) from None
    packed = Packed(entry, entries, state)
    if block_size != BLOCK_SIZE or (packed.nested and nested != NESTED_BLOCK_SIZE):
        raise UnsupportedModelError(
            f"{entry.shard}: {key} has blocks of {block_size}, and of {nested} for their scales; only "
            f"{BLOCK_SIZE} and {NESTED_BLOCK_SIZE} can be read: give the 16-bit checkpoint"
        )
    if len(shape) not in (2, 3) or entry.dtype != torch.uint8 or entry.nbytes * 2 != numel:
        raise CheckpointError(f"{entry.shard}: {key} of shape {shape} cannot lie in {entry.nbytes} bytes")
    scales = torch.uint8 if packed.nested else torch.float32
    blocks = -(-numel // BLOCK_SIZE)
    if (
        entries["absmax"].numel != blocks
        or entries["absmax"].dtype != scales
        or (packed.nested and entries["nested_absmax"].numel != -(-blocks // NESTED_BLOCK_SIZE))
        or not torch.isfinite(torch.tensor(offset))
    ):
        raise CheckpointError(f"{entry.shard}: the scales of {key} do not fit its shape {shape}")
    maps = {"quant_map": nf4_codebook} | ({"nested_quant_map": dynamic_codebook} if packed.nested else {})
    for part, codebook in maps.items():
        if part not in entries or not torch.equal(entries[part].read().float(), codebook(torch.device("cpu"))):
            raise UnsupportedModelError(f"{entry.shard}: the {part} of {key} is not bitsandbytes' own")
    return packed


def require_shape(packed: Packed, expected: set[tuple[int, ...]]) -> None:
    """Raises CheckpointError where a packed weight is of none of some shapes."""
    if packed.shape not in expected:
        raise CheckpointError(
            f"{packed.entry.shard}: tensor {packed.entry.key} has shape {packed.shape}, expected shape "
            f"{' or '.join(str(shape) for shape in sorted(expected, key=len, reverse=True))}"
        )
