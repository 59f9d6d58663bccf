"""Expert bytes of which each rank holds a slice, gathered into two slots: one in use, one being filled.

A rank's slice lies on the device, on the host or in a mapped file. It is copied to its place in a slot, and the slices
of the other ranks arrive beside it: what kernels read are views of the slot. On CUDA the copies are issued on a stream
of their own and NCCL's transfers after them, beside the computation. All ranks start layers in one order.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from expertune.distributed.sharded import ExpertSharding
from expertune.errors import DoesNotFitError
from expertune.kernels.nf4 import Part
from expertune.placement.mapped import page_out
from expertune.placement.out_of_memory import in_one_line, is_out_of_memory
from expertune.placement.slots import SlotLayers


class GatheredLayers(SlotLayers):
    """A `Backend` for layers that all ranks hold together.

    Args:
        slices: this rank's part of each layer's tensors, flat as uint8.
        wholes: each layer's tensors as kernels read them, without memory.
        sharding: the ranks.
        device: the device that computes.
        paged: layers whose slices are mapped, and leave memory when they have been copied.
    """

    def __init__(
        self,
        slices: Sequence[list[Tensor]],
        wholes: Sequence[list[Tensor]],
        sharding: ExpertSharding,
        device: torch.device,
        paged: Collection[int] = (),
    ) -> None:
        self._wholes, self._sharding, self._paged = list(wholes), sharding, set(paged)
        part = Part(sharding.rank, sharding.size)
        self._starts = [[part.rank * part.each(whole) for whole in of_layer] for of_layer in wholes]
        rooms = [[_bytes(part.size * part.each(whole)) for whole in of_layer] for of_layer in wholes]
        super().__init__(slices, device, rooms)

    def start(self, layer: int) -> None:
        """Start to fill a free slot, as soon as all ranks do.

        Raises:
            AbandonedError: a rank is out of memory; see `expertune.distributed.mesh.Ranks.proceed`.
        """
        self._sharding.proceed()
        super().start(layer)

    def wait(self, layer: int) -> list[Tensor]:
        """The layer's tensors in its slot; work that is issued after this sees them filled."""
        rooms = super().wait(layer)
        self._sharding.wait(layer)
        return [
            room[: whole.nbytes].view(whole.dtype).view(whole.shape)
            for room, whole in zip(rooms, self._wholes[layer], strict=True)
        ]

    def drop(self, layer: int) -> None:
        """Free the layer's slot, once all that is on its way has arrived there.

        Raises:
            DoesNotFitError: memory ran out while the slot was filled, and other ranks may wait for this one's slice.
        """
        if (error := self._loading[layer].exception()) is not None:
            super().drop(layer)
            if not is_out_of_memory(error):
                return  # it has ended the run where it was waited for
            raise DoesNotFitError(
                f"memory ran out while expert layer {layer} was gathered ({in_one_line(error)}), which the other "
                "processes wait for, so that none can run it again; lower training.per_device_train_batch_size, or "
                "start more processes"
            ) from error
        self.wait(layer)
        self.used(layer)
        super().drop(layer)

    def _targets(self, layer: int) -> list[Tensor]:
        held = zip(self._rooms_of(layer), self._starts[layer], self._layers[layer], strict=True)
        return [room[start : start + own.numel()] for room, start, own in held]

    def _copied(self, layer: int) -> None:
        if layer in self._paged:
            page_out(self._layers[layer])
        self._sharding.start(layer, [room for room in self._rooms_of(layer) if room.numel()])


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")
