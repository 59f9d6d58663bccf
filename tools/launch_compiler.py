"""Compile noted launches for any target, without a device, and read what the compiler says of them.

Registers and spilled bytes come from what NVIDIA's assembler tells Triton, and for AMD from the assembly's own notes.
Nothing is loaded, so that any machine can do this.
"""

import io
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expertune.kernels.gpu.launch import Launch, Target

# Triton prints what the assembler says; nothing is said of a kernel that comes from Triton's cache.
triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True

TARGETS = (*(Target("cuda", arch) for arch in (80, 89, 90, 100, 120)), Target("hip", "gfx942", 304))

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel.

    Attributes:
        kernel: its name.
        target: for instance `sm_90`, `gfx942`.
        constants: its constants and options.
        registers: of a thread.
        spilled_bytes: stores and loads of registers that did not fit.
        shared_bytes: of a program.
    """

    kernel: str
    target: str
    constants: dict[str, Any]
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in self.items()}
        return asdict(self) | {"constants": plain}

    def items(self) -> Iterable[tuple[str, Any]]:
        """The constants, in order."""
        return sorted(self.constants.items())


def compile_launch(note: Launch, target: Target) -> Compiled:
    """Compile one launch as Triton would at run time: same types, alignments and constants."""
    source = _source(note)
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    said = io.StringIO()
    with redirect_stdout(said):
        built = triton.compile(source, target=gpu, options=note.options)
    constants = note.constants | note.options
    if target.backend == "hip":
        registers, spilled = _amd_usage(built.asm["amdgcn"])
        name = str(target.arch)
    else:
        registers, spilled = _nvidia_usage(said.getvalue())
        name = f"sm_{target.arch}"
    return Compiled(note.kernel.__name__, name, constants, registers, spilled, built.metadata.shared)


def distinct(notes: Iterable[Launch]) -> list[Launch]:
    """One launch for each kernel that would be compiled."""
    found: dict[Any, Launch] = {}
    for note in notes:
        source = _source(note)
        options = tuple(sorted(note.options.items()))
        key = (note.kernel.__name__, str(source.signature), str(source.constants), str(source.attrs), options)
        found.setdefault(key, note)
    return list(found.values())


def _source(note: Launch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    names = note.kernel.arg_names
    for position, (name, value) in enumerate(zip(names, note.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        aligned = value.storage_offset() * value.itemsize if isinstance(value, Tensor) else value
        if not isinstance(value, float) and aligned % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    for name in names[len(note.arguments) :]:
        signature[name], constants[name] = "constexpr", note.constants[name]
    return ASTSource(fn=note.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _nvidia_usage(said: str) -> tuple[int, int]:
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", said))
    return registers, spilled


def _amd_usage(assembly: str) -> tuple[int, int]:
    def largest(name: str) -> int:
        return max((int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    # Scalar registers spill into lanes of vector registers, not into memory.
    return largest("vgpr_count"), 4 * largest("vgpr_spill_count")
