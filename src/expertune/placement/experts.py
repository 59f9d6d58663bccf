"""Where each layer's expert bytes wait: on the device, in the host's memory, or on disk; set once, or changed in a run.

On a CPU the host is the device, and a layer on disk is used from the mapped file. On a GPU layers that wait on the host
or on disk are copied into two slots.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expertune.checkpoint.reader import TensorEntry
from expertune.checkpoint.restore import ReadExperts
from expertune.checkpoint.store import BUFFERS, STACKS, is_nf4_folder, read_nf4_folder
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import Nf4Bytes
from expertune.placement.mapped import MappedLayers, map_tensor
from expertune.placement.slots import SlotLayers
from expertune.placement.stream import Carrier, Stream

Place = Literal["device", "host", "disk"]

# Tensors of an experts module as files and carriers have them: those of gate_up, then those of down.
Files = Mapping[str, list[TensorEntry]]


class Placement:
    """Where the experts of one model wait.

    Args:
        experts: the experts modules by name, in the order of the model's forward.
        device: where they are used.
        files: for layers that may wait on disk, the entries of their eight tensors.
        host_apart: whether the host's memory is another than the device's; None where it follows from the device.

    Attributes:
        places: where each module's bytes wait.
    """

    def __init__(
        self,
        experts: Mapping[str, Nf4Experts],
        device: torch.device,
        files: Files | None = None,
        host_apart: bool | None = None,
    ) -> None:
        self.experts, self.device, self.files = dict(experts), device, files or {}
        self.host_apart = device.type != "cpu" if host_apart is None else host_apart
        self.places: dict[str, Place] = dict.fromkeys(self.experts, "device")
        for module in self.experts.values():
            module.computes_on = device
        self._stream: Stream | None = None

    def put(self, places: Mapping[str, Place]) -> None:
        """Move bytes to where they are to wait; modules that are not named stay where they are.

        Raises:
            ValueError: a module is to wait on disk that has no file.
        """
        if missing := [name for name, place in places.items() if place == "disk" and name not in self.files]:
            raise ValueError(f"{missing[0]}: no NF4 folder holds these experts, so that they cannot wait on disk")
        if self._stream is not None:
            self._stream.close()
        for name, place in places.items():
            self._move(name, place)
            self.places[name] = place
        self._connect()

    def describe(self) -> dict[str, Any]:
        """Plain values for the run's record."""
        stream = self._stream
        return {
            "layers": dict(Counter(self.places.values())),
            "streamed_bytes": sum(_nbytes(self.experts[name]) for name in self._streamed()),
            "transfers": stream.transfers if stream else 0,
            "waited_seconds": round(stream.waited_seconds, 3) if stream else 0.0,
        }

    def _streamed(self) -> list[str]:
        """Modules whose bytes are brought; on a CPU the host is the device."""
        resident = ("device",) if self.host_apart else ("device", "host")
        return [name for name in self.experts if self.places[name] not in resident]

    def _move(self, name: str, place: Place) -> None:
        module = self.experts[name]
        if place == "disk":
            tensors = [map_tensor(entry) for entry in self.files[name]]
        elif place == "host" and self.host_apart:
            waiting = (tensor.cpu() for tensor in _tensors(module))
            tensors = [tensor.pin_memory() if self.device.type == "cuda" else tensor for tensor in waiting]
        elif self.places[name] == "disk":
            tensors = [tensor.to(self.device, copy=True) for tensor in _tensors(module)]
        else:
            tensors = [tensor.to(self.device) for tensor in _tensors(module)]
        for stack, held in ((module.gate_up, tensors[:4]), (module.down, tensors[4:])):
            stack.place(Nf4Bytes(*held), stays=place != "device")

    def _connect(self) -> None:
        streamed = self._streamed()
        for module in self.experts.values():
            module.between.transport = None
        self._stream = None
        if not streamed:
            return
        layers = [_tensors(self.experts[name]) for name in streamed]
        carrier: Carrier = SlotLayers(layers, self.device) if self.host_apart else MappedLayers(layers)
        self._stream = Stream(carrier, len(layers))
        for name, leg in zip(streamed, self._stream.legs(), strict=True):
            self.experts[name].between.transport = leg

    def __deepcopy__(self, memo: Any) -> "Placement":
        # A copy of the model reads the same bytes.
        return self


def reading(places: Mapping[str, Place], device: torch.device) -> ReadExperts:
    """What `load_model` reads the experts of an NF4 folder with: each layer's bytes come to their place at once.

    Args:
        places: where each experts module is to wait; on the device where it is not named.
        device: where the model computes.
    """

    def read(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        place = places.get(name, "device")
        if place == "disk":
            return {key: map_tensor(entry) for key, entry in entries.items()}
        to = torch.device("cpu") if place == "host" else device
        return {key: entry.read().to(to) for key, entry in entries.items()}

    return read


def place_experts(model: nn.Module, places: Mapping[str, Place], device: torch.device, folder: str | Path) -> Placement:
    """Put a loaded model's experts where they are to wait, and keep the placement with the model.

    Args:
        model: from `expertune.checkpoint.load.load_model`.
        places: where each experts module is to wait.
        device: where the model computes.
        folder: the model's folder; of an NF4 folder layers can wait on disk.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Nf4Experts)}
    files: dict[str, list[TensorEntry]] = {}
    if is_nf4_folder(folder):
        stored = read_nf4_folder(folder)
        for name in experts:
            _, entries = stored.experts_entries(name)
            files[name] = [entries[f"{stack}.{buffer}"] for stack in STACKS for buffer in BUFFERS]
    placement = Placement(experts, device, files)
    placement.put({name: places.get(name, "device") for name in experts})
    model.expert_placement = placement  # type: ignore[assignment]
    return placement


def demote(model: nn.Module) -> str | None:
    """Move half of the layers that are still on the device to the host, or from there to disk, in mid-run.

    Returns:
        What was done, in a sentence; None where nothing is left to move.
    """
    placement = placement_of(model)
    if placement is None:
        return None
    next_place: dict[Place, Place] = {"device": "host" if placement.host_apart else "disk", "host": "disk"}
    for origin, target in next_place.items():
        movable = [
            name
            for name, place in placement.places.items()
            if place == origin and (target == "host" or name in placement.files)
        ]
        if movable:
            moved = movable[: -(-len(movable) // 2)]
            placement.put(dict.fromkeys(moved, target))
            return f"experts of {len(moved)} layers wait on {'disk' if target == 'disk' else 'the host'}"
    return None


def placement_of(model: nn.Module) -> Placement | None:
    """The placement of a model's experts, whatever is wrapped around it."""
    found = (getattr(module, "expert_placement", None) for module in model.modules())
    return next((placement for placement in found if placement is not None), None)


def _tensors(module: Nf4Experts) -> list[Tensor]:
    return [*(tensor.detach() for tensor in module.gate_up.bytes), *(tensor.detach() for tensor in module.down.bytes)]


def _nbytes(module: Nf4Experts) -> int:
    return module.gate_up.nbytes + module.down.nbytes
