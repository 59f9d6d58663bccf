"""This CPU as torch sees it: its instruction sets and threads, kept so that a plan need not import torch for them."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from expertune.kernels.amounts import FLOAT32, Dtype
from expertune.kernels.cache import path_of, remember
from expertune.kernels.limits import read

MULTIPLIES = {
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16"}),
    "float16": frozenset({"avx512_fp16", "amx_fp16"}),
}
"""Instructions that multiply a 16-bit dtype; without them torch converts number by number, a hundred times slower."""

INTEGERS = "integers of 16 bits"
"""What the native library multiplies 4-bit weights and 16-bit tokens in, where a CPU multiplies no 16-bit floats."""

SWITCH = "EXPERTUNE_NATIVE"
"""Set to 0 to run without the native library, as on a machine that has no compiler."""

# By the native library.
_NEEDED = frozenset({"avx2", "fma3"})

# Variables by which the runtimes of threads, and torch itself, count threads or use fewer instructions.
_DECIDING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "TORCH_", "ONEDNN_", "DNNL_", "LD_")
_CPUINFO = Path("/proc/cpuinfo")
# What of it says which CPU this is, on x86 and on Arm, and not how fast a core is at the moment (`cpu MHz`).
_IDENTITY = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "cpu cores", "flags"),
    *("cpu implementer", "cpu architecture", "cpu variant", "cpu part", "cpu revision", "features"),
)


@dataclass(frozen=True)
class Processor:
    """What torch says of the CPU.

    Attributes:
        instruction_sets: see `expertune.kernels.cpu.cpu_instruction_sets`.
        threads: how many an operator takes.
    """

    instruction_sets: tuple[str, ...]
    threads: int

    def gemm_dtype(self, dtype: Dtype) -> Dtype:
        """See `expertune.kernels.cpu.gemm_dtype`."""
        needed = MULTIPLIES.get(dtype.name)
        return dtype if needed is None or needed & set(self.instruction_sets) else FLOAT32

    def may_take_integers(self, dtype: Dtype) -> bool:
        """Whether products of 4-bit weights with tokens of `dtype` are in `INTEGERS`, if the native library is in use.

        What it says of a CPU is what `expertune.kernels.native.arithmetic` asks the library.
        """
        found = set(self.instruction_sets)
        return dtype.itemsize == 2 and found >= _NEEDED and not MULTIPLIES["bfloat16"] & found


def processor() -> Processor:
    """This process's: asked of torch where it is imported, else what a process like this one has kept, if one has."""
    return _asked() if "torch.nn" in sys.modules else _kept()  # `torch` alone may be there and not read yet


def _asked() -> Processor:
    import torch

    from expertune.kernels.cpu import cpu_instruction_sets

    return Processor(cpu_instruction_sets(), torch.get_num_threads())


@cache
def _kept() -> Processor:
    """Kept under all that decides the answer: the CPU and the system, torch's release, how it is asked, variables."""
    return remember(path_of("processor", _decides()), _asked, lambda asked: json.dumps(asdict(asked)), _loaded)


def _loaded(text: str) -> Processor:
    found = json.loads(text)
    return Processor(tuple(found["instruction_sets"]), found["threads"])


def _decides() -> list[object]:
    lines = read(_CPUINFO).splitlines()
    return [
        version("torch"),
        read(Path(__file__).with_name("cpu.py")),  # how torch is asked
        platform.platform(),
        platform.processor(),
        list(dict.fromkeys(line for line in lines if line.partition(":")[0].strip().lower() in _IDENTITY)),
        os.cpu_count(),
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        sorted((name, value) for name, value in os.environ.items() if name.startswith(_DECIDING)),
    ]


def cpu_name() -> str:
    """The CPU's model name."""
    for line in read(_CPUINFO).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
