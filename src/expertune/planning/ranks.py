"""What each rank of a run holds and sends, by how the ranks hold the experts, and which way a run takes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from expertune.config import RunConfig
from expertune.distributed.shares import owned_experts, replicas
from expertune.gpus import LINKS, Link
from expertune.planning.communication import (
    RoutedLayer,
    Traffic,
    averaged_bytes,
    gathered_bytes,
    token_bytes,
)
from expertune.planning.distribution import EXPERTS, Distribution
from expertune.planning.inventory import count_adapter, expert_factors
from expertune.planning.settings import Workload
from expertune.train.optimizers import usable_optimizer, why_not_by_expert


@dataclass(frozen=True)
class ModePlan:
    """A run whose ranks hold the experts in one way; bytes are those of the rank that has the most.

    Attributes:
        distribution: how they do.
        peak_bytes: peak memory on a rank's device.
        experts_bytes: frozen experts that it holds, offloaded ones included.
        host_bytes: what it offloads to its host's memory.
        fits: whether the peak stays within the budget.
        offloads: whether experts had to be offloaded for that.
        traffic: what a rank sends in an optimizer step.
        seconds: of a step over the link that the plan assumes; None where nothing is known of the device's speed.
    """

    distribution: Distribution
    peak_bytes: int
    experts_bytes: int
    host_bytes: int
    fits: bool
    offloads: bool
    traffic: Traffic
    seconds: float | None

    def link_seconds(self, link: Link) -> float:
        """How long a link takes for what a rank sends in a step."""
        return self.traffic.sent_bytes / link.bytes_per_second

    def to_json(self, links: tuple[Link, ...]) -> dict[str, Any]:
        """Plain values, with the time that each of some links takes."""
        return {
            "mode": self.distribution.mode,
            "expert_parallel_size": self.distribution.expert_ranks,
            "peak_bytes": self.peak_bytes,
            "experts_bytes": self.experts_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "sent_bytes": self.traffic.sent_bytes,
            **asdict(self.traffic),
            "link_seconds": {link.name: self.link_seconds(link) for link in links},
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class RanksPlan:
    """A run of several ranks.

    Attributes:
        chosen: the way in which it holds the experts.
        reason: why, in a sentence.
        link: what is assumed to connect the ranks.
        modes: each way that is possible.
        compared: the links that times are shown for.
    """

    chosen: ModePlan
    reason: str
    link: Link
    modes: tuple[ModePlan, ...]
    compared: tuple[Link, ...] = LINKS

    @property
    def line(self) -> str:
        """How many ranks there are, how they hold the experts, and why."""
        distribution = self.chosen.distribution
        return f"{distribution.world_size}, experts: {distribution.name}; {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "world_size": self.chosen.distribution.world_size,
            "experts": self.chosen.distribution.mode,
            "expert_parallel_size": self.chosen.distribution.expert_ranks,
            "reason": self.reason,
            "link": self.link.name,
            "modes": [mode.to_json(self.compared) for mode in self.modes],
        }


def possible_distributions(config: RunConfig, w: Workload, world_size: int) -> Iterator[Distribution]:
    """Ways in which ranks can hold a run's experts; the one that the run file asks for is among them.

    Raises:
        ConfigError: the ranks do not divide as `distributed.expert_parallel_size` says, or are more than the experts.
    """
    asked, size = config.distributed.experts, config.distributed.expert_parallel_size
    fewest = min(spec.num_experts for spec in w.inventory.specs.values())
    if size is not None:
        replicas(world_size, size)
    elif asked == "parallel":
        size = world_size
    else:  # as many as there are experts for
        size = next(n for n in range(min(world_size, fewest), 0, -1) if world_size % n == 0)
    if asked == "parallel":
        owned_experts(fewest, size, 0)
    yield Distribution("replicate", world_size)
    if config.objective != "sft":  # whose ranks pass through the model a different number of times
        return
    if not config.lora.why_not_held("shard"):
        yield Distribution("shard", world_size)
    factor_sizes = [size for _, size in expert_factors(w.inventory, w.targets)]
    refusal = why_not_by_expert(usable_optimizer(w.optimizer, w.device), factor_sizes)
    trains = not refusal and not (config.training.get("fp16") and w.device != "cpu")
    if asked == "parallel" or (1 < size <= fewest and trains and not config.lora.why_not_held("parallel")):
        yield Distribution("parallel", world_size, size)


def count_traffic(w: Workload, accumulation: int) -> Traffic:
    """What a rank sends in an optimizer step of so many micro-batches."""
    inventory, distribution = w.inventory, w.inventory.distribution
    if distribution.world_size == 1:
        return Traffic()
    # Factors of a rank's own experts are averaged with the ranks that have the same ones, all others by all ranks.
    shared = count_adapter(inventory, w.targets, lambda _: 0) * w.adapter_dtype.itemsize
    of_experts = averaged_bytes(w.adapter_bytes - shared, distribution.replicas)
    tokens = sum(
        token_bytes(
            RoutedLayer(spec.num_experts, inventory.top_k, spec.hidden_size, w.compute_dtype.itemsize),
            w.tokens,
            distribution.expert_ranks,
            w.checkpointing,
        )
        for spec in inventory.specs.values()
    )
    gathered = gathered_bytes(inventory.layer_bytes, distribution.slices)
    return Traffic(
        gradient_bytes=averaged_bytes(shared, distribution.world_size) + of_experts,
        token_bytes=accumulation * tokens,
        weight_bytes=accumulation * gathered,
    )


def choose_mode(asked: str, modes: tuple[ModePlan, ...], link: Link, compared: tuple[Link, ...] = LINKS) -> RanksPlan:
    """The way that a run file asks for; with `auto`, replicated where that fits, else what is expected to be fastest.

    Experts on the devices stand above offloaded ones: a host's memory is shared by the ranks on it.

    Args:
        asked: `distributed.experts`.
        modes: what is possible, at least `replicate`.
        link: what connects the ranks.
        compared: the links that times are shown for.
    """
    if asked != "auto":
        chosen = next(mode for mode in modes if mode.distribution.mode == asked)
        return RanksPlan(chosen, f"as {EXPERTS} is set", link, modes, compared)

    def rank(mode: ModePlan) -> tuple[bool, bool, bool, float]:
        if not mode.fits:
            return True, True, True, mode.peak_bytes
        is_plain = mode.distribution.mode == "replicate" and not mode.offloads
        return False, mode.offloads, not is_plain, mode.link_seconds(link) if mode.seconds is None else mode.seconds

    chosen = min(modes, key=rank)
    return RanksPlan(chosen, _reason(chosen, modes, link), link, modes, compared)


def _reason(chosen: ModePlan, modes: tuple[ModePlan, ...], link: Link) -> str:
    if not chosen.fits:
        return "no mode fits, and this one lacks least"
    if chosen.distribution.mode == "replicate" and not chosen.offloads:
        return "all experts fit on each device"
    reason = "every mode offloads experts" if chosen.offloads else "not all experts fit on each device"
    others = [mode for mode in modes if mode.fits and mode.offloads == chosen.offloads and mode is not chosen]
    if others:
        names = " and ".join(mode.distribution.name for mode in others)
        reason += f", and over {link.name} this is expected to be faster than {names}"
    return reason
