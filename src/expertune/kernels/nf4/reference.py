"""The NF4 codec in plain torch: slow, short, and what every other route is tested against.

Shape suffixes: N rows, K columns, B blocks of 64 in a row.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from expertune.kernels.amounts import BLOCK_SIZE, MXFP4_BLOCK_SIZE, NESTED_BLOCK_SIZE, Scheme
from expertune.kernels.nf4.bytes import Nf4Bytes

# Quantiles of a standard normal, scaled to [-1, 1] with an exact zero (QLoRA, appendix E).
NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


# A scale by error is sought among these multiples of the block's absmax (0.55 to 1.09), and then by least squares.
_FIT_STEPS, _FIRST_FACTOR, _FACTOR_STEP = 19, 0.55, 0.03
FIT_ROUNDS = 2


# Sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
MXFP4_CODEBOOK = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_LEAST_POWER_BITS = 0x00400000  # 2 ** -127, float32


_tables: list[Tensor] = []


def _kept(make: Callable[..., Tensor]) -> "functools._lru_cache_wrapper[Tensor]":
    """Make a table once for its arguments, outside of the caller's inference mode, and never let go of it.

    The native library is given pointers to tables. Of threads that ask first at once each makes one, and the last one's
    takes the place of the others in the cache: they must stay too.
    """

    @functools.cache
    @functools.wraps(make)
    def kept(*key: object) -> Tensor:
        with torch.inference_mode(False):
            table = make(*key)
        _tables.append(table)
        return table

    return kept


@_kept
def codebook(scheme: Scheme, device: torch.device) -> Tensor:
    """The 16 values that a code stands for, float32 [16]."""
    values = MXFP4_CODEBOOK if scheme == "mxfp4" else NF4_CODEBOOK
    return torch.tensor(values, dtype=torch.float32, device=device)


def nf4_codebook(device: torch.device) -> Tensor:
    """The 16 values of NF4 as float32 [16]."""
    return codebook("nf4", device)


@_kept
def nf4_bounds() -> Tensor:
    """Float32 [15] on the CPU: a scaled weight's code is the number of bounds below it, as in bitsandbytes."""
    codebook = nf4_codebook(torch.device("cpu"))
    return (codebook[:-1] + codebook[1:]) / 2


@_kept
def fit_factors() -> Tensor:
    """Float32 on the CPU: multiples of a block's absmax that are tried as its scale."""
    return torch.tensor([_FIRST_FACTOR + _FACTOR_STEP * step for step in range(_FIT_STEPS)], dtype=torch.float32)


