"""Tile shapes of the grouped products, by device, dtype and rows for each expert: a table, and no search at run time.

A search would pick by the clock, so that two runs could sum in different orders; here the same shapes give the same
bytes. `benchmarks/gpu_campaign.py` sweeps `candidates` on a device, which is how the table is to be corrected.
"""

from typing import NamedTuple

import torch

from expertune.kernels.gpu.launch import Target


class Config(NamedTuple):
    """Tile of BM rows, BN rows of a matrix, BK columns; warps and stages of a program; programs that run."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int


def product_config(
    target: Target, dtype: torch.dtype, nf4: bool, swiglu: bool, transposed: bool, rows_per_expert: float
) -> Config:
    """The tile of a grouped product.

    Args:
        target: what it runs on.
        dtype: of the product.
        nf4: decoded inside the loop.
        swiglu: two sums are kept, of gate and up.
        transposed: the sum runs over the rows of the matrix, and BK is the width of the output.
        rows_per_expert: on average.
    """
    if target.backend == "interpreter":
        return Config(16, 16 if transposed else 32, 64, 4, 1, target.multiprocessors)
    wide = dtype == torch.float32
    BM = next((size for size in (16, 32, 64) if rows_per_expert <= size), 128)
    if wide:
        BM = min(BM, 64)
    if transposed:
        BN, BK = 64, 64 if wide else 128
    else:
        BN, BK = (64 if swiglu or wide else 128), 64
    num_warps = 8 if BM == 128 else 4
    num_stages = 4 if target.shared_bytes > 128 * 2**10 and not wide else 2
    if target.backend == "hip":
        num_stages = 2
    # Two programs share a multiprocessor, so that one decodes while the other multiplies.
    return Config(BM, BN, BK, num_warps, num_stages, target.multiprocessors * 2)
