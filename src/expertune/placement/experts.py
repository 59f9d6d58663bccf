"""Where each layer's expert bytes are held: on the device, the host or disk; set at the start, changeable during a run.

On a CPU the host is the device, and a layer on disk is used from the mapped file. On a GPU, layers on the host or on
disk are copied into two slots. Where ranks hold a slice of each layer, it is the slice that is held somewhere, and all
layers are gathered into two slots.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from expertune.checkpoint.formats.nf4_folder import BUFFERS, STACKS, is_nf4_folder, read_nf4_folder
from expertune.checkpoint.reader import TensorEntry
from expertune.checkpoint.restore import ReadExperts, own_part
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import Nf4Bytes
from expertune.placement import Location
from expertune.placement.gathered import GatheredLayers
from expertune.placement.mapped import MappedLayers, map_tensor
from expertune.placement.prefetch import Backend, Prefetcher
from expertune.placement.slots import SlotLayers
from expertune.text import counted

# Tensors of an experts module as files and backends hold them: those of gate_up, then those of down.
Files = Mapping[str, list[TensorEntry]]


class Placement:
    """Where the experts of one model are held.

    Args:
        experts: the experts modules by name, in the order of the model's forward.
        device: the device that computes.
        files: for layers that may be offloaded to disk, the entries of their eight tensors.
        separate_host: the host's memory is not the device's; None means as it is with this device.

    Attributes:
        locations: where each module's bytes are held.
    """

    def __init__(
        self,
        experts: Mapping[str, Nf4Experts],
        device: torch.device,
        files: Files | None = None,
        separate_host: bool | None = None,
    ) -> None:
        self.experts, self.device, self.files = dict(experts), device, files or {}
        self.separate_host = device.type != "cpu" if separate_host is None else separate_host
        self.locations: dict[str, Location] = dict.fromkeys(self.experts, "device")
        for module in self.experts.values():
            module.computes_on = device
        self._sharding = next((module.sharding for module in self.experts.values()), None)
        self._prefetcher: Prefetcher | None = None

    def move(self, locations: Mapping[str, Location]) -> None:
        """Move bytes to where they are to be held; modules that are not named stay where they are.

        Raises:
            ValueError: a module without a file is to be offloaded to disk.
        """
        if missing := [name for name, to in locations.items() if to == "disk" and name not in self.files]:
            raise ValueError(f"{missing[0]}: no NF4 folder holds these experts, so they cannot be offloaded to disk")
        if self._prefetcher is not None:
            self._prefetcher.close()
        for name, to in locations.items():
            self._move(name, to)
            self.locations[name] = to
        self._connect()

    def drop_loaded(self) -> None:
        """Drop what has been loaded of offloaded or sharded layers; it is loaded again when it is used."""
        if self._prefetcher is not None:
            self._prefetcher.drop_loaded()

    @property
    def is_prefetched(self) -> bool:
        """Whether layers are loaded for their use."""
        return self._prefetcher is not None

    def in_turns(self) -> AbstractContextManager[None]:
        """While open, several forwards pass each layer before the next; see `Prefetcher.in_turns`."""
        return self._prefetcher.in_turns() if self._prefetcher else nullcontext()

    def offload_more(self) -> str | None:
        """Move half of the layers that are still on the device to the host, or from there to disk, during a run.

        Returns:
            What was moved, in words; None where nothing is left to move.
        """
        next_location: dict[Location, Location] = {"device": "host" if self.separate_host else "disk", "host": "disk"}
        for origin, target in next_location.items():
            movable = [
                name
                for name, location in self.locations.items()
                if location == origin and (target == "host" or name in self.files)
            ]
            if movable:
                moved = movable[: -(-len(movable) // 2)]
                self.move(dict.fromkeys(moved, target))
                where = "disk" if target == "disk" else "the host"
                return f"experts of {counted(len(moved), 'layer')} are offloaded to {where}"
        return None

    def describe(self) -> dict[str, Any]:
        """Plain values for the run's record."""
        prefetcher = self._prefetcher
        found = {
            "layers": dict(Counter(self.locations.values())),
            "streamed_bytes": sum(_nbytes(self.experts[name]) for name in self._prefetched()),
            "transfers": prefetcher.transfers if prefetcher else 0,
            "waited_seconds": round(prefetcher.waited_seconds, 3) if prefetcher else 0.0,
        }
        if prefetcher and isinstance(prefetcher.backend, GatheredLayers):
            found["slot_bytes"] = prefetcher.backend.nbytes
        return found

    @property
    def offloaded(self) -> list[str]:
        """Modules whose bytes are not where they are computed with; on a CPU the host is the device."""
        resident = ("device",) if self.separate_host else ("device", "host")
        return [name for name in self.experts if self.locations[name] not in resident]

    def _prefetched(self) -> list[str]:
        """Modules whose bytes are prefetched: offloaded, or held in shares by several ranks."""
        return list(self.experts) if self._sharding else self.offloaded

    def _move(self, name: str, to: Location) -> None:
        module = self.experts[name]
        match to:
            case "disk":
                tensors = [map_tensor(entry) for entry in self.files[name]]
            case "host" if self.separate_host:
                on_host = (tensor.cpu() for tensor in _tensors(module))
                tensors = [tensor.pin_memory() if self.device.type == "cuda" else tensor for tensor in on_host]
            case "device" | "host":
                # What was mapped is read into memory of its own.
                was_mapped = self.locations[name] == "disk"
                tensors = [tensor.to(self.device, copy=was_mapped) for tensor in _tensors(module)]
            case _:
                assert_never(to)
        for stack, held in ((module.gate_up, tensors[:4]), (module.down, tensors[4:])):
            stack.place(Nf4Bytes(*held), stays=to != "device")

    def _connect(self) -> None:
        names = self._prefetched()
        for module in self.experts.values():
            module.layer.handle = None
        self._prefetcher = None
        if not names:
            return
        self._prefetcher = Prefetcher(self._backend(names), len(names))
        for name, handle in zip(names, self._prefetcher.handles(), strict=True):
            self.experts[name].layer.handle = handle

    def _backend(self, names: Sequence[str]) -> Backend:
        """What transfers these layers to the device that computes.

        Another place to hold bytes is one more `Location`, which is handled here, in `_move` and in `expert_reader`,
        and perhaps one more `Backend`. The prefetcher and the kernels only see tensors that are acquired and dropped.
        """
        modules = [self.experts[name] for name in names]
        layers = [_tensors(module) for module in modules]
        if self._sharding is None:
            if self.separate_host:
                return SlotLayers(layers, self.device)
            return MappedLayers(layers, [self.files[name] for name in names])
        wholes = [[*module.gate_up.whole, *module.down.whole] for module in modules]
        on_disk = {number for number, name in enumerate(names) if self.locations[name] == "disk"}
        paged = set() if self.separate_host else on_disk
        return GatheredLayers(layers, wholes, self._sharding, self.device, paged)

    def __deepcopy__(self, memo: Any) -> "Placement":
        # A copy of the model reads the same bytes.
        return self


