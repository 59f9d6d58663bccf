"""Which device a run computes on, in which dtype, and with which kernels."""

from typing import Literal

import torch

from expertune.config import KernelsConfig
from expertune.errors import ConfigError
from expertune.kernels.cpu import gemm_dtype
from expertune.kernels.routes import KernelSettings

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Capability 8.0 (Ampere) is the first NVIDIA generation with bfloat16 matrix units.
_FIRST_BFLOAT16_CAPABILITY = (8, 0)


def default_device() -> torch.device:
    """The current CUDA device (ROCm included), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def training_device() -> torch.device:
    """The device of a run: `default_device()`, which has to be the one that transformers' Trainer takes.

    Raises:
        ConfigError: the process's current GPU is not the first that it sees.
    """
    device = default_device()
    if device.type == "cuda" and device.index != 0:
        raise ConfigError(
            f"the current GPU is {device}, and transformers' Trainer always takes the first that the process sees; set "
            f"CUDA_VISIBLE_DEVICES={device.index} before torch is imported, in place of torch.cuda.set_device"
        )
    return device


def resolve_compute_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """Dtype of the GEMMs on a device.

    Args:
        name: `auto`, `bfloat16`, `float16` or `float32`, as in `quantization.compute_dtype`.
        device: where they run; None means `default_device()`.

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
    return gemm_dtype(torch.bfloat16, device)


def make_kernel_settings(
    kernels: KernelsConfig, crossover: int | None = None, gemm: Literal["torch", "triton"] | None = None
) -> KernelSettings:
    """How a model's GEMMs run, as the run file says; `expertune.kernels.routes.use_settings` gives them to a model.

    Args:
        kernels: the run file's section.
        crossover: tokens per expert at which the run has changed routes so far, where it is resumed: measured again it
            might come out otherwise, and with it the last bits of every GEMM.
        gemm: what has multiplied dequantized weights so far, likewise.

    Raises:
        ConfigError: the route cannot run here; says why.
    """
    try:
        return KernelSettings(kernels.route, kernels.working_set_bytes, crossover, gemm)
    except ValueError as error:
        raise ConfigError(f"kernels.route: {error}") from None
