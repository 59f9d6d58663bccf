"""Dequantize a tile of an expert's bytes, multiply it while it is in cache, go on: the route that any device can run.

Shape suffixes: R routed rows, K in_features, N out_features of one matrix, E experts, r rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expertune.kernels.cpu import gemm_dtype, pad_rows
from expertune.kernels.nf4 import BLOCK_SIZE, Nf4Bytes, dequantize

# Most bytes of one dequantized tile. On a CPU a tile has to leave room for x and y in the last-level cache, and to stay
# below the 8 MiB from which on the allocator maps a block afresh (see `bound_host_memory`): a tile is fast because its
# pages come back warm. On a GPU launches cost more than memory, so that a tile is as large as the working set may be.
TILE_BYTES = {"cpu": 7 * 2**20, "cuda": 512 * 2**20}


def forward(
    x_RK: Tensor,
    weight: Nf4Bytes,
    offsets_E: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The GEMM and, for each update, h = x @ A.T (kept for backward, [R, r]).

    Args and shapes: see `expertune.kernels.grouped_linear.grouped_linear`. Updates whose input is x itself share one
    conversion to the adapter's dtype.
    """
    dtype, rows = gemm_dtype(x_RK.dtype, x_RK.device), weight.rows
    y_RN = x_RK.new_empty(x_RK.shape[0], weight.rows_of(offsets_E.shape[0]))
    h = [factor.new_empty(x_RK.shape[0], factor.shape[1]) for factor in a]
    num_parts = y_RN.shape[1] // rows
    scratch = Scratch(x_RK.device, dtype)
    for expert, span in spans(offsets_E):
        x = x_RK[span].to(dtype)
        for part in range(num_parts):
            multiply(x, weight, expert * num_parts + part, y_RN[span, part * rows : (part + 1) * rows], scratch)
        shared: Tensor | None = None
        for u, part in enumerate(parts):
            if x_updates[u].data_ptr() != x_RK.data_ptr():
                x_update = x_updates[u][span].to(a[u].dtype)
            else:
                shared = x.to(a[u].dtype) if shared is None or shared.dtype != a[u].dtype else shared
                x_update = shared
            torch.mm(x_update, a[u][expert].t(), out=h[u][span])
            update = (h[u][span] * scalings[u]) @ b[u][expert].t()
            y_RN[span, part * rows : (part + 1) * rows].add_(update)
    return y_RN, h


def backward(
    dy_RN: Tensor,
    weight: Nf4Bytes,
    offsets_E: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
    h: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dX of the frozen GEMM, and dA, dB, dX of each update. Experts without rows get zeros.

    Args and shapes: see `forward`; dy_RN is [R, P * N].
    """
    dtype, rows = gemm_dtype(dy_RN.dtype, dy_RN.device), weight.rows
    dy_RN = dy_RN.contiguous()
    dx_RK = dy_RN.new_empty(dy_RN.shape[0], weight.columns)
    da, db = [torch.zeros_like(factor) for factor in a], [torch.zeros_like(factor) for factor in b]
    dx_updates = [torch.empty_like(x) for x in x_updates]
    num_parts = dy_RN.shape[1] // rows
    scratch = Scratch(dy_RN.device, dtype)
    for expert, span in spans(offsets_E):
        multiply_transposed(dy_RN[span].to(dtype), weight, expert * num_parts, num_parts, dx_RK[span], scratch)
        for u, part in enumerate(parts):
            dy = dy_RN[span, part * rows : (part + 1) * rows].to(a[u].dtype)
            dh = (dy @ b[u][expert]) * scalings[u]
            torch.mm(dy.t(), h[u][span] * scalings[u], out=db[u][expert])
            torch.mm(dh.t(), x_updates[u][span].to(a[u].dtype), out=da[u][expert])
            dx_updates[u][span] = dh @ a[u][expert]
    return dx_RK, da, db, dx_updates


class Scratch:
    """Memory that dequantized tiles take turns in, so that it stays in cache.

    Args:
        device: where the tiles are.
        dtype: of the GEMMs.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def tile(self, rows: int, columns: int) -> Tensor:
        """[rows, columns], whatever was in it."""
        if self._memory.numel() < rows * columns:
            self._memory = torch.empty(rows * columns, dtype=self.dtype, device=self.device)
        return self._memory[: rows * columns].view(rows, columns)

    def tile_size(self, count: int, length: int) -> int:
        """How many of `count` rows (or columns) of `length` weights make a tile: even tiles, in whole blocks.

        A GEMM of few or odd columns runs at half the speed, so that no small rest must be left for a last tile.
        """
        budget = TILE_BYTES.get(self.device.type, TILE_BYTES["cuda"])
        most = max(budget // (length * self.dtype.itemsize) // BLOCK_SIZE, 1) * BLOCK_SIZE
        num_tiles = -(-count // most)
        return -(-count // (num_tiles * BLOCK_SIZE)) * BLOCK_SIZE


def spans(offsets_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with its rows. Reads the offsets to the host once."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def multiply(x_RK: Tensor, weight: Nf4Bytes, index: int, out_RN: Tensor, scratch: Scratch) -> None:
    """out = x @ W.T, a tile of W's rows at a time; x has the GEMMs' dtype, out any."""
    x_RK = pad_rows(x_RK)
    step = scratch.tile_size(weight.rows, weight.columns)
    for start in range(0, weight.rows, step):
        rows = slice(start, min(start + step, weight.rows))
        tile = dequantize(weight, index, scratch.tile(rows.stop - start, weight.columns), rows=rows)
        matmul_into(out_RN[:, rows], x_RK, tile.t())


def matmul_into(out: Tensor, x: Tensor, w: Tensor) -> None:
    """out = x @ w without the rows that pad x, in place where there are none and the dtypes allow it."""
    if out.dtype == x.dtype and out.shape[0] == x.shape[0]:
        torch.mm(x, w, out=out)
    else:
        out.copy_((x @ w)[: out.shape[0]])


def multiply_transposed(
    dy_RN: Tensor, weight: Nf4Bytes, first: int, num_parts: int, out_RK: Tensor, scratch: Scratch
) -> None:
    """out = dy @ [W of part 0; W of part 1; ...], a tile of W's columns at a time.

    Tiles run along K, not along N: each output element is then summed in one GEMM, and rounded once. They are as
    wide as they can be: few columns of every row are a page of memory each.
    """
    dy_RN, rows = pad_rows(dy_RN), weight.rows
    step = scratch.tile_size(weight.columns, num_parts * rows)
    for start in range(0, weight.columns, step):
        columns = slice(start, min(start + step, weight.columns))
        tile = scratch.tile(num_parts * rows, columns.stop - start)
        for part in range(num_parts):
            dequantize(weight, first + part, tile[part * rows : (part + 1) * rows], columns=columns)
        matmul_into(out_RK[:, columns], dy_RN, tile)
