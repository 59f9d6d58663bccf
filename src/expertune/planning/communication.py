"""Bytes that ranks send each other in an optimizer step, and how long a link takes for them. Planned, not measured.

Counted are tensors, in bytes that a rank sends to other ranks; it receives as many. Where ranks differ, it is their
mean. Left out are figures and votes of a few bytes each, evaluations, saving, and what a network adds to the bytes that
it is given. `experts/dispatch.py` is where tokens are sent, `distributed/mesh.py` where gradients are.

Letters: W ranks, E experts, K experts per token, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertune.distributed.shares import owned_experts
from expertune.gpus import LINKS, Link

_INT64_BYTES = 8


def compared_links(assumed: Link) -> tuple[Link, ...]:
    """The links that times are shown for: the one between a machine's GPUs is the one that is assumed."""
    return LINKS if assumed in LINKS else (assumed, *LINKS[1:])


@dataclass(frozen=True)
class Traffic:
    """What a rank sends to others in an optimizer step.

    Attributes:
        gradient_bytes: gradients that are averaged.
        token_bytes: tokens on their way to experts of other ranks and back, with their gradients.
        weight_bytes: frozen expert weights that other ranks gather.
    """

    gradient_bytes: int = 0
    token_bytes: int = 0
    weight_bytes: int = 0

    @property
    def sent_bytes(self) -> int:
        """All of it."""
        return self.gradient_bytes + self.token_bytes + self.weight_bytes


@dataclass(frozen=True)
class RoutedLayer:
    """What decides how many bytes tokens are on their way through an expert layer.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: D.
        itemsize: bytes of each number of a hidden state.
        weight_itemsize: bytes of each of the router's weights, which are float32 in many families.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    itemsize: int
    weight_itemsize: int = 4


def averaged_bytes(gradient_bytes: int, ranks: int) -> int:
    """Gradients of this size averaged by a ring all_reduce: every rank sends 2 (W - 1) / W of them."""
    return 2 * (ranks - 1) * gradient_bytes // ranks


def copies_per_token(num_experts: int, top_k: int, ranks: int) -> float:
    """Ranks that a token is for, its own among them: expected where all choices of K experts are as likely.

    A rank with n of the experts has none of the chosen in C(E - n, K) of C(E, K) cases. At most it is min(K, W).
    """
    choices = math.comb(num_experts, top_k)
    owned = (len(owned_experts(num_experts, ranks, rank)) for rank in range(ranks))
    return sum(1 - math.comb(num_experts - count, top_k) / choices for count in owned)


def bytes_per_copy(layer: RoutedLayer, recomputes: bool) -> int:
    """A token that another rank has experts for, there and back in forward and in backward.

    Its hidden state travels there and back in forward, and so do their gradients in backward; the router's weights go
    along to the expert, and their gradient comes back; the chosen experts' numbers go once. Under activation
    checkpointing the recomputation sends hidden state and weights once more, and nothing comes back: what did is kept.
    """
    hidden_state, weights = layer.hidden_size * layer.itemsize, layer.top_k * layer.weight_itemsize
    return (4 + recomputes) * hidden_state + (2 + recomputes) * weights + layer.top_k * _INT64_BYTES


def token_bytes(layer: RoutedLayer, tokens: int, ranks: int, recomputes: bool) -> int:
    """What a rank's tokens are on their way through an expert layer, in a forward and its backward.

    Args:
        layer: its sizes.
        tokens: of a rank, in a micro-batch.
        ranks: W that share the layer's experts out.
        recomputes: with activation checkpointing.
    """
    if ranks == 1:
        return 0
    counts = (ranks - 1) * _INT64_BYTES  # how many rows each rank has for each other one
    # Tokens are alike, so that of the copies on each rank all but 1 / W come from others.
    to_others = (1 - 1 / ranks) * copies_per_token(layer.num_experts, layer.top_k, ranks)
    return round(tokens * to_others * bytes_per_copy(layer, recomputes)) + counts


def gathered_bytes(layer_bytes: Sequence[int], ranks: int) -> int:
    """Frozen experts gathered for a micro-batch, where each rank holds 1 / W of every layer.

    A layer is gathered for forward and again for backward, except at a turnaround, where it is still there: the last
    layer into backward, and the first into the next forward.
    """
    gathers = [*layer_bytes[1:], *layer_bytes[:-1]]
    return (ranks - 1) * sum(gathers) // ranks
