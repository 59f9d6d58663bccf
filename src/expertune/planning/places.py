"""Where each layer's expert bytes wait: on the device as far as they fit there, the others elsewhere.

Layers that wait elsewhere share two slots on the device, one in use and one being filled, and each is brought once in
forward and once in backward. How many have to wait follows from the memory; which of them changes nothing in bytes,
because the way turns at both ends and what is there at a turn stays. So they are spread evenly: while one is brought,
the resident layers before it are computed, and the link is never idle for long.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from expertune.config import RunConfig
from expertune.errors import ConfigError
from expertune.placement.experts import Location

# How much of the budget may be filled when layers are chosen to wait elsewhere: the peak is an estimate, and a few
# layers more cost little.
AUTO_SHARE = 0.95

# Of the host's free memory that pinned expert bytes may take.
_HOST_SHARE = 0.8


@dataclass(frozen=True)
class Streaming:
    """Bytes that wait elsewhere and pass through the device.

    Attributes:
        waiting_bytes: expert bytes that are not held on the device.
        slot_bytes: what the slots take there.
        turn_bytes: what they take at a turn of the way, while no layer computes.
        brought_bytes: what a micro-batch brings in forward and in backward.
        place: where they wait; `device` where nothing does.
    """

    waiting_bytes: int = 0
    slot_bytes: int = 0
    turn_bytes: int = 0
    brought_bytes: tuple[int, int] = (0, 0)
    place: Location = "device"


@dataclass(frozen=True)
class Places:
    """Where the experts of each layer wait.

    Attributes:
        of: name of an experts module -> place.
        reason: why, in a sentence; None where all are on the device because they fit.
        streaming: what that means in bytes.
    """

    of: Mapping[str, Location]
    reason: str | None
    streaming: Streaming

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by place."""
        return dict(Counter(self.of.values()))


class Choice:
    """Chooses places for runs on one model and one device.

    Args:
        sizes: packed bytes of each experts module, in the order of the forward.
        device: `cpu` or `cuda`.
        holds_nf4: the model is a folder that `expertune quantize` wrote.
        here: the device is one of this machine.
    """

    def __init__(self, sizes: Mapping[str, int], device: str, holds_nf4: bool, here: bool) -> None:
        self.sizes = dict(sizes)
        self.device, self.holds_nf4, self.here = device, holds_nf4, here

    def fixed(self, config: RunConfig) -> Places | None:
        """The places that a run file asks for; None for `auto`.

        Raises:
            ConfigError: `disk` is asked for, and the model is no NF4 folder.
        """
        place = config.placement
        if place == "auto":
            return None
        if place == "disk" and not self.holds_nf4:
            name = config.model.rstrip("/").rpartition("/")[2]
            raise ConfigError(
                f"placement: disk needs a model whose experts lie in 4 bits on the disk, and {config.model} is none; "
                f"run `expertune quantize {config.model} {name}-nf4` once, and set model: {name}-nf4"
            )
        if place == "host" and self.device == "cpu":
            return Places(dict.fromkeys(self.sizes, place), "on a CPU the host's memory is the device's", Streaming())
        reason = None if place == "device" else "as placement says"
        return Places(dict.fromkeys(self.sizes, place), reason, self.streaming(list(self.sizes), place))

    def on_device(self) -> Places:
        """Everything on the device."""
        return Places(dict.fromkeys(self.sizes, "device"), None, Streaming())

    def elsewhere(self) -> Location | None:
        """Where layers can wait that do not fit; None where there is nowhere."""
        if self.device == "cpu":
            return "disk" if self.holds_nf4 else None
        host = psutil.virtual_memory().available if self.here else float("inf")
        return "disk" if self.holds_nf4 and sum(self.sizes.values()) > _HOST_SHARE * host else "host"

    def fitting(self, budget_bytes: int, peak_of: Callable[[Places], int]) -> Places:
        """As many layers on the device as fit; all of them elsewhere where even that is too much."""
        everything, place = self.on_device(), self.elsewhere()
        if place is None or peak_of(everything) <= budget_bytes:
            return everything
        allowed = int(AUTO_SHARE * budget_bytes)
        low, high = 1, len(self.sizes)
        while low < high:  # the peak falls as more layers wait
            middle = (low + high) // 2
            low, high = (low, middle) if peak_of(self._waiting(middle, place)) <= allowed else (middle + 1, high)
        return self._waiting(low, place)

    def streaming(self, names: Sequence[str], place: Location) -> Streaming:
        """Bytes of a placement in which these modules wait."""
        sizes = [self.sizes[name] for name in names]
        if not sizes or place == "device":
            return Streaming()
        # Both slots take the largest layer on a GPU; pages of a mapped file come and go with their layer.
        slots = 2 * max(sizes) if self.device != "cpu" else sum(sorted(sizes)[-2:])
        # At each turn of the way the layer that was last in use is still there, alone where pages come and go.
        turn = slots if self.device != "cpu" else max(sizes)
        return Streaming(sum(sizes), slots, turn, (sum(sizes[1:]), sum(sizes[:-1])), place)

    def _waiting(self, count: int, place: Location) -> Places:
        names = spread(list(self.sizes), count)
        of: dict[str, Location] = {name: place if name in names else "device" for name in self.sizes}
        share = "all layers" if count == len(self.sizes) else f"{count} of {len(self.sizes)} layers"
        where = "in the host's memory" if place == "host" else "on the disk"
        reason = f"experts of {share} wait {where}, since more do not fit on the device"
        if count < len(self.sizes):
            reason += "; evenly spread, so that those between are computed while one is brought"
        return Places(of, reason, self.streaming(names, place))


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names at even distances, in order."""
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]
