"""How every Triton kernel here is launched: one function, so that what would run can be listed without a device.

Kernels are chosen by shapes alone, never by what a tensor holds, so that no launch waits for the device. `recording`
replaces launches by notes of them: run on `meta` tensors, a whole layer then tells which kernels it needs, in which
order, with which constants, and each can be compiled for any target (`tools/compile_kernels.py`).
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        backend: `cuda`, `hip`, or `interpreter`.
        arch: compute capability times ten (90), or AMD's name (`gfx942`).
        multiprocessors: of the device; persistent kernels start as many programs, or twice as many.
    """

    backend: str
    arch: int | str
    multiprocessors: int = 132

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may take."""
        if self.backend == "hip":
            return 64 * 2**10
        # CUDA C programming guide, compute capabilities: maximum shared memory of a thread block.
        return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(int(self.arch), 99) * 2**10


INTERPRETER = Target("interpreter", 0, multiprocessors=2)


@dataclass(frozen=True)
class Launch:
    """A launch that was noted and not made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


# What a block of code asks for, seen by the launches that it makes and by no other thread.
_recording: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("recording", default=None)
_shuffle: ContextVar[bool] = ContextVar("shuffle", default=True)

_launched = Counter[str]()


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Note launches instead of making them, as they would be made for `target`."""
    notes: list[Launch] = []
    token = _recording.set((target, notes))
    try:
        yield notes
    finally:
        _recording.reset(token)


@contextmanager
def shuffling(allowed: bool) -> Iterator[None]:
    """Within, NVIDIA's inline assembly dequantizes, or its twin in plain Triton."""
    token = _shuffle.set(allowed)
    try:
        yield
    finally:
        _shuffle.reset(token)


def launches() -> int:
    """Kernels of ours launched by this process so far."""
    return _launched.total()


def target_of(device: torch.device) -> Target:
    """The target of kernels that work on tensors of `device`."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded[0]
    return INTERPRETER if triton.knobs.runtime.interpret else _device_target(device)


@functools.cache
def _device_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    dtype: torch.dtype | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its first tensor.

    Args:
        kernel: a `triton.jit` function whose plain arguments come first and whose constants are named.
        grid: programs along each axis.
        *arguments: tensors and numbers.
        dtype: of the GEMMs: the constants DTYPE, and PRECISION of those in float32, where the kernel takes them.
        num_warps: of a program.
        num_stages: of its pipelined loops.
        **constants: the kernel's other constants.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    names = kernel.arg_names
    target = target_of(device)
    if "SHUFFLE" in names:
        constants["SHUFFLE"] = _shuffle.get() and target.backend == "cuda"
    if dtype is not None and "DTYPE" in names:
        constants["DTYPE"] = _DTYPES[dtype]
    if dtype is not None and "PRECISION" in names:
        # Low-rank factors are float32 whatever the GEMMs are: beside 16-bit GEMMs, TF32 keeps more than these do.
        constants["PRECISION"] = "ieee" if dtype == torch.float32 or target.backend == "interpreter" else "tf32"
    # No contraction: bitsandbytes rounds a scale twice, and the same bytes have to give the same weights here.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    recorded = _recording.get()
    if recorded is not None:
        recorded[1].append(Launch(kernel, grid, arguments, constants, options))
        return
    _launched[kernel.__name__] += 1
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, **options)
        return
    kernel[grid](*arguments, **constants, **options)
