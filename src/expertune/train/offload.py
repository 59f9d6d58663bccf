"""What forward saves for backward is offloaded to the host.

torch hands every tensor that an operator saves to a pair of hooks; here a tensor is copied to the host when it is saved
and back when backward asks for it, bit for bit and in the same layout, on the computing stream. With activation
checkpointing that is the input of each checkpointed layer, and the tape of its experts' outputs
(`expertune.experts.replay`) goes the same way. torch's own `save_on_cpu` would copy the model's frozen weights as well,
and a tensor that four operators save four times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from expertune.experts import replay

# Below this a copy takes longer to start than to make.
_LEAST_BYTES = 2**16

# Devices whose memory is not the host's.
_DEVICE_TYPE = "cuda"


def has_separate_host(device: torch.device) -> bool:
    """Whether a device's memory is not the host's, so that something can be offloaded."""
    return device.type == _DEVICE_TYPE


@contextmanager
def activations_on_host(
    model: nn.Module, _device_type: str | None = None, _least_bytes: int | None = None
) -> Iterator["Offloaded"]:
    """Around a forward: what it saves for backward is held on the host, in pinned memory under a CUDA device.

    Parameters and buffers of the model stay on the device, and so do tensors that are small or not floating-point.
    Gradients are byte-identical. Without gradients nothing is saved, and nothing is copied.

    Args:
        model: the model whose forward runs.
    """
    offloaded = Offloaded(model, _device_type or _DEVICE_TYPE, _LEAST_BYTES if _least_bytes is None else _least_bytes)
    with saved_tensors_hooks(offloaded.pack, offloaded.unpack), replay.held_by(offloaded.hold):
        try:
            yield offloaded
        finally:
            offloaded.forget()


class Offloaded:
    """The hooks of one forward.

    Attributes:
        num_packed: tensors that were copied to the host.
        num_shared: tensors that an earlier copy serves.
        num_unpacked: copies back.
    """

    def __init__(self, model: nn.Module, device_type: str, least_bytes: int) -> None:
        self.num_packed = self.num_shared = self.num_unpacked = 0
        self._device_type, self._least_bytes = device_type, least_bytes
        tensors = chain(model.parameters(), model.buffers())
        self._stays = {_address(tensor) for tensor in tensors if tensor.device.type == device_type}
        self._copies: dict[Any, _Copy] = {}

    def pack(self, tensor: Tensor) -> "_Copy | Tensor":
        """Called with what an operator saves."""
        if not self._moves(tensor):
            return tensor
        # The weak reference keeps the storage's address from being taken by another as long as it is a key here.
        where = StorageWeakRef(tensor.untyped_storage())
        key = (where, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key in self._copies:
            self.num_shared += 1
        else:
            self.num_packed += 1
            self._copies[key] = _Copy(tensor)
        return self._copies[key]

    def unpack(self, packed: "_Copy | Tensor") -> Tensor:
        """Called when backward asks for it."""
        if isinstance(packed, Tensor):
            return packed
        self.num_unpacked += 1
        return packed.on_device()

    def hold(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Offload a tensor that no operator saves; call what is returned to get it back."""
        if not self._moves(tensor):
            kept = tensor.clone()
            return lambda: kept
        self.num_packed += 1
        copy = _Copy(tensor)
        return lambda: self.unpack(copy)

    def forget(self) -> None:
        """The forward has ended: copies live as long as the graph needs them."""
        self._copies.clear()

    def _moves(self, tensor: Tensor) -> bool:
        nbytes = tensor.numel() * tensor.element_size()
        return (
            tensor.device.type == self._device_type
            and tensor.layout is torch.strided
            and tensor.is_floating_point()
            # An expanded tensor is larger than what it is made of.
            and self._least_bytes <= nbytes <= tensor.untyped_storage().nbytes()
            and _address(tensor) not in self._stays
        )


class _Copy:
    """A tensor's copy on the host, in the tensor's own layout."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        pinned = tensor.device.type == "cuda"
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
        with torch.no_grad():
            self._host.copy_(tensor, non_blocking=pinned)

    def on_device(self) -> Tensor:
        return self._host.to(self._device, non_blocking=True, copy=True)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
