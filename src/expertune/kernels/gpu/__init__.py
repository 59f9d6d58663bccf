"""The Triton kernels of the GPU routes. Import its modules only where `available` says that triton is there.

Nothing here reads a value back from the device: shapes on the host decide which kernel runs, and what depends on the
routing (tokens of an expert, tiles) is found on the device. So a step can be captured in a CUDA graph.
"""

import importlib.util
from functools import cache

import torch

# First compute capability whose tensor cores multiply bfloat16, and for which Triton's GEMMs are built.
_FIRST_CAPABILITY = (8, 0)


@cache
def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run on a device; empty where they can, as far as can be told without running them."""
    if device.type != "cuda":
        return f"they run on a GPU, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} is below 8.0"
    return ""
