"""Decode a tile of an expert's bytes, multiply it while it is in cache, go on: the route that any device can run.

Shape suffixes: R routed rows, K in_features, N out_features of one matrix, E experts, r rank.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.nf4 import BLOCK_SIZE, decode_absmax, decode_rows

# Most bytes of one decoded tile. On a CPU a tile has to leave room for x and y in the last-level cache, and to stay
# below the 8 MiB from which on the allocator maps a block afresh (see `bound_host_memory`): a tile is fast because its
# pages come back warm. On a GPU launches cost more than memory, so that a tile is as large as the working set may be.
TILE_BYTES = {"cpu": 7 * 2**20, "cuda": 512 * 2**20}


class Bytes(NamedTuple):
    """The buffers of an `Nf4Stack`, as the operator receives them."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    def absmax_of(self, index: int) -> Tensor:
        """Float32 absmax of one matrix, [N, K/64]."""
        nested = self.nested_absmax[index] if self.nested_absmax.shape[-1] else self.nested_absmax
        offset = self.offset[index] if self.offset.shape[0] else self.offset
        return decode_absmax(self.absmax[index], nested, offset).view(self.packed.shape[1], -1)


def forward(
    x_RK: Tensor,
    weight: Bytes,
    offsets_E: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
    same_x: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The product and, for each update, h = x @ A.T (kept for backward, [R, r]).

    Args and shapes: see `expertune.kernels.grouped_linear.grouped_linear`. `same_x[u]` says that update u reads x
    itself, so that one conversion to the adapter's dtype serves all such updates.
    """
    num_experts = offsets_E.shape[0]
    num_parts, rows = weight.packed.shape[0] // num_experts, weight.packed.shape[1]
    y_RN = x_RK.new_empty(x_RK.shape[0], num_parts * rows)
    h = [factor.new_empty(x_RK.shape[0], factor.shape[1]) for factor in a]
    for expert, span in _spans(offsets_E):
        x = x_RK[span]
        for part in range(num_parts):
            _multiply(x, weight, expert * num_parts + part, y_RN[span, part * rows : (part + 1) * rows])
        shared_x: Tensor | None = None
        for u, part in enumerate(parts):
            if same_x[u]:
                shared_x = x.to(a[u].dtype) if shared_x is None or shared_x.dtype != a[u].dtype else shared_x
                x_update = shared_x
            else:
                x_update = x_updates[u][span].to(a[u].dtype)
            torch.mm(x_update, a[u][expert].t(), out=h[u][span])
            update = (h[u][span] * scalings[u]) @ b[u][expert].t()
            y_RN[span, part * rows : (part + 1) * rows].add_(update)
    return y_RN, h


def backward(
    dy_RN: Tensor,
    weight: Bytes,
    offsets_E: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
    h: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dX of the frozen product, and dA, dB, dX of each update. Experts without rows get zeros.

    Args and shapes: see `forward`; dy_RN is [R, P * N].
    """
    num_experts = offsets_E.shape[0]
    num_parts, rows = weight.packed.shape[0] // num_experts, weight.packed.shape[1]
    dy_RN = dy_RN.contiguous()
    dx_RK = dy_RN.new_empty(dy_RN.shape[0], weight.packed.shape[2] * 2)
    da, db = [torch.zeros_like(factor) for factor in a], [torch.zeros_like(factor) for factor in b]
    dx_updates = [torch.empty_like(x) for x in x_updates]
    for expert, span in _spans(offsets_E):
        _multiply_transposed(dy_RN[span], weight, expert * num_parts, num_parts, dx_RK[span])
        for u, part in enumerate(parts):
            dtype = a[u].dtype
            dy = dy_RN[span, part * rows : (part + 1) * rows].to(dtype)
            dh = (dy @ b[u][expert]) * scalings[u]
            torch.mm(dy.t(), h[u][span] * scalings[u], out=db[u][expert])
            torch.mm(dh.t(), x_updates[u][span].to(dtype), out=da[u][expert])
            dx_updates[u][span] = dh @ a[u][expert]
    return dx_RK, da, db, dx_updates


def _spans(offsets_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with its rows. Reads the offsets to the host once."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _multiply(x_RK: Tensor, weight: Bytes, index: int, out_RN: Tensor) -> None:
    """out = x @ W.T, a tile of W's rows at a time."""
    packed_NK, absmax_NB = weight.packed[index], weight.absmax_of(index)
    step = _tile(x_RK, packed_NK.shape[0], packed_NK.shape[1] * 2)
    for start in range(0, packed_NK.shape[0], step):
        tile = slice(start, start + step)
        torch.mm(x_RK, decode_rows(packed_NK[tile], absmax_NB[tile], x_RK.dtype).t(), out=out_RN[:, tile])


def _multiply_transposed(dy_RN: Tensor, weight: Bytes, first: int, num_parts: int, out_RK: Tensor) -> None:
    """out = dy @ [W of part 0; W of part 1; ...], a tile of W's columns at a time.

    Tiles run along K, not along N: each output element is then summed in one product, and rounded once.
    """
    rows, half = weight.packed.shape[1:]
    packed_NK = weight.packed[first : first + num_parts].view(num_parts * rows, half)
    absmax_NB = torch.cat([weight.absmax_of(first + part) for part in range(num_parts)])
    step = _tile(dy_RN, 2 * half, num_parts * rows)
    for start in range(0, 2 * half, step):
        stop = min(start + step, 2 * half)
        tile = decode_rows(
            packed_NK[:, start // 2 : stop // 2], absmax_NB[:, start // BLOCK_SIZE : stop // BLOCK_SIZE], dy_RN.dtype
        )
        torch.mm(dy_RN, tile, out=out_RK[:, start:stop])


def _tile(x: Tensor, count: int, length: int) -> int:
    """How many of `count` rows (or columns) of `length` weights make a tile: even tiles, in whole blocks.

    A product of few or odd columns runs at half the speed, so that no small rest must be left for a last tile.
    """
    budget = TILE_BYTES.get(x.device.type, TILE_BYTES["cuda"])
    most = max(budget // (length * x.element_size()) // BLOCK_SIZE, 1) * BLOCK_SIZE
    num_tiles = -(-count // most)
    return -(-count // (num_tiles * BLOCK_SIZE)) * BLOCK_SIZE
