"""Which tokens of which expert a tile of a grouped GEMM has, found on the device from the ends of experts' tokens.

Tiles of one expert are numbered together, its token tiles fastest, so that programs that run at the same time share a
tile of weights. Nothing about the number of tokens of an expert is known on the host.
"""

import triton
import triton.language as tl


@triton.jit
def expert_tiles(offsets_ptr, first, end, BM: tl.constexpr, E_PAD: tl.constexpr):
    """Of experts first .. end - 1, vectors [E_PAD]: number, first token, end, tiles of BM tokens, tiles so far."""
    expert = tl.arange(0, E_PAD)
    inside = (expert >= first) & (expert < end)
    stop = tl.load(offsets_ptr + expert, mask=inside, other=0).to(tl.int32)
    start = tl.load(offsets_ptr + expert - 1, mask=inside & (expert > 0), other=0).to(tl.int32)
    tiles = (stop - start + BM - 1) // BM
    return expert, start, stop, tiles, tl.cumsum(tiles, 0)


@triton.jit
def locate(tile, experts, start, stop, tiles, so_far, num_columns, BM: tl.constexpr):
    """Tile number -> (expert, first token, end of its tokens, column tile) among `num_columns` column tiles."""
    before = so_far * num_columns <= tile
    # Experts below the first have no tiles, and so lie before every tile.
    expert = tl.sum(before.to(tl.int32), 0)
    local = tile - tl.max(tl.where(before, so_far, 0), 0) * num_columns
    here = experts == expert
    row_tiles = tl.sum(tl.where(here, tiles, 0), 0)
    row = tl.sum(tl.where(here, start, 0), 0) + local % row_tiles * BM
    return expert, row, tl.sum(tl.where(here, stop, 0), 0), local // row_tiles
