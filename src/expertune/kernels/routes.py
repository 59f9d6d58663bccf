"""Which route a GEMM of 4-bit weights takes: by tokens per expert, against a crossover measured once per machine.

`fused` dequantizes inside the GEMM, and wins where each dequantized weight meets few tokens; `dequant_gemm`
dequantizes first and multiplies what it dequantized, which wins where tokens are many and the machine has matrix units.
Where they cross is measured the first time, and kept in the user's cache. On a GPU a route has to pass its check there
before it is used (`expert_mlp/selfcheck.py`); where none does, or Triton is missing, experts are computed one by one by
torch.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from expertune.kernels import gpu, native, operators
from expertune.kernels.amounts import default_working_set_bytes
from expertune.kernels.cache import cache_folder, keep, read_kept
from expertune.kernels.cpu import cpu_instruction_sets, gemm_dtype
from expertune.kernels.processor import INTEGERS, cpu_name

Route = Literal["fused", "dequant_gemm", "expert_by_expert"]

FUSED: Route = "fused"
DEQUANT_GEMM: Route = "dequant_gemm"
# On a GPU without usable kernels: the loop over experts that a CPU's `dequant_gemm` is too.
EXPERT_BY_EXPERT: Route = "expert_by_expert"

# What is tried, in tokens per expert.
_TOKENS = (4, 8, 16, 32, 64, 128, 256)
_GPU_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048)
# Changes with how the routes run or are measured: what older code has measured is measured again.
_MEASURED_HOW = "4"
_NEVER = 2**62
# By what multiplies NF4 weights on a CPU; see `native.arithmetic`.
_FUSED_IN = ("float32", "bfloat16, AVX512-BF16", "bfloat16, AMX", INTEGERS)
# Where a full device leaves no room to measure: an estimate.
_UNMEASURED = {"crossover": 384, "gemm": "triton"}


class KernelSettings:
    """How the GEMMs of a model run, and which routes they took: carried by the model's layers (`use_settings`).

    Attributes:
        route: a route for all GEMMs, or `auto`.
        working_set_bytes: most bytes that one expert layer computes on at once, whatever the batch; None takes the
            device's own, see `working_set_on`.
        crossover: tokens per expert from which `dequant_gemm` is taken; None measures it.
        gemm: what multiplies dequantized weights on a GPU, `torch` or `triton`; None measures which is faster.
        ran: how often each route was taken.
        name: under which operators find it.

    Raises:
        ValueError: the fused route is asked for where it cannot run; says why.
    """

    def __init__(
        self,
        route: Route | Literal["auto"] = "auto",
        working_set_bytes: int | None = None,
        crossover: int | None = None,
        gemm: Literal["torch", "triton"] | None = None,
        name: str = "kernels",
    ) -> None:
        if route == FUSED and not native.available() and not torch.cuda.is_available():
            raise ValueError(f"the fused route cannot run here: {native.status().reason}")
        self.route, self.working_set_bytes, self.crossover, self.gemm = route, working_set_bytes, crossover, gemm
        self.ran: Counter[str] = Counter()
        self.name = operators.register(self, name)

    def __deepcopy__(self, memo: object) -> "KernelSettings":
        # A copy of a model runs as the model does.
        return self

    def __reduce__(self) -> tuple[type["KernelSettings"], tuple[Any, ...]]:
        return KernelSettings, (self.route, self.working_set_bytes, self.crossover, self.gemm)

    def working_set_on(self, device_type: str) -> int:
        """Most bytes of an expert layer between its GEMMs: the setting, or 512 MiB on a CPU and 2 GiB on a GPU."""
        chosen = self.working_set_bytes
        return default_working_set_bytes(device_type) if chosen is None else chosen

    def choose(
        self,
        device: torch.device,
        tokens_per_expert: float,
        dtype: torch.dtype,
        grouped: bool = True,
        fusable: bool = True,
    ) -> Route:
        """The route of a GEMM whose x has `dtype`, and note that it ran.

        `grouped` says whether the GPU's kernels can serve this layer at all, `fusable` whether those that dequantize
        inside the GEMM can.
        """
        usable = usable_routes(device, dtype) if grouped or device.type == "cpu" else ()
        if not fusable and device.type != "cpu":
            usable = tuple(route for route in usable if route != FUSED)
        route: Route
        if not usable:
            route = EXPERT_BY_EXPERT if device.type != "cpu" else DEQUANT_GEMM
        elif len(usable) == 1:
            route = usable[0]
        elif self.route != "auto":
            route = self.route
        else:
            route = FUSED if tokens_per_expert < self.crossover_on(device, dtype) else DEQUANT_GEMM
        self.ran[route] += 1
        return route

    def crossover_on(self, device: torch.device, dtype: torch.dtype) -> int:
        """Tokens per expert from which `dequant_gemm` is the faster route on a device, for x of `dtype`."""
        if self.crossover is not None:
            return self.crossover
        in_integers = device.type == "cpu" and native.arithmetic(dtype) == native.INTEGERS
        measured = dtype if in_integers else gemm_dtype(dtype, device)
        return int(_measured(measured, device, torch.get_num_threads())["crossover"])

    def gemm_on(self, device: torch.device, dtype: torch.dtype) -> str:
        """What multiplies dequantized weights on a GPU: `torch`'s grouped_mm or our own kernel in `triton`."""
        if self.gemm is not None:
            return self.gemm
        return str(_measured(dtype, device, torch.get_num_threads())["gemm"])

    def describe(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What ran and why, for the run's record: plain values."""
        described: dict[str, Any] = {
            "setting": self.route,
            "working_set_bytes": self.working_set_on(device.type),
            "product_dtype": str(gemm_dtype(dtype, device)).removeprefix("torch."),
            "ran": dict(self.ran),
        }
        if device.type == "cpu":
            usable = native.available()
            described["native"] = "in use" if usable else native.status().reason
            described["crossover"] = self.crossover_on(device, dtype) if usable else 0
            if usable and dtype != torch.float32 and self.route != DEQUANT_GEMM:
                described["fused_in"] = _FUSED_IN[native.arithmetic(dtype)]
            return described
        reason = gpu.unavailable(device)
        described["triton"] = reason or "in use"
        if not reason:
            from expertune.kernels.expert_mlp.selfcheck import checked

            findings = checked(device, dtype)
            described["self_check"] = {
                part: findings.messages.get(part, f"relative error {error:.1e}")
                + ("" if part in findings.passed else ", not used")
                for part, error in findings.errors.items()
            }
            if len(usable_routes(device, dtype)) == 2:
                described["crossover"] = self.crossover_on(device, dtype)
            if DEQUANT_GEMM in usable_routes(device, dtype):
                described["gemm"] = self.gemm_on(device, dtype)
        return described


DEFAULT_SETTINGS = KernelSettings(name="default")
"""Of layers that nobody gave others."""


class HasKernelSettings:
    """A layer whose GEMMs run as its `kernel_settings` say."""

    kernel_settings: KernelSettings = DEFAULT_SETTINGS


def use_settings(model: nn.Module, settings: KernelSettings) -> None:
    """Give all layers of a model the same settings."""
    for module in model.modules():
        if isinstance(module, HasKernelSettings):
            module.kernel_settings = settings


def settings_of(model: nn.Module) -> KernelSettings:
    """The settings that a model's layers share; made here where nobody gave any."""
    layers = (module for module in model.modules() if isinstance(module, HasKernelSettings))
    settings = next((layer.kernel_settings for layer in layers), DEFAULT_SETTINGS)
    if settings is DEFAULT_SETTINGS:
        settings = KernelSettings()
        use_settings(model, settings)
    return settings


def usable_routes(device: torch.device, dtype: torch.dtype) -> tuple[Route, ...]:
    """Routes that can run on a device: on a GPU those that passed their check there."""
    if device.type == "cpu":
        return (FUSED, DEQUANT_GEMM) if native.available() else (DEQUANT_GEMM,)
    if gpu.unavailable(device):
        return ()
    from expertune.kernels.expert_mlp.selfcheck import checked

    passed = checked(device, dtype).passed
    return tuple(route for route in (FUSED, DEQUANT_GEMM) if route in passed)


def summarize(described: dict[str, Any]) -> str:
    """What `describe` found, in a sentence for the terminal."""
    in_integers = described.get("fused_in") == INTEGERS
    products = f"products in {INTEGERS if in_integers else described['product_dtype']}"
    if described.get("native", "in use") != "in use":
        return f"{products} by torch and bitsandbytes alone, without the native library: {described['native']}"
    if described.get("triton", "in use") != "in use":
        return f"{products}, expert by expert, without Triton's kernels: {described['triton']}"
    failed = [part for part, found in described.get("self_check", {}).items() if found.endswith("not used")]
    note = f" ({' and '.join(failed)} failed the check on this device)" if failed else ""
    if "crossover" not in described:
        return f"{products}{note}"
    if described["setting"] != "auto":
        return f"{products}, {described['setting']} as kernels.route says{note}"
    below = described["crossover"]
    first = f"{DEQUANT_GEMM} in {described['product_dtype']}" if in_integers else DEQUANT_GEMM
    limit = "" if below == _NEVER else f" below {below} tokens per expert, {first} from there on"
    return f"{products}, {FUSED}{limit}{note}"


@cache
@torch.inference_mode(False)  # it differentiates, whatever the first GEMM of a process is for
def _measured(dtype: torch.dtype, device: torch.device, threads: int) -> dict[str, Any]:
    """`crossover` and, on a GPU, `gemm`: from the cache, or measured."""
    path = _cache_path(dtype, device, threads)
    try:
        found: dict[str, Any] = read_kept(path)
        int(found["crossover"])
        return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        found = {"crossover": _measure(dtype)} if device.type == "cpu" else _measure_gpu(dtype, device)
    except torch.OutOfMemoryError:
        return _UNMEASURED
    with contextlib.suppress(OSError):  # measured again next time
        keep(path, json.dumps(found))
    return found


def _cache_path(dtype: torch.dtype, device: torch.device, threads: int) -> Path:
    machine = [_MEASURED_HOW, torch.__version__, str(dtype)]
    if device.type == "cpu":
        machine += [cpu_name(), *cpu_instruction_sets(), native.status().reason, str(threads)]
    else:
        machine += [torch.cuda.get_device_name(device), importlib.metadata.version("triton")]
    digest = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    return cache_folder() / f"crossover-{digest}.json"


def _measure(dtype: torch.dtype) -> int:
    """The tokens per expert from which on dequantizing first is always faster, or `_NEVER`; of whole expert layers."""
    from expertune.kernels.expert_mlp import calibrate, dequant_gemm, fused

    device = torch.device("cpu")

    def seconds(tokens: int) -> list[float]:
        return _fastest([calibrate.layer_pass(route, tokens, dtype, device) for route in (dequant_gemm, fused)])

    try:
        return _crossover(_TOKENS, seconds)
    finally:
        calibrate.release(device)


def _measure_gpu(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What multiplies dequantized weights fastest on a GPU, and where it overtakes the fused route; of whole layers."""
    from expertune.kernels.expert_mlp import calibrate
    from expertune.kernels.expert_mlp.grouped import GroupedRoute
    from expertune.kernels.expert_mlp.selfcheck import checked

    passed = checked(device, dtype).passed
    shuffle = "shuffle" in passed
    fused, kinds = GroupedRoute(False, shuffle=shuffle), {"triton": GroupedRoute(True, shuffle=shuffle)}
    if "grouped_mm" in passed:
        kinds["torch"] = GroupedRoute(True, torch_gemm=True, shuffle=shuffle)

    def seconds(route: GroupedRoute, tokens: int) -> float:
        return calibrate.layer_seconds(route, tokens, dtype, device)

    try:
        fastest = min(kinds, key=lambda kind: seconds(kinds[kind], _GPU_TOKENS[-1]))
        crossover = _crossover(_GPU_TOKENS, lambda tokens: [seconds(kinds[fastest], tokens), seconds(fused, tokens)])
        return {"crossover": crossover, "gemm": fastest}
    finally:
        calibrate.release(device)


def _crossover(counts: Sequence[int], seconds: Callable[[int], Sequence[float]]) -> int:
    """The smallest of the ascending counts from which on the first time is the lower one at all of them.

    Not the first count at which it is lower: one count that was disturbed would then decide for all larger ones.
    """
    crossover = _NEVER
    for tokens in reversed(counts):
        dequantized_first, dequantized_inside = seconds(tokens)
        if dequantized_first >= dequantized_inside:
            break
        crossover = tokens
    return crossover


def _fastest(runs: Sequence[Callable[[], object]], rounds: int = 3) -> list[float]:
    """Seconds of each at its fastest, taken in turn: what else the machine does meanwhile must not decide for good."""
    fastest = [math.inf] * len(runs)
    for round_ in range(rounds + 1):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            if round_:  # the first one warms up
                fastest[index] = min(fastest[index], time.perf_counter() - started)
    return fastest
