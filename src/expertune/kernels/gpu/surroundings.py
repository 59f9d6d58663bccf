"""What may keep kernels from being built or run here, besides the device and the releases of torch and Triton.

Triton compiles a launcher with the host's C compiler and Python's headers, and the driver takes the binary. A check
that raised is believed as long as these stay as they are.
"""

import os
import platform
import shlex
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path

# Triton's own settings, the compiler's, and where libraries are looked for.
_VARIABLES = ("TRITON_", "CUDA_", "CC", "CFLAGS", "CPATH", "C_INCLUDE_PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH")

_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def surroundings() -> list[str]:
    """The driver's version, the compilers that are found, Python's headers, and variables that they go by."""
    compilers = (shlex.split(os.environ.get("CC", ""))[:1] or [""])[0], "cc", "gcc", "clang"
    files = [shutil.which(name) for name in compilers if name]
    files.append(str(Path(sysconfig.get_path("include")) / "Python.h"))
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
    return [platform.platform(), *map(_driver, _DRIVERS), *map(_state, files), *variables]


def _driver(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _state(path: str | None) -> str:
    """Which file lies at a path, and of when."""
    with suppress(OSError):
        if path:
            status = Path(path).stat()
            return f"{path} {status.st_size} {status.st_mtime_ns}"
    return f"{path} is not there"
