"""How much memory a process takes for its own data, looked at after every operator of torch."""

import ctypes
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def own_bytes() -> int:
    """Bytes of anonymous memory, in RAM or swapped out. Pages of files are not in it: those come and go as others use
    the machine.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


class Peak(TorchDispatchMode):
    """Within it, the most bytes above those at its start.

    Attributes:
        bytes: the most so far.
    """

    def __enter__(self) -> "Peak":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        self.bytes, self._before = 0, own_bytes()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, own_bytes() - self._before)
        return out
