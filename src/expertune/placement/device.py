"""Which device a run computes on, and in which dtype."""

from collections.abc import Callable
from functools import cache

import torch

from expertune.errors import ConfigError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Capability 8.0 (Ampere) is the first NVIDIA generation with bfloat16 matrix units.
_FIRST_BFLOAT16_CAPABILITY = (8, 0)


def default_device() -> torch.device:
    """The current CUDA device (ROCm included), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_compute_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """Dtype of the matrix products on a device.

    Args:
        name: `auto`, `bfloat16`, `float16` or `float32`, as in `quantization.compute_dtype`.
        device: where the products run; None means `default_device()`.

    Returns:
        For `auto`: bfloat16 where the device multiplies it natively, otherwise float16 on CUDA and float32 on a CPU.

    Raises:
        ConfigError: the name is none of the four.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"quantization.compute_dtype: {name!r} is none of auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    device = device or default_device()
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= _FIRST_BFLOAT16_CAPABILITY
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(cpu_instruction_sets()) else torch.float32


@cache
def cpu_instruction_sets() -> tuple[str, ...]:
    """Vector and matrix instruction sets of this CPU that decide speed, by their usual names."""
    capabilities = _cpu_capabilities()
    wanted = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "sve")
    return tuple(name for name in wanted if capabilities.get(name))


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
