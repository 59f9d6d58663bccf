"""Tokens travel to the ranks that have their experts, and what these make of them travels back.

Each token is sent once to each rank that has one of its experts or more: its hidden state, the router's weights, and
which of the rank's experts are meant. There every pair of a token and an expert is a token of the operator with one
expert. A rank adds up what its experts give for a token, in the order of the token's choices, and sends that back; the
token's own rank adds up what comes back, in the order of ranks. Both sums are in float32, and without atomics.

All ranks exchange as often as each other, also where one has no token, or none is for its experts. Under activation
checkpointing the routing is kept and not exchanged again: a router that chose otherwise when it is computed again could
send other numbers of tokens than the other ranks wait for.

Before each series of exchanges the ranks make sure that none has run out of memory since the last one. A rank on which
it runs out within a series sends zeros in the rest of it (`ExpertParallel.finish`), and says so before the next.

Shape suffixes: T tokens of this rank, S of these as they are sent, N tokens as they are received, R pairs of a received
token and an expert of this rank, K experts per token, D hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.distributed.parallel import Due, ExpertParallel


class Copies(NamedTuple):
    """Which rows are copied how often, and which copies belong to one row.

    Attributes:
        source_C: int64 [C], the row that each copy is of.
        slot_C: int64 [C], which of its row's copies it is.
        place_RM: int64 [rows, M], where the copies of each row are, by slot; C stands for none.
    """

    source_C: Tensor
    slot_C: Tensor
    place_RM: Tensor

    @classmethod
    def where(cls, wanted_RM: Tensor, by_slot: bool = False) -> "Copies":
        """A copy of row r for each slot m where [r, m] is true, row by row; or slot by slot."""
        if by_slot:
            slot_C, row_C = wanted_RM.t().nonzero(as_tuple=True)
        else:
            row_C, slot_C = wanted_RM.nonzero(as_tuple=True)
        place_RM = torch.full(wanted_RM.shape, row_C.numel(), dtype=torch.int64, device=wanted_RM.device)
        place_RM[row_C, slot_C] = torch.arange(row_C.numel(), device=wanted_RM.device)
        return cls(row_C, slot_C, place_RM)

    def take(self, rows_RD: Tensor) -> Tensor:
        """The copies of rows."""
        return rows_RD[self.source_C]

    def add(self, copies_CD: Tensor) -> Tensor:
        """Each row's sum over its copies in float32, slot by slot; the way of gradients back from `take`."""
        padded = torch.cat([copies_CD, copies_CD.new_zeros(1, copies_CD.shape[1])])
        total = copies_CD.new_zeros(self.place_RM.shape[0], copies_CD.shape[1], dtype=torch.float32)
        for place_R in self.place_RM.unbind(1):
            total += padded[place_R]
        return total.to(copies_CD.dtype)


class Routing(NamedTuple):
    """How the tokens of all ranks travel through one layer.

    Attributes:
        index_TK: int64 [T, K], the experts of this rank's tokens.
        local_NK: int64 [N, K], this rank's experts that received tokens are for; -1 for those of other ranks.
        counts: int64 [2, ranks], how many tokens are sent to each rank, and received from each.
    """

    index_TK: Tensor
    local_NK: Tensor
    counts: Tensor


