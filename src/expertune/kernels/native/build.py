"""Compile the C files of this folder with the machine's own compiler, once, and load them.

The library is kept in the user's cache under a name that holds a hash of the sources, the flags and the compiler, so
that a new release or another machine makes its own. Its threads are torch's: it is linked against the OpenMP runtime
that torch has loaded, because two pools of threads on the same cores would wait for each other.

What this leaves out: any copy of the routes in Python. Where there is no compiler, or no AVX2, the callers use torch
and bitsandbytes, and `status()` says why.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from expertune.kernels.cache import cache_folder, tidy, why_not_private
from expertune.kernels.cpu import cpu_instruction_sets
from expertune.kernels.processor import SWITCH
from expertune.storage import BESIDE

FOLDER = Path(__file__).parent
# Need a compiler that knows AVX512-VNNI, AVX512-BF16 and AMX; the library is of use without them.
AVX512 = ("panels16.c", "grouped_gemm16.c", "gemv4_dots.c")
SOURCES = (
    *("nf4.c", "panels.c", "grouped_gemm.c", "panels_int16.c", "rounded_int16.c", "grouped_gemm_int16.c"),
    *(*AVX512, "gemv4.c", "gemv4_avx2.c", "attention.c", "dense.c", "norm.c", "swiglu.c", "dropout.c"),
    "cross_entropy.c",
)
HEADERS = (
    *("common.h", "grouped_gemm.h", "panels.h", "grouped_gemm16.h", "grouped_gemm_int16.h"),
    *("gemv4.h", "sigmoid.h"),
)
# No contraction into fused multiply-add where the source does not ask for it: scales must round as bitsandbytes' do.
FLAGS = (
    *("-std=c11", "-D_DEFAULT_SOURCE", "-O3", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off"),
    *("-fopenmp", "-fPIC", "-fvisibility=hidden"),
)


@dataclass(frozen=True)
class Status:
    """Whether the native library is in use.

    Attributes:
        library: the loaded library, or None.
        reason: where it is, or why there is none.
    """

    library: ctypes.CDLL | None
    reason: str


@cache
def status() -> Status:
    """Compile and load the library unless that has been done; never raises."""
    if os.environ.get(SWITCH) == "0":
        return Status(None, f"switched off by {SWITCH}=0")
    if platform.system() != "Linux" or not {"avx2", "fma3"} <= set(cpu_instruction_sets()):
        return Status(None, "written for Linux on x86-64 with AVX2 and FMA, which this machine is not")
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    )
    if not compiler:
        return Status(None, "no C compiler found (cc, gcc, clang, or the variable CC); install one, such as gcc")
    try:
        sources = {name: FOLDER.joinpath(name).read_bytes() for name in (*HEADERS, *SOURCES)}
        path = _library_path(compiler, sources)
        if not path.exists() or why_not_private(path):
            _compile(compiler, path, sources)
            tidy(path)
        if reason := why_not_private(path):
            return Status(None, reason)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return Status(None, f"{shlex.join(compiler)} could not build it: {detail.strip().splitlines()[-1][:200]}")
    return Status(library, str(path))


def library() -> ctypes.CDLL | None:
    """The loaded library, or None where torch and bitsandbytes do its work."""
    return status().library


def _library_path(compiler: list[str], sources: Mapping[str, bytes]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    digest = hashlib.sha256()
    for part in (torch.__version__, version, *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sources.values():
        digest.update(source + b"\0")
    return cache_folder() / f"native-{digest.hexdigest()[:16]}.so"


def _compile(compiler: list[str], path: Path, sources: Mapping[str, bytes]) -> None:
    """Build beside, then rename, so that processes that start together never load half a library.

    What is compiled is what was read: a source that is edited meanwhile would be kept under the earlier one's hash.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=BESIDE) as beside:
        built = Path(beside) / path.name
        objects = []
        for name, source in sources.items():
            (Path(beside) / name).write_bytes(source)
        for name in SOURCES:
            objects.append(str(Path(beside) / f"{name}.o"))
            command = [*compiler, *FLAGS, "-c", str(Path(beside) / name), "-o", objects[-1]]
            try:
                _run(command)
            except subprocess.CalledProcessError:
                if name not in AVX512:
                    raise
                _run([*command, "-DWITHOUT_AVX512"])  # gcc before 11 does not know AMX: the rest is as fast as it was
        # Without -fopenmp here: the runtime's symbols are found in the one that torch has loaded.
        _run([*compiler, "-shared", *objects, "-lm", "-o", str(built)])
        try:
            ctypes.CDLL(str(built), mode=os.RTLD_NOW)
        except OSError:
            _run([*compiler, "-shared", "-fopenmp", *objects, "-lm", "-o", str(built)])
        built.chmod(0o700)  # whatever the umask is: a library that others may write is not loaded
        built.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
