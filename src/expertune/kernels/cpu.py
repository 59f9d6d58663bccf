"""What this CPU multiplies fast: its vector and matrix instructions, and the dtype that its GEMMs should run in."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from expertune.kernels.processor import MULTIPLIES

_MULTIPLIES = {getattr(torch, name): needed for name, needed in MULTIPLIES.items()}


@cache
def cpu_instruction_sets() -> tuple[str, ...]:
    """Vector and matrix instruction sets of this CPU that decide speed, by their usual names."""
    capabilities = _cpu_capabilities()
    wanted = (
        *("avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_bf16", "amx_fp16", "neon", "sve"),
    )
    return tuple(name for name in wanted if capabilities.get(name))


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which GEMMs of tensors of `dtype` run: float32 on a CPU that has no instructions for 16 bits."""
    if device.type != "cpu" or dtype not in _MULTIPLIES:
        return dtype
    return dtype if _MULTIPLIES[dtype] & set(cpu_instruction_sets()) else torch.float32


def pad_rows(x_NK: Tensor) -> Tensor:
    """x of a GEMM in 16 bits on a CPU, with rows of zeros below it up to one of few numbers of rows; else x itself.

    oneDNN makes code for each number of rows that it meets. That takes 0.6 ms on a CPU with AVX512-BF16, ten times a
    small expert's GEMM, and every expert of every batch has a number of its own. Up to 128 rows numbers go by
    eights, from there on by sixteenths of the next power of two: 3 % more rows.
    """
    if x_NK.device.type != "cpu" or x_NK.dtype == torch.float32:
        return x_NK
    step = 1 << max((x_NK.shape[0] - 1).bit_length() - 4, 3)
    missing = -x_NK.shape[0] % step
    return torch.nn.functional.pad(x_NK, (0, 0, 0, missing)) if missing else x_NK


def _cpu_capabilities() -> dict[str, object]:
    """torch's table of CPU features; releases before it had one answer three private questions instead."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    questions: dict[str, str] = {
        "avx2": "_is_avx2_supported",
        "avx512_f": "_is_avx512_supported",
        "avx512_vnni": "_is_vnni_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "amx_tile": "_is_amx_tile_supported",
        "amx_bf16": "_is_amx_tile_supported",
    }
    unsupported: Callable[[], bool] = bool
    return {name: getattr(torch.cpu, question, unsupported)() for name, question in questions.items()}
