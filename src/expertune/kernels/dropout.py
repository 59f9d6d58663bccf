"""Dropout by a counter: an element's fate is a hash of its number and a seed, so that backward needs no mask.

`torch.bernoulli_` fills on one thread and its mask would have to be kept; here each use of the same seed drops the same
elements, on any device, whole or a few rows at a time. The hash is a chain of multiply-xorshift rounds on 32 bits, the
finalizer of MurmurHash3 and one round more with the seed's high half; `native/dropout.c` holds the same chain.

Shape suffixes: R rows, K columns.
"""

from typing import Any

import torch
from torch import Tensor, nn

from expertune.kernels import native

_MASK = 0xFFFFFFFF


def dropout(
    x: Tensor,
    number_R: Tensor,
    seed: int | Tensor,
    probability: float,
    index: Tensor | None = None,
    first_column: int = 0,
    columns: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Drop elements of float32 rows and scale what stays by 1 / (1 - probability).

    Args:
        x: float32 [R, K], or [T, K] where `index` says which row each of R rows is.
        number_R: int64 [R], a number for each row: equal numbers drop equal elements, wherever the row lies.
        seed: 0 <= seed < 2**63; off the CPU it may be int64 [] there.
        probability: of an element to be dropped, 0 <= probability < 1; rounded to 1 / 2**32.
        index: int64 [R].
        first_column: where x's columns lie in the whole, so that a part is dropped as in it.
        columns: of the whole; None means K.
        out: contiguous float32 [R, K] to write to, which may be x itself; None makes it.

    Returns:
        float32 [R, K].
    """
    columns = x.shape[1] if columns is None else columns
    if x.device.type == "cpu" and native.available():
        out = torch.empty(number_R.shape[0], x.shape[1], dtype=torch.float32) if out is None else out
        native.dropout(x, out, in_library(number_R, int(seed), probability, columns), first_column, index)
        return out
    threshold, scale = _threshold_and_scale(probability)
    elements = number_R[:, None] * columns + torch.arange(first_column, first_column + x.shape[1], device=x.device)
    chosen = x if index is None else x[index]
    dropped = torch.where(_hash(elements, seed) >= threshold, chosen * scale, 0.0)
    return dropped if out is None else out.copy_(dropped)


def in_library(number_R: Tensor, seed: int, probability: float, columns: int) -> native.Dropout:
    """The same dropout of float32 rows of so many columns, as GEMMs of the native library apply it."""
    return native.Dropout(number_R, seed, *_threshold_and_scale(probability), columns)


def _threshold_and_scale(probability: float) -> tuple[int, float]:
    return min(round(probability * 2**32), _MASK), 1 / (1 - probability)


class CounterDropout(nn.Dropout):
    """`nn.Dropout` that keeps no mask and draws it on all threads; for float32 on a CPU, elsewhere torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape [..., K]; drops while training."""
        if not self.training or self.p == 0 or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        # Drawn from torch's own generator, so that a run's seed decides, and checkpointing draws the same again.
        return _CounterDropout.apply(input, int(torch.randint(2**62, ())), self.p)


class _CounterDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: int, probability: float) -> Tensor:
        ctx.seed, ctx.probability = seed, probability
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return dropout(rows, torch.arange(rows.shape[0]), seed, probability).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _CounterDropout.forward(ctx, grads[0], ctx.seed, ctx.probability), None, None


def _hash(numbers: Tensor, seed: int | Tensor) -> Tensor:
    """32-bit hashes of int64 numbers; a product's overflow leaves its low half as it is."""
    h = (numbers & _MASK) ^ (seed & _MASK)
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    h = ((h ^ (h >> 16)) + (seed >> 32)) & _MASK
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & _MASK
    return h ^ (h >> 16)
