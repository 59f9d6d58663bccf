"""Whether there may be a GPU here that torch computes on, without importing torch."""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

_DRIVER = "libcuda.so.1"
_AMD_DRIVER = Path("/dev/kfd")


def may_have_gpu() -> bool:
    """False only where torch would find none: it is built for none, or the driver that its build asks is missing."""
    if "torch.nn" in sys.modules:  # `torch` alone may be there and not read yet
        return True  # which can be asked itself
    built = _built_for()
    if built is None:
        return True
    if not any(built.values()):
        return False
    if not sys.platform.startswith("linux"):
        return True
    return (built["cuda"] and _has_nvidia_driver()) or (built["hip"] and _AMD_DRIVER.exists())


def _built_for() -> dict[str, bool] | None:
    """Whether torch is built with CUDA and with ROCm, by the file in which it says so; None where it does not."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    try:
        text = (Path(folders[0]) / "version.py").read_text(encoding="utf-8")
    except (IndexError, OSError, UnicodeDecodeError):
        return None
    found = {name: re.findall(rf"^{name}\b[^=\n]*=[ ]*(.+?)[ ]*$", text, re.MULTILINE) for name in ("cuda", "hip")}
    if not all(len(values) == 1 for values in found.values()):
        return None
    return {name: values[0] != "None" for name, values in found.items()}


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True
