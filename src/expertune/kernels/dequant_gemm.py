"""Dequantize a tile of a matrix, multiply it while it is in cache, continue with the next one. Any device.

Shape suffixes: R tokens, K in_features, N out_features of one matrix, E experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expertune.kernels.amounts import TILE_BYTES
from expertune.kernels.cpu import pad_rows
from expertune.kernels.nf4 import BLOCK_SIZE, Nf4Bytes, dequantize


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
    step = scratch.tile_size(weight.out_features, weight.in_features)
    for start in range(0, weight.out_features, step):
        rows = slice(start, min(start + step, weight.out_features))
        tile = dequantize(weight, index, scratch.tile(rows.stop - start, weight.in_features), rows=rows)
        matmul_into(out_RN[:, rows], x_RK, tile.t())


def matmul_into(out: Tensor, x: Tensor, w: Tensor) -> None:
    """out = x @ w without the rows that pad x, in place where there are none and the dtypes allow it."""
    if out.dtype == x.dtype and out.shape[0] == x.shape[0]:
        torch.mm(x, w, out=out)
    else:
        out.copy_((x @ w)[: out.shape[0]])


def multiply_input_gradient(
    dy_RN: Tensor, weight: Nf4Bytes, first: int, num_parts: int, out_RK: Tensor, scratch: Scratch
) -> None:
    """out = dy @ [W of part 0; W of part 1; ...], a tile of W's columns at a time.

    Tiles run along K, not along N: each output element is then summed in one GEMM, and rounded once. They are as
    wide as they can be: few columns of every row are a page of memory each.
    """
    dy_RN, rows = pad_rows(dy_RN), weight.out_features
    step = scratch.tile_size(weight.in_features, num_parts * rows)
    for start in range(0, weight.in_features, step):
        columns = slice(start, min(start + step, weight.in_features))
        tile = scratch.tile(num_parts * rows, columns.stop - start)
        for part in range(num_parts):
            dequantize(weight, first + part, tile[part * rows : (part + 1) * rows], columns=columns)
        matmul_into(out_RK[:, columns], dy_RN, tile)
