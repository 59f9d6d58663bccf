"""How the ranks of a run can hold its experts."""

from dataclasses import dataclass
from typing import Literal

EXPERTS = "distributed.experts"

Mode = Literal["replicate", "shard", "parallel"]


@dataclass(frozen=True)
class Distribution:
    """One way of ranks to hold the experts; by default that of one process, which has all of them.

    Attributes:
        mode: the value of `distributed.experts`.
        world_size: ranks of the run.
        expert_ranks: ranks that share the experts out; 1 where each computes all of them.
    """

    mode: Mode = "replicate"
    world_size: int = 1
    expert_ranks: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that have the same experts, and train the same factors."""
        return self.world_size // self.expert_ranks

    @property
    def slices(self) -> int:
        """Slices of each layer's expert bytes, of which a rank holds one."""
        return self.world_size if self.mode == "shard" else 1

    @property
    def name(self) -> str:
        """The mode, with its two numbers where experts are shared out to some of the ranks."""
        meshed = 1 < self.expert_ranks < self.world_size
        return f"{self.mode} {self.replicas} x {self.expert_ranks}" if meshed else self.mode

    @property
    def settings(self) -> dict[str, str | int]:
        """Dotted keys of a run file that ask for it."""
        settings: dict[str, str | int] = {EXPERTS: self.mode}
        if 1 < self.expert_ranks < self.world_size:
            settings["distributed.expert_parallel_size"] = self.expert_ranks
        return settings
