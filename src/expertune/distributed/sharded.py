"""Experts sharded over ranks: each holds a slice of every layer's bytes, and a layer is gathered for its use.

Adapters are whole on every rank, and trained as where experts are replicated.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from expertune.distributed.mesh import Ranks
from expertune.distributed.parallel import ExpertParallel


class ExpertSharding:
    """One rank's place among those that hold a slice each: all ranks of a run.

    All of them gather the same layers in the same order. They do so in a group of their own, since a layer may be under
    way while they exchange something else.

    Args:
        ranks: the processes of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank, self.size, self._ranks = ranks.rank, ranks.world_size, ranks
        self._group: dist.ProcessGroup | None = ranks.new_group()
        self._under_way: dict[Hashable, list[dist.Work]] = {}
        ranks.at_end(self._close)

    def proceed(self) -> None:
        """Called before a layer is started, where this process has room for it; see `Ranks.proceed`."""
        self._ranks.proceed()

    def start(self, layer: Hashable, wholes: Sequence[Tensor]) -> None:
        """Start to fill a layer's tensors from the slices of all ranks; returns at once.

        Args:
            layer: what it is waited for by.
            wholes: uint8 [size * n] each, in which this rank's slice of n bytes is in place.
        """
        if (group := self._group) is not None:  # a copy may have ended after the run
            self._under_way[layer] = [work for whole in wholes for work in self._fill(whole, group)]

    def wait(self, layer: Hashable) -> None:
        """Work that is issued after this sees a layer's tensors filled."""
        for work in self._under_way.pop(layer, ()):
            work.wait()

    def _fill(self, whole: Tensor, group: dist.ProcessGroup) -> Iterator[dist.Work]:
        slices = whole.chunk(self.size)
        if whole.device.type != "cpu":
            yield dist.all_gather_into_tensor(whole, slices[self.rank], group=group, async_op=True)
            return
        # gloo gathers into memory of its own and copies from there; of broadcasts each fills its slice in place.
        for rank, each in enumerate(slices):
            yield dist.broadcast(each, group=group, group_src=rank, async_op=True)

    def _close(self) -> None:
        """Let go of the connections, so that ranks which wait for this one notice that it has ended."""
        self._group = None
        self._under_way.clear()

    def __deepcopy__(self, memo: Any) -> "ExpertSharding":
        # A copy of the model gathers from the same ranks.
        return self


Sharing = ExpertParallel | ExpertSharding
"""The ranks that hold a model's experts together."""