@_kept
def dynamic_codebook(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic map that holds the absmax values, float32 [256] (Dettmers 2016, section 3)."""
    # Seven exponent indicators: each halves the number of fraction steps of the one above and divides by ten.
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1.0, -1.0):
            values += (sign * (10.0 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize_matrix(matrix_NK: Tensor, double_quantization: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize [N, K] by nearest codebook value; the same outputs as `expertune.kernels.nf4.quantize_matrix`.

    Ties and the last bit of a scale may fall otherwise than in bitsandbytes; dequantized values are within one step.
    """
    blocks = matrix_NK.float().reshape(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.where(absmax[:, None] > 0, blocks / absmax[:, None], torch.zeros_like(blocks))
    codes = (scaled[..., None] - nf4_codebook(matrix_NK.device)).abs().argmin(dim=-1).to(torch.uint8)
    pairs = codes.reshape(matrix_NK.shape[0], -1, 2)
    packed = (pairs[..., 0] << 4) | pairs[..., 1]
    if not double_quantization:
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    offset = absmax.mean()
    centered = absmax - offset
    padded = torch.nn.functional.pad(centered, (0, -len(centered) % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested = padded.abs().amax(dim=1)
    scaled = torch.where(nested[:, None] > 0, padded / nested[:, None], torch.zeros_like(padded))
    codes = (scaled[..., None] - dynamic_codebook(matrix_NK.device)).abs().argmin(dim=-1).to(torch.uint8)
    return packed, codes.reshape(-1)[: len(centered)], nested, offset[None]


def fit_scales(matrix_NK: Tensor, importance_K: Tensor | None = None) -> Tensor:
    """Scales of blocks by error: of some multiples of the absmax the best, then least squares for its codes.

    A large weight may then be cut off, where that is the lesser error; equal errors leave the absmax.

    Args:
        matrix_NK: floats [N, K].
        importance_K: float32 [K], what a squared error in each input feature counts; None means all the same.

    Returns:
        float32 [N*K/64].
    """
    blocks = matrix_NK.float().reshape(-1, BLOCK_SIZE)
    importance = torch.ones_like(blocks)
    if importance_K is not None:
        importance = importance_K.reshape(1, -1, BLOCK_SIZE).expand(len(matrix_NK), -1, -1).reshape(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    best, least = absmax.clone(), _errors(blocks, importance, absmax)[0]
    factors = fit_factors().tolist()
    for tried in (absmax * torch.tensor(factor, dtype=torch.float32, device=absmax.device) for factor in factors):
        error, _ = _errors(blocks, importance, tried)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    for _ in range(FIT_ROUNDS):
        _, unit = _errors(blocks, importance, best)
        weighted = unit * importance
        tried = ((weighted * blocks).double().sum(1) / (weighted * unit).double().sum(1)).float()
        tried = torch.where((tried > 0) & torch.isfinite(tried), tried, best)
        error, _ = _errors(blocks, importance, tried)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def encode(matrix_NK: Tensor, scale: Tensor) -> Tensor:
    """Packed codes uint8 [N, K/2] of a matrix for scales [N*K/64] that are given."""
    codes = _codes(matrix_NK.float().reshape(-1, BLOCK_SIZE), scale)
    pairs = codes.to(torch.uint8).reshape(matrix_NK.shape[0], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def _codes(blocks: Tensor, scale: Tensor) -> Tensor:
    """Indices of the nearest codebook values, by the arithmetic of bitsandbytes."""
    least = torch.where(scale.abs() < 1e-38, 1e-38, scale)
    scaled = (blocks * (1 / least)[:, None]).clamp(-1, 1).contiguous()
    return torch.bucketize(scaled, nf4_bounds().to(blocks.device))


def _errors(blocks: Tensor, importance: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted squared error of each block at a scale, float64, and the codebook values of its weights."""
    unit = nf4_codebook(blocks.device)[_codes(blocks, scale)]
    off = blocks - unit * scale[:, None]
    return (off * off * importance).double().sum(1), unit


def dequantize_absmax(weight: Nf4Bytes, index: int) -> Tensor:
    """Scales of one matrix, float32 [N, K/64]; of MXFP4 [N, K/32]."""
    absmax = weight.absmax[index]
    if weight.scheme == "mxfp4":
        # A power of two is its exponent's bits, but for the least one, which has no implicit bit.
        bits = torch.where(absmax == 0, _LEAST_POWER_BITS, absmax.int() << 23)
        return bits.view(torch.float32).view(weight.out_features, -1)
    if weight.double_quantization:
        values = dynamic_codebook(absmax.device)[absmax.int()]
        scales = weight.nested_absmax[index].repeat_interleave(NESTED_BLOCK_SIZE)[: len(values)]
        absmax = values * scales + weight.offset[index]
    return absmax.view(weight.out_features, -1)


def dequantize(weight: Nf4Bytes, index: int, out: Tensor, rows: slice, columns: slice) -> Tensor:
    """Part of one matrix into `out`, each value rounded once from float32; see `expertune.kernels.nf4.dequantize`."""
    packed = weight.packed[index][rows, columns.start // 2 : columns.stop // 2]
    size = MXFP4_BLOCK_SIZE if weight.scheme == "mxfp4" else BLOCK_SIZE
    absmax = dequantize_absmax(weight, index)[rows, columns.start // size : columns.stop // size]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
    values = codebook(weight.scheme, packed.device)[codes.int()]
    return out.copy_((values.unflatten(1, (-1, size)) * absmax[..., None]).flatten(1))