class Dispatch:
    """The way of one layer's tokens.

    Args:
        parallel: the ranks that share the experts out.
        num_experts: of the layer, on all ranks together.
        tokens: of this rank: hidden states [T, D], their experts int64 [T, K], and the router's weights [T, K].
        recorded: the routing of an earlier call, which is then taken as it was.
    """

    def __init__(
        self,
        parallel: ExpertParallel,
        num_experts: int,
        tokens: tuple[Tensor, Tensor, Tensor],
        recorded: Routing | None = None,
    ) -> None:
        hidden_TD, index_TK, weights_TK = tokens
        self._parallel = parallel
        index_TK = index_TK if recorded is None else recorded.index_TK
        owner_TK, local_TK = parallel.owners(num_experts, index_TK.device)[:, index_TK]
        ranks = torch.arange(parallel.size, device=index_TK.device)
        goes_TW = (owner_TK[:, :, None] == ranks).any(dim=1)
        self._sent = Copies.where(goes_TW, by_slot=True)
        if recorded is None:
            counts = goes_TW.sum(dim=0).repeat(2, 1)
            parallel.proceed()
            parallel.exchange_counts(counts)
            self._num_sent, self._num_received = counts.tolist()
            parallel.begin(*map(self._there, (local_TK, hidden_TD, weights_TK)), self._back(hidden_TD))
            is_there_SK = owner_TK[self._sent.source_C] == self._sent.slot_C[:, None]
            local_NK = self._to_owners(local_TK[self._sent.source_C].masked_fill(~is_there_SK, -1))
            recorded = Routing(index_TK, local_NK, counts)
        else:
            self._num_sent, self._num_received = recorded.counts.tolist()
            self._begin(*map(self._there, (hidden_TD, weights_TK)))
        self.routing = recorded
        self._pairs = Copies.where(recorded.local_NK >= 0)

    @property
    def expert_R1(self) -> Tensor:
        """This rank's expert of each pair, int64 [R, 1]."""
        return self.routing.local_NK[self._pairs.source_C, self._pairs.slot_C][:, None]

    def send(self, hidden_TD: Tensor, top_k_weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [R, D] and router's weights [R, 1] of the pairs that this rank computes."""
        return _Send.apply(self, hidden_TD, top_k_weights_TK)

    def give_back(self, y_RD: Tensor, replayed_TD: Tensor | None = None) -> Tensor:
        """What all ranks' experts give for this rank's tokens, [T, D].

        Args:
            y_RD: what this rank's experts give.
            replayed_TD: what an earlier call with this routing returned; nothing is exchanged then before backward.
        """
        return _GiveBack.apply(self, y_RD, replayed_TD)

    def _begin(self, *due: Due) -> None:
        self._parallel.proceed()
        self._parallel.begin(*due)

    def _there(self, like: Tensor) -> Due:
        return Due(self._num_sent, self._num_received, like.shape[1:], like.dtype)

    def _back(self, like: Tensor) -> Due:
        return Due(self._num_received, self._num_sent, like.shape[1:], like.dtype)

    def _to_owners(self, rows_SX: Tensor) -> Tensor:
        return self._parallel.exchange(rows_SX, self._num_sent, self._num_received)

    def _to_sources(self, rows_NX: Tensor) -> Tensor:
        return self._parallel.exchange(rows_NX, self._num_received, self._num_sent)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Dispatch, hidden_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.way = way
        hidden_ND = way._to_owners(way._sent.take(hidden_TD))
        weights_NK = way._to_owners(way._sent.take(weights_TK))
        pairs = way._pairs
        return pairs.take(hidden_ND), weights_NK[pairs.source_C, pairs.slot_C][:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_RD: Tensor, dweights_R1: Tensor) -> tuple[None, Tensor, Tensor]:
        way: Dispatch = ctx.way
        pairs = way._pairs
        dhidden_ND = pairs.add(dhidden_RD)
        dweights_NK = dweights_R1.new_zeros(pairs.place_RM.shape)
        dweights_NK[pairs.source_C, pairs.slot_C] = dweights_R1[:, 0]
        way._begin(way._back(dhidden_ND), way._back(dweights_NK))
        dhidden_SD = way._to_sources(dhidden_ND)
        dweights_SK = way._to_sources(dweights_NK)
        return None, way._sent.add(dhidden_SD), way._sent.add(dweights_SK)


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: Dispatch, y_RD: Tensor, replayed_TD: Tensor | None) -> Tensor:
        ctx.way = way
        if replayed_TD is not None:
            return replayed_TD.clone()
        return way._sent.add(way._to_sources(way._pairs.add(y_RD)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[None, Tensor, None]:
        way: Dispatch = ctx.way
        dout_SD = way._sent.take(dout_TD)
        way._begin(way._there(dout_SD))
        return None, way._pairs.take(way._to_owners(dout_SD)), None
