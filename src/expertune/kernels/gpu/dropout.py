"""Dropout by a counter inside a kernel: the same elements as `expertune.kernels.dropout` drops."""

import triton
import triton.language as tl


@triton.jit
def kept(number, column, columns, seed, THRESHOLD: tl.constexpr):
    """Which elements [A, B] stay, of rows numbered `number` [A] and columns `column` [B] of `columns`; seed int64."""
    h = number.to(tl.uint32)[:, None] * tl.cast(columns, tl.uint32) + column.to(tl.uint32)[None, :]
    h = h ^ seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = (h ^ (h >> 16)) + (seed >> 32).to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    return (h ^ (h >> 16)) >= THRESHOLD


def threshold(probability: float) -> int:
    """THRESHOLD of a probability; 0 keeps all."""
    return min(round(probability * 2**32), 2**32 - 1)