def expert_reader(locations: Mapping[str, Location], device: torch.device) -> ReadExperts:
    """What `load_model` reads the experts of an NF4 folder with: each layer's bytes go to their location at once.

    Args:
        locations: where each experts module is to be held; on the device where it is not named.
        device: the device that computes.
    """

    def read(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        match locations.get(name, "device"):
            case "disk":
                return {key: map_tensor(entry) for key, entry in entries.items()}
            case "host":
                return {key: entry.read() for key, entry in entries.items()}
            case "device":
                return {key: entry.read().to(device) for key, entry in entries.items()}
            case other:
                assert_never(other)

    return read


def place_experts(
    model: nn.Module, locations: Mapping[str, Location], device: torch.device, folder: str | Path
) -> Placement:
    """Move a loaded model's experts to where they are to be held, and keep the placement with the model.

    Args:
        model: from `expertune.checkpoint.load.load_model`.
        locations: where each experts module is to be held.
        device: the device that computes.
        folder: the model's folder; the layers of an NF4 folder can be offloaded to disk.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Nf4Experts)}
    files: dict[str, list[TensorEntry]] = {}
    if is_nf4_folder(folder):
        stored = read_nf4_folder(folder)
        for name, module in experts.items():
            entries = own_part(module, stored.experts_entries(name)[1])
            files[name] = [entries[f"{stack}.{buffer}"] for stack in STACKS for buffer in BUFFERS]
    placement = Placement(experts, device, files)
    placement.move({name: locations.get(name, "device") for name in experts})
    model.expert_placement = placement  # type: ignore[assignment]
    return placement


def placement_of(model: nn.Module) -> Placement | None:
    """The placement of a model's experts, whatever is wrapped around it."""
    found = (getattr(module, "expert_placement", None) for module in model.modules())
    return next((placement for placement in found if placement is not None), None)


def _tensors(module: Nf4Experts) -> list[Tensor]:
    return [*(tensor.detach() for tensor in module.gate_up.bytes), *(tensor.detach() for tensor in module.down.bytes)]


def _nbytes(module: Nf4Experts) -> int:
    return module.gate_up.nbytes + module.down.nbytes
