"""Experts shared out to ranks: which rank has which experts, and what these ranks exchange.

The ranks of a run are a mesh of two dimensions. Along `ep` the experts of each layer are shared out, and tokens travel.
Along `dp` ranks have the same experts, whose gradients are summed. Where `ep` spans all ranks nobody else has an
expert, and its gradient is whole as it is.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from expertune.distributed.mesh import Ranks, sum_and_divide
from expertune.errors import ConfigError


def owned_experts(num_experts: int, size: int, rank: int) -> range:
    """The experts of one of the ranks that share them out; the first have one more where it does not divide.

    Raises:
        ConfigError: there are more ranks than experts.
    """
    if num_experts < size:
        raise ConfigError(
            f"distributed.experts: parallel shares {num_experts} experts out to {size} processes, some of which would "
            f"have none; start at most {num_experts}, set distributed.expert_parallel_size to a number that is not "
            "above it, or set distributed.experts: replicate"
        )
    each, more = divmod(num_experts, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def replicas(world_size: int, size: int) -> int:
    """How many ranks have the same experts, where so many share them out.

    Raises:
        ConfigError: the ranks are no multiple of that.
    """
    count, rest = divmod(world_size, size)
    if rest or not count:
        raise ConfigError(
            f"distributed.expert_parallel_size is {size}, and {world_size} processes are no multiple of it; "
            f"set a number that divides {world_size}, or start another number of processes"
        )
    return count


def most_owned(num_experts: int, size: int) -> int:
    """The most experts that one of these ranks has; see `owned_experts`."""
    return len(owned_experts(num_experts, size, 0))


class ExpertParallel:
    """One rank's place among those that share the experts out. Everything that exchanges is called by all of them.

    Args:
        ranks: the processes of the run.
        device_type: where tokens and experts are: `cpu` or `cuda`.
        size: how many ranks share the experts out; None means all.

    Raises:
        ConfigError: the ranks are no multiple of that.
    """

    def __init__(self, ranks: Ranks, device_type: str, size: int | None = None) -> None:
        size = ranks.world_size if size is None else size
        shape = replicas(ranks.world_size, size), size
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "ep"))
        self.size, self.rank = size, mesh.get_local_rank("ep")
        self._peers, self._replicas = mesh.get_group("ep"), mesh.get_group("dp")
        self._world_size, self._device_type = ranks.world_size, device_type

    def owned(self, num_experts: int, rank: int | None = None) -> range:
        """The experts of a rank, of this one where none is given; see `owned_experts`."""
        return owned_experts(num_experts, self.size, self.rank if rank is None else rank)

    def counts_for_this(self, counts: Tensor) -> Tensor:
        """How many rows each rank has for this one, where each knows how many it has for each: int64 [ranks]."""
        return self.exchange(counts, [1] * self.size, [1] * self.size)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to each rank, and take what each sends, in the order of ranks.

        Args:
            rows: [sum of sent, ...].
            sent: rows for each rank.
            received: rows from each rank.
        """
        taken = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(taken, rows.contiguous(), list(received), list(sent), group=self._peers)
        return taken

    def whole(self, own: Tensor, num_experts: int) -> Tensor:
        """A tensor [E, ...] of all experts, of which each rank has its own."""
        whole = own.new_empty(num_experts, *own.shape[1:])
        for rank in range(self.size):
            part = self.owned(num_experts, rank)
            held = whole[part.start : part.stop]
            if rank == self.rank:
                held.copy_(own.detach())
            dist.broadcast(held, group=self._peers, group_src=rank)
        return whole

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Gradients of a rank's own experts as the mean over all ranks' losses, in place.

        Tokens of all ranks along `ep` have added to them already.
        """
        sum_and_divide(gradients, self._world_size, self._replicas)

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of a rank's own experts by those of the first rank that has them, in place."""
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=self._replicas, group_src=0)

    def sums(self, figures: Sequence[int]) -> list[int]:
        """Sums of figures over the ranks that share the experts out."""
        held = torch.tensor(figures, device=self._device_type)
        dist.all_reduce(held, group=self._peers)
        return held.tolist()

    def norm(self, shared: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients: of those that all ranks have alike, and of each rank's own experts."""
        squares = [torch.nn.utils.get_total_norm(each).to(self._device_type).float() ** 2 for each in (shared, own)]
        dist.all_reduce(squares[1], group=self._peers)
        return (squares[0] + squares[1]).sqrt()

    def __deepcopy__(self, memo: Any) -> "ExpertParallel":
        # A copy of the model has the same experts.
        return self
