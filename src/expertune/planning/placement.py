"""Where each layer's expert bytes are held: on the device as far as they fit there, the others offloaded.

Offloaded layers share two slots on the device, one in use and one being filled, and each is transferred once in forward
and once in backward. How many are offloaded follows from the memory; which of them changes nothing in bytes. So they
are spread evenly: while one is transferred, the resident layers before it are computed.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from expertune.config import RunConfig
from expertune.errors import ConfigError
from expertune.placement import READ_BYTES, Location

# How much of the budget may be filled when layers are chosen to be offloaded: a few layers more cost little.
AUTO_SHARE = 0.95

# Of the host's free memory that pinned expert bytes may take.
_HOST_SHARE = 0.8


@dataclass(frozen=True)
class PlannedPlacement:
    """Where the experts of each layer are held.

    Attributes:
        locations: name of an experts module -> its location.
        offloaded: packed bytes of each module that is not held in the device's memory, in the order of the forward.
        reason: why, in a sentence; None where all are on the device because they fit.
    """

    locations: Mapping[str, Location]
    offloaded: tuple[int, ...] = ()
    reason: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by location."""
        return dict(Counter(self.locations.values()))

    @property
    def offloaded_bytes(self) -> int:
        """Expert bytes that are not held on the device."""
        return sum(self.offloaded)

    @property
    def slot_bytes(self) -> int:
        """What the two slots take there."""
        return 2 * max(self.offloaded, default=0)

    @property
    def mapped_bytes(self) -> int:
        """What is resident of layers that a CPU uses from the mapped file: the one in use, and a part of the next."""
        return max((size + min(size, READ_BYTES) for size in self.offloaded), default=0)

    @property
    def transferred_bytes(self) -> tuple[int, int]:
        """What a micro-batch transfers in forward and in backward; a layer at a turnaround stays."""
        return sum(self.offloaded[1:]), sum(self.offloaded[:-1])

    def offloads_to(self, location: Location) -> bool:
        """Whether what is offloaded is held there."""
        return bool(self.offloaded) and location in self.locations.values()


@dataclass(frozen=True)
class PlacementChooser:
    """Chooses the placement of runs on one model and one device.

    Attributes:
        sizes: packed bytes of each experts module, in the order of the forward.
        device: `cpu` or `cuda`.
        holds_nf4: the model is a folder that `expertune quantize` wrote.
        host_bytes: of the host's memory that is free for this process; infinite where the host is not known.
    """

    sizes: Mapping[str, int]
    device: str
    holds_nf4: bool
    host_bytes: float

    def choose(
        self, config: RunConfig, budget_bytes: int, peak_of: Callable[[PlannedPlacement], int]
    ) -> PlannedPlacement:
        """The placement that a run file asks for; with `auto`, as many layers on the device as fit.

        Raises:
            ConfigError: `disk` is asked for, and the model is no NF4 folder.
        """
        location = config.placement
        if location == "auto":
            return self.fitting(budget_bytes, peak_of)
        if location == "disk" and not self.holds_nf4:
            name = f"{config.model.rstrip('/').rpartition('/')[2]}-nf4"
            command = shlex.join(["expertune", "quantize", config.model, name])
            raise ConfigError(
                f"placement: disk needs a model whose experts lie in 4 bits on the disk, and {config.model} is none; "
                f"run `{command}` once, and set model: {name}"
            )
        everywhere = dict.fromkeys(self.sizes, location)
        if location == "host" and self.device == "cpu":
            return PlannedPlacement(everywhere, reason="on a CPU the host's memory is the device's")
        return self.offloading(list(self.sizes), location, None if location == "device" else "as placement says")

    def lower(self) -> Location | None:
        """Where layers can be offloaded to that do not fit; None where there is nowhere."""
        if self.device == "cpu":
            return "disk" if self.holds_nf4 else None
        return "disk" if self.holds_nf4 and self._is_too_much_for_host else "host"

    @property
    def gains_by_quantizing(self) -> bool:
        """Whether a folder that `expertune quantize` writes would give the experts a place: on the disk."""
        return not self.holds_nf4 and (self.device == "cpu" or self._is_too_much_for_host)

    @property
    def _is_too_much_for_host(self) -> bool:
        return sum(self.sizes.values()) > _HOST_SHARE * self.host_bytes

    def fitting(self, budget_bytes: int, peak_of: Callable[[PlannedPlacement], int]) -> PlannedPlacement:
        """As many layers on the device as fit; all of them offloaded where even that is too much."""
        everything = self.offloading([], "device")
        location = self.lower()
        if location is None or peak_of(everything) <= budget_bytes:
            return everything
        allowed = int(AUTO_SHARE * budget_bytes)
        low, high = 1, len(self.sizes)
        while low < high:  # the peak falls as more layers are offloaded
            middle = (low + high) // 2
            low, high = (low, middle) if peak_of(self._spread(middle, location)) <= allowed else (middle + 1, high)
        return self._spread(low, location)

    def offloading(self, names: Sequence[str], location: Location, reason: str | None = None) -> PlannedPlacement:
        """These modules at a location, all others on the device."""
        locations: dict[str, Location] = {name: location if name in names else "device" for name in self.sizes}
        offloaded = tuple(self.sizes[name] for name in names if location != "device")
        return PlannedPlacement(locations, offloaded, reason)

    def _spread(self, count: int, location: Location) -> PlannedPlacement:
        share = "all layers" if count == len(self.sizes) else f"{count} of {len(self.sizes)} layers"
        where = "to the host's memory" if location == "host" else "to the disk"
        reason = f"experts of {share} are offloaded {where}, since more do not fit on the device"
        if count < len(self.sizes):
            reason += "; evenly spread, so that those between are computed while one is transferred"
        return self.offloading(spread(list(self.sizes), count), location, reason)


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names at even distances, in order."""
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]
