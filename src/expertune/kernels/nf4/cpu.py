"""The NF4 codec on a CPU: the native library where it could be built, otherwise bitsandbytes' own operators.

Both give bitsandbytes' bytes, ties included. Quantizing on other devices goes through bitsandbytes as well.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.nf4 import reference
from expertune.kernels.nf4.bytes import Fit, Nf4Bytes
from expertune.kernels.nf4.reference import BLOCK_SIZE, NESTED_BLOCK_SIZE, dynamic_codebook

# Weights of one tile: 4 MiB in float32, which stays in cache.
TILE_WEIGHTS = 2**20


def quantize_matrix(
    matrix_NK: Tensor, packed: Tensor, double_quantization: bool, fit: Fit | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] -> absmax, nested_absmax, offset, and codes into `packed` [N, K/2] (see `expertune.kernels.nf4`).

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    rows, columns = matrix_NK.shape
    absmax = torch.empty(rows * columns // BLOCK_SIZE, dtype=torch.float32, device=matrix_NK.device)
    if matrix_NK.device.type == "cpu" and native.available():
        finite = native.quantize(matrix_NK.contiguous(), packed, absmax)
    else:
        finite = bool(torch.isfinite(matrix_NK).all())
        _quantize_by_bitsandbytes(matrix_NK, packed, absmax.view(rows, -1))
    if not finite:
        count = int((~torch.isfinite(matrix_NK)).sum())
        raise ValueError(f"{count} of {matrix_NK.numel()} weights are NaN or infinite; 4 bits cannot hold them")
    if fit is not None:
        _fit(matrix_NK, fit, absmax)
    held = _hold_scales(absmax, double_quantization)
    if fit is not None:
        # The scales that weights are multiplied by are those that 8 bits hold: codes are chosen for these.
        one = Nf4Bytes(packed[None], held[0][None], held[1][None], held[2])
        _encode(matrix_NK, dequantize_absmax(one, 0), packed)
    return held


def _hold_scales(absmax: Tensor, double_quantization: bool) -> tuple[Tensor, Tensor, Tensor]:
    """absmax, nested_absmax and offset of one matrix."""
    if not double_quantization:
        empty = torch.empty(0, dtype=torch.float32, device=absmax.device)
        return absmax, empty, empty
    offset = absmax.mean()
    codes, state = _bitsandbytes().quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    return codes, state.absmax, offset.reshape(1)


def _fit(matrix_NK: Tensor, fit: Fit, absmax: Tensor) -> None:
    """Scales by error in the place of the largest magnitudes."""
    importance = None if fit.importance_K is None else fit.importance_K.to(matrix_NK.device, torch.float32).contiguous()
    if matrix_NK.device.type == "cpu" and native.available():
        native.fit(matrix_NK.contiguous(), importance, absmax)
        return
    for rows, scales in _tiles(matrix_NK, absmax):
        scales.copy_(reference.fit_scales(matrix_NK[rows], importance).view_as(scales))


def _encode(matrix_NK: Tensor, scale_NB: Tensor, packed: Tensor) -> None:
    """Codes for scales that are given."""
    if matrix_NK.device.type == "cpu" and native.available():
        native.encode(matrix_NK.contiguous(), scale_NB.contiguous(), packed)
        return
    for rows, scales in _tiles(matrix_NK, scale_NB):
        packed[rows] = reference.encode(matrix_NK[rows], scales.reshape(-1))


def _tiles(matrix_NK: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a few tiles at a time, and their scales; the reference works through several float64 copies."""
    rows, columns = matrix_NK.shape
    step = max(TILE_WEIGHTS // columns, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step), scale.view(rows, -1)[start : start + step]


def dequantize_absmax(weight: Nf4Bytes, index: int) -> Tensor:
    """Scales of one matrix, float32 [N, K/64]; of MXFP4 [N, K/32]."""
    if weight.scheme == "mxfp4":
        return reference.dequantize_absmax(weight, index)
    if not weight.double_quantization:
        return weight.absmax[index].view(weight.out_features, -1)
    if weight.absmax.device.type != "cpu":
        return reference.dequantize_absmax(weight, index)
    if native.available():
        out = torch.empty(weight.absmax.shape[1], dtype=torch.float32)
        native.dequantize_absmax(weight, index, out)
    else:
        _bitsandbytes()
        out = torch.ops.bitsandbytes.dequantize_blockwise(
            weight.absmax[index],
            weight.nested_absmax[index],
            dynamic_codebook(weight.packed.device),
            NESTED_BLOCK_SIZE,
            torch.float32,
        ).add_(weight.offset[index])
    return out.view(weight.out_features, -1)


def dequantize(weight: Nf4Bytes, index: int, out: Tensor, rows: slice, columns: slice) -> Tensor:
    """Part of one matrix into `out`; see `expertune.kernels.nf4.dequantize`.

    A tile of a few MiB that is written again and again stays in cache, from where the GEMM after it reads it.
    """
    if native.available() and out.dtype != torch.float16:
        native.dequantize(weight, index, (rows.start, rows.stop), (columns.start, columns.stop), out)
        return out
    if weight.scheme == "mxfp4":
        return reference.dequantize(weight, index, out, rows, columns)
    packed = weight.packed[index][rows, columns.start // 2 : columns.stop // 2].contiguous()
    absmax = dequantize_absmax(weight, index)[
        rows, columns.start // BLOCK_SIZE : columns.stop // BLOCK_SIZE
    ].contiguous()
    _bitsandbytes()
    return out.copy_(
        torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, BLOCK_SIZE, "nf4", list(out.shape), out.dtype)
    )


def _bitsandbytes() -> Any:
    """Its functions; importing them registers its operators, and takes as long as torch does."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def _quantize_by_bitsandbytes(matrix_NK: Tensor, packed_NK: Tensor, absmax_NB: Tensor) -> None:
    """A tile of rows at a time: on a CPU the library works through half a dozen float32 copies of what it is given."""
    rows, columns = matrix_NK.shape
    step = max(TILE_WEIGHTS // columns, 1) if matrix_NK.device.type == "cpu" else rows
    bnb = _bitsandbytes()
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        codes, state = bnb.quantize_4bit(matrix_NK[tile].contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
        packed_NK[tile] = codes.view(-1, columns // 2)
        absmax_NB[tile] = state.absmax.view(-1, columns // BLOCK_SIZE)
