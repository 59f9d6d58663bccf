"""How fast this CPU is: measured once on a machine, and kept."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version

from expertune.kernels.amounts import Dtype
from expertune.kernels.cache import cache_folder, read_kept
from expertune.kernels.processor import cpu_name, processor
from expertune.storage import write_text

# Rows, depth and columns of the product, and bytes of the copy.
_PRODUCT = (512, 2048, 2048)
_COPIED_BYTES = 2**27


@cache
def cpu_rates(dtype: Dtype, threads: int) -> tuple[float, float]:
    """FLOP/s of a product and bytes/s of a copy on this CPU: from the user's cache, or measured in a second."""
    machine = [version("torch"), f"torch.{dtype.name}", cpu_name(), *processor().instruction_sets, str(threads)]
    digest = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    path = cache_folder() / f"rates-{digest}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_kept(path)
        return float(found["flops_per_second"]), float(found["bytes_per_second"])
    import torch

    rows, depth, columns = _PRODUCT
    held = getattr(torch, dtype.name)
    x, w = torch.randn(rows, depth).to(held), torch.randn(depth, columns).to(held)
    out = torch.empty(rows, columns, dtype=held)
    flops = 2 * rows * depth * columns / _median_seconds(lambda: torch.mm(x, w, out=out))
    source, target = (torch.ones(_COPIED_BYTES // 4) for _ in range(2))
    num_bytes = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))
    with suppress(OSError):  # measured again next time
        write_text(path, json.dumps({"flops_per_second": flops, "bytes_per_second": num_bytes}))
    return flops, num_bytes


def _median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median of a few runs: other programs may be at work."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
