"""Experts shared out to ranks: which rank has which experts, and what these ranks exchange.

The ranks of a run are a mesh of two dimensions. Along `ep` the experts of each layer are shared out, and tokens travel.
Along `dp` ranks have the same experts, whose gradients are summed. Where `ep` spans all ranks nobody else has an
expert, and its gradient is whole as it is.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from expertune.distributed.mesh import Ranks, sum_and_divide
from expertune.distributed.shares import owned_experts, replicas


def _own_group(rows: Tensor, ranks: Ranks) -> dist.ProcessGroup:
    """The group of a row of ranks [rows, ranks] that this rank is in; torch's first group if all of them are."""
    world = dist.group.WORLD
    if rows.shape[0] == 1 and world is not None:
        return world
    groups = [ranks.new_group(row) for row in rows.tolist()]
    return groups[int((rows == ranks.rank).any(dim=1).nonzero())]


class Due(NamedTuple):
    """An exchange that the other ranks count on: rows to and from each of them, a row's shape, and the dtype."""

    sent: Sequence[int]
    received: Sequence[int]
    row: Sequence[int]
    dtype: torch.dtype


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
        grid = torch.arange(ranks.world_size).view(replicas(ranks.world_size, size), size)
        groups = [_own_group(rows, ranks) for rows in (grid.t(), grid)]
        mesh = DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=("dp", "ep"))
        self.size, self.rank = size, mesh.get_local_rank("ep")
        self._groups = {name: mesh.get_group(name) for name in ("dp", "ep")}
        ranks.at_end(self._groups.clear)  # so that ranks which wait for this one notice that it has ended
        self._ranks, self._device_type = ranks, device_type
        self._due: list[Due] = []
        self._owners: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def _peers(self) -> dist.ProcessGroup:
        return self._groups["ep"]

    @property
    def _replicas(self) -> dist.ProcessGroup:
        return self._groups["dp"]

    def owned(self, num_experts: int, rank: int | None = None) -> range:
        """The experts of a rank, of this one where none is given; see `owned_experts`."""
        return owned_experts(num_experts, self.size, self.rank if rank is None else rank)

    def owners(self, num_experts: int, device: torch.device) -> Tensor:
        """The rank of each expert, and its number among that rank's, int64 [2, E]; made once."""
        if (num_experts, device) not in self._owners:
            places = [(rank, own) for rank in range(self.size) for own in range(len(self.owned(num_experts, rank)))]
            self._owners[num_experts, device] = torch.tensor(places, device=device).t()
        return self._owners[num_experts, device]

    def exchange_counts(self, counts: Tensor) -> None:
        """Fill the second of int64 [2, ranks], how many rows each rank has for this one, from what this has for each.

        It allocates nothing, so that memory does not run out between `proceed` and `begin`.
        """
        dist.all_to_all_single(counts[1], counts[0], group=self._peers)

    def begin(self, *due: Due) -> None:
        """Begin exchanges that follow each other, of which a rank without memory can still do its part (`finish`)."""
        self._due = list(due)

    def proceed(self) -> None:
        """Called before exchanges in a pass; see `Ranks.proceed`."""
        self._due = []
        self._ranks.proceed()

    def finish(self) -> None:
        """Where memory ran out between exchanges that had begun: send zeros in those that the other ranks wait for."""
        while self._due:
            sent, received, row, dtype = self._due[0]
            self.exchange(torch.zeros(sum(sent), *row, dtype=dtype, device=self._device_type), sent, received)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to each rank, and take what each sends, in the order of ranks.

        Args:
            rows: [sum of sent, ...].
            sent: rows for each rank.
            received: rows from each rank.
        """
        taken = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(taken, rows.contiguous(), list(received), list(sent), group=self._peers)
        self._due = self._due[1:]
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
        sum_and_divide(gradients, self._ranks.world_size, self._replicas)

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of a rank's own experts by those of the first rank that has them, in place."""
        for tensor in tensors:
            dist.broadcast(tensor.detach(), group=self._replicas, group_src=0)

    def sums(self, figures: Sequence[int]) -> list[int]:
        """Sums of figures over the ranks that share the experts out."""
        self.proceed()
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
