"""Tile shapes of the grouped GEMMs, by device, dtype and tokens per expert: a table, and no search at run time.

A search would pick by the clock, so that two runs could sum in different orders; here the same shapes give the same
bytes. `benchmarks/gpu_campaign.py` sweeps `candidates` on a device, which is how the table is to be corrected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from expertune.kernels.gpu.launch import Target


class Config(NamedTuple):
    """Tile of BM tokens, BN output features, BK input features; warps and stages of a program; programs that run."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int


_forced: ContextVar[Config | None] = ContextVar("forced", default=None)


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Within, every GEMM takes this tile."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


def gemm_config(
    target: Target, dtype: torch.dtype, nf4: bool, swiglu: bool, transposed: bool, tokens_per_expert: float
) -> Config:
    """The tile of a grouped GEMM.

    Args:
        target: what it runs on.
        dtype: of the GEMM.
        nf4: dequantized inside the loop.
        swiglu: two sums are kept, of gate and up.
        transposed: the sum runs over the rows of the matrix, and BK is the width of the output.
        tokens_per_expert: on average.
    """
    forced_config = _forced.get()
    if forced_config is not None:
        return forced_config
    if target.backend == "interpreter":
        return Config(16, 32, 64, 4, 1, target.multiprocessors)
    wide = dtype == torch.float32
    BM = next((size for size in (16, 32, 64) if tokens_per_expert <= size), 128)
    if wide:
        BM = min(BM, 64)
    if transposed:
        BN, BK = 64, 64 if wide else 128
    else:
        BN, BK = (64 if swiglu or wide else 128), 64
    num_warps = 8 if BM == 128 else 4
    # What follows keeps every kernel within its registers on every target, by tools/compile_kernels.py.
    if swiglu and not nf4 and target.backend == "cuda" and target.shared_bytes < 128 * 2**10:
        BM, num_warps = min(BM, 64), 4
    num_stages = 3 if target.shared_bytes > 128 * 2**10 and not wide else 2
    if transposed and target.arch != 90:
        num_stages = 2
        if target.arch == 80:
            BN = 32
        elif target.arch in (100, 103):
            BK = 64
    # As many programs as run at once: with four warps two share a multiprocessor, one dequantizing while one
    # multiplies.
    return Config(BM, BN, BK, num_warps, num_stages, target.multiprocessors * (1 if num_warps == 8 else 2))


class Gemm(NamedTuple):
    """A grouped GEMM: the arguments of `gemm_config`, and the input features of its matrices."""

    dtype: torch.dtype
    nf4: bool
    swiglu: bool
    transposed: bool
    tokens_per_expert: float
    in_features: int


def candidates(target: Target, gemm: Gemm) -> list[Config]:
    """Tiles worth timing beside the table's own, which comes first; some may not compile or fit.

    The loop over a matrix's input features has no mask: a tile that does not divide them is not offered.
    """
    dtype, nf4, swiglu, transposed, tokens_per_expert, in_features = gemm
    own = gemm_config(target, dtype, nf4, swiglu, transposed, tokens_per_expert)
    tall = [size for size in (16, 32, 64, 128) if size <= 2 * max(tokens_per_expert, 16)][-2:]
    wide = [(64, 128), (32, 128), (64, 64)] if transposed else [(64, 64), (128, 64), (128, 128), (256, 64)]
    found = [own]
    if not transposed:
        wide = [(BN, BK) for BN, BK in wide if in_features % BK == 0]
    for BM in tall:
        for BN, BK in wide:
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    programs = target.multiprocessors * (1 if num_warps == 8 else 2)
                    config = Config(BM, BN, BK, num_warps, num_stages, programs)
                    if config not in found and BM * max(BN, BK if transposed else 0) <= 128 * 32 * num_warps:
                        found.append(config)
    return found
