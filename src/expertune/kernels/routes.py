"""Which route a product of 4-bit weights takes: by tokens per expert, against a crossover measured once per machine.

`fused` decodes inside the product, and wins where each decoded weight meets few rows; `decode_then_gemm` decodes a tile
and hands it to the machine's own matrix product, which wins where rows are many and the machine has matrix units. Where
they cross is measured the first time, and kept in the user's cache.
"""

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from expertune.kernels import native
from expertune.kernels.cpu import cpu_instruction_sets, cpu_name, product_dtype
from expertune.kernels.native.build import cache_folder
from expertune.kernels.nf4 import Nf4Stack

Route = Literal["fused", "decode_then_gemm"]

FUSED: Route = "fused"
DECODE_THEN_GEMM: Route = "decode_then_gemm"

# What is tried, in rows for each expert, and a matrix that is large enough not to fit a core's own cache when decoded.
_ROWS = (4, 16, 64, 256, 1024)
_MATRIX = (1024, 2048)
_NEVER = 2**62


@dataclass(frozen=True)
class Settings:
    """How products run; one per process.

    Attributes:
        route: a route for all products, or `auto`.
        working_set_bytes: most bytes of rows that one expert layer computes on at once, whatever the batch.
        crossover: rows for each expert from which `decode_then_gemm` is taken; None measures it.
    """

    route: Route | Literal["auto"] = "auto"
    working_set_bytes: int = 2**29
    crossover: int | None = None


_settings = Settings()
_ran: Counter[str] = Counter()


def settings() -> Settings:
    """The settings in force."""
    return _settings


def configure(**changes: Any) -> None:
    """Change settings by name, and forget what ran.

    Raises:
        ValueError: the fused route is asked for where it cannot run; says why.
    """
    global _settings
    chosen = replace(_settings, **changes)
    if chosen.route == FUSED and not native.available():
        raise ValueError(f"the fused route cannot run here: {native.status().reason}")
    _settings = chosen
    _ran.clear()


def choose(device: torch.device, rows_per_expert: float, dtype: torch.dtype) -> Route:
    """The route of a product whose x has `dtype`, and note that it ran."""
    route: Route
    if device.type != "cpu" or not native.available():
        route = DECODE_THEN_GEMM
    elif _settings.route != "auto":
        route = _settings.route
    else:
        route = FUSED if rows_per_expert < crossover(dtype) else DECODE_THEN_GEMM
    _ran[route] += 1
    return route


def crossover(dtype: torch.dtype) -> int:
    """Rows for each expert from which `decode_then_gemm` is the faster route on this CPU, for x of `dtype`."""
    if _settings.crossover is not None:
        return _settings.crossover
    return _measured_crossover(product_dtype(dtype, torch.device("cpu")), torch.get_num_threads())


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What ran and why, for the run's record: plain values."""
    described: dict[str, Any] = {
        "setting": _settings.route,
        "working_set_bytes": _settings.working_set_bytes,
        "product_dtype": str(product_dtype(dtype, device)).removeprefix("torch."),
        "ran": dict(_ran),
    }
    if device.type == "cpu":
        usable = native.available()
        described["native"] = "in use" if usable else native.status().reason
        described["crossover"] = crossover(dtype) if usable else 0
    return described


def say(described: dict[str, Any]) -> str:
    """What `describe` found, in a sentence for the terminal."""
    products = f"products in {described['product_dtype']}"
    if "crossover" not in described:
        return f"{products}, {DECODE_THEN_GEMM}"
    if described["native"] != "in use":
        return f"{products} by torch and bitsandbytes alone, without the native library: {described['native']}"
    if described["setting"] != "auto":
        return f"{products}, {described['setting']} as kernels.route says"
    below = described["crossover"]
    limit = "" if below == _NEVER else f" below {below} tokens per expert, {DECODE_THEN_GEMM} from there on"
    return f"{products}, {FUSED}{limit}"


@cache
def _measured_crossover(dtype: torch.dtype, threads: int) -> int:
    path = _cache_path(dtype, threads)
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["crossover"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _measure(dtype)
    try:
        beside = path.with_suffix(f".{time.monotonic_ns()}")
        beside.write_text(json.dumps({"crossover": found}), encoding="utf-8")
        beside.replace(path)
    except OSError:
        pass  # measured anew next time
    return found


def _cache_path(dtype: torch.dtype, threads: int) -> Path:
    machine = [
        cpu_name(),
        *cpu_instruction_sets(),
        torch.__version__,
        native.status().reason,
        str(dtype),
        str(threads),
    ]
    digest = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    return cache_folder() / f"crossover-{digest}.json"


def _measure(dtype: torch.dtype) -> int:
    """The first number of rows at which decoding first is no slower, or a number that is never reached."""
    from expertune.kernels.grouped_linear import decode_then_gemm, fused

    generator = torch.Generator().manual_seed(0)
    weight = Nf4Stack(1, *_MATRIX)
    weight.write(0, torch.randn(*_MATRIX, generator=generator))
    for rows in _ROWS:
        x = torch.randn(rows, _MATRIX[1], generator=generator).to(dtype)
        arguments = [x, weight.bytes, torch.tensor([rows]), *([] for _ in range(5))]
        if _seconds(decode_then_gemm.forward, *arguments) <= _seconds(fused.forward, *arguments):
            return rows
    return _NEVER


def _seconds(run: Callable[..., object], *arguments: object, repeats: int = 3) -> float:
    run(*arguments)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(*arguments)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
