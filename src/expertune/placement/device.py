"""Which device a run computes on, in which dtype, and with which kernels."""

import os
from typing import Literal, get_args

import torch

from expertune.config import KernelsConfig
from expertune.errors import ConfigError, first_line
from expertune.kernels.cpu import gemm_dtype
from expertune.kernels.routes import KernelSettings

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
_NAMES: dict[str, DtypeName] = {
    **{name: name for name in get_args(DtypeName)},
    **{"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
}

# What NCCL must not use between GPUs for which accelerate's check fails (RTX 40 under drivers before 550.40.07).
_NOT_BETWEEN_GPUS = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")

# Capability 8.0 (Ampere) is the first NVIDIA generation with bfloat16 matrix units.
_FIRST_BFLOAT16_CAPABILITY = (8, 0)


def default_device() -> torch.device:
    """The current CUDA device (ROCm included), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def training_device(several: bool = False) -> torch.device:
    """The device of a run: `default_device()`, which has to be the one that transformers' Trainer takes.

    Args:
        several: the run has several processes, each with the GPU of its own number.

    Raises:
        ConfigError: the process's current GPU is not the first that it sees; or several GPUs cannot reach each other
            as NCCL would have it, and the environment does not say so, without which accelerate starts no processes.
    """
    device = default_device()
    if device.type == "cuda" and device.index != 0 and not several:
        raise ConfigError(
            f"the current GPU is {device}, and transformers' Trainer always takes the first that the process sees; set "
            f"CUDA_VISIBLE_DEVICES={device.index} before torch is imported, in place of torch.cuda.set_device"
        )
    if device.type == "cuda" and several:
        _require_links()
    return device


def _require_links() -> None:
    from accelerate.utils import check_cuda_p2p_ib_support  # after torch, where there is a GPU

    unset = [f"{name}=1" for name in _NOT_BETWEEN_GPUS if name not in os.environ]
    if unset and not check_cuda_p2p_ib_support():
        raise ConfigError(
            f"these GPUs do not reach each other directly under this driver; set {' and '.join(unset)} in the "
            "environment of every process, as `accelerate launch` does, or install driver 550.40.07 or newer"
        )


def device_named(device: str | torch.device | None) -> torch.device:
    """A device of this machine; None means `default_device()`.

    Raises:
        ConfigError: torch has no such device here.
    """
    if device is None:
        return default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        found = f"torch has no {str(device)!r} here ({first_line(error)})"
        raise ConfigError(f"device: {found}; give another, such as cpu, or none") from None


def dtype_name(dtype: str | torch.dtype) -> DtypeName:
    """`auto`, `bfloat16`, `float16` or `float32`, as a program may also say otherwise: `bf16`, `torch.bfloat16`.

    Raises:
        ConfigError: it is none of these.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _NAMES:
        known = ", ".join(get_args(DtypeName))
        raise ConfigError(f"dtype has to be one of {known}, or such a dtype of torch, got {dtype!r}")
    return _NAMES[name]


def resolve_compute_dtype(dtype: str | torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """Dtype of the GEMMs on a device.

    Args:
        dtype: what `dtype_name` takes.
        device: where they run; None means `default_device()`.

    Returns:
        For `auto`: bfloat16 where the device multiplies it natively, otherwise float16 on CUDA and float32 on a CPU.
    """
    if (name := dtype_name(dtype)) != "auto":
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
