"""Does each GPU route compute what plain float64 arithmetic does, on this device, with this Triton? Asked once.

Triton has miscompiled kernels before, on one device and release and not on another. So before a route is used on a
device, a small layer with odd shapes, a skewed routing, an expert without tokens, adapters and dropout goes through it,
forward and backward, and is checked against the definition. The answer is kept in the user's cache, by device, driver's
torch, Triton and the kernels' own source; a route that fails is not used, and the run's record says so. A check that
raised is kept too, because it may take a minute: for a day at most, and while what kernels are built by stays as it is.
One that met a full device or ended its process is not.

The checks run in a process of their own: after an illegal access a process can use its device no more, and a run whose
route has failed goes on with the next one.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertune.kernels.cache import cache_folder, keep, read_kept
from expertune.kernels.dropout import dropout
from expertune.kernels.expert_mlp.grouped import GroupedRoute
from expertune.kernels.expert_mlp.plan import Activation, Chunk, FrozenLayer, Gradients, differentiable
from expertune.kernels.gpu import launch, nf4, torch_gemm
from expertune.kernels.gpu.surroundings import surroundings
from expertune.kernels.lora import LoraUpdate
from expertune.kernels.nf4 import Nf4Stack
from expertune.storage import write_text

# Experts, hidden and intermediate size, experts per token, rank, tokens: no multiple of any tile.
SHAPE = (5, 192, 320, 2, 3, 77)

# Most relative error of any result. What is between the GEMMs is rounded to the dtype, as everywhere.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}

# What is checked everywhere, each after those that it builds on; `grouped_mm` besides where torch has it.
PARTS = ("shuffle", "fused", "dequant_gemm")

# What the process of a check may take: compiling its kernels is most of it, a minute on a slow host.
_SECONDS = 900.0

# For so long a check that raised is not repeated: what has mended it may be nothing that is looked at.
_FAILED_SECONDS = 86_400

# Less that is free on a device may be why a check raised.
_ROOM_BYTES = 2**30


@dataclass
class Findings:
    """What was found of each part.

    Attributes:
        errors: largest relative error by part (`shuffle`, `fused`, `dequant_gemm`, `grouped_mm`); infinity where
            it did not run.
        messages: why a part did not run.
        passed: parts within their limit.
        ended: parts whose process ended before they were done.
    """

    errors: dict[str, float] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def note(self, part: str, limit: float, run: Callable[[], float]) -> None:
        """Run a check; whatever it raises is a failure of the part, and the message is kept."""
        try:
            self.errors[part] = run()
        except Exception as error:
            self.errors[part] = math.inf
            self.messages[part] = f"{type(error).__name__}: {error}"[:500]
        if self.errors[part] <= limit:
            self.passed.append(part)


@cache
def checked(device: torch.device, dtype: torch.dtype) -> Findings:
    """The findings for a device and a dtype of the GEMMs: from the cache, or by running the checks."""
    known = _identity(device, dtype)
    ran = cache_folder() / f"gpu-check-{known}.json"
    failed = cache_folder() / f"gpu-failed-{_digest([known, *surroundings()])}.json"
    for path in (ran, failed):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = read_kept(path)
            if path == ran or 0 <= time.time() - kept["checked_at"] < _FAILED_SECONDS:
                return Findings(**kept["findings"])
    had_room = _has_room(device)
    found = check_apart([sys.executable, "-P", "-m", __name__, str(device), str(dtype).removeprefix("torch.")])
    # Where one process alone may use the device, it is this one.
    findings = check(device, dtype) if found is None else found
    # What did not run for want of memory is tried again next time, and so is what took its process with it.
    if not findings.messages or (had_room and _has_room(device) and not findings.ended):
        with contextlib.suppress(OSError):  # checked again next time
            kept = {"findings": asdict(findings), "checked_at": time.time()}
            keep(failed if findings.messages else ran, json.dumps(kept))
    return findings


def _has_room(device: torch.device) -> bool:
    """Whether a device has memory for a check; not where it cannot even say so."""
    if device.type != "cuda":
        return True
    try:
        return torch.cuda.mem_get_info(device)[0] >= _ROOM_BYTES
    except RuntimeError:
        return False


@torch.inference_mode(False)
def check(
    device: torch.device,
    dtype: torch.dtype,
    findings: Findings | None = None,
    begin: Callable[[str], bool] = lambda part: True,
) -> Findings:
    """Run the checks on a device.

    Args:
        device: which.
        dtype: of the GEMMs.
        findings: of parts that have been checked already; others are added.
        begin: called with each part before it is checked; whether to go on.
    """
    findings = findings or Findings()
    kinds: dict[str, GroupedRoute | None] = {"shuffle": None, "fused": GroupedRoute(False)}
    # A buffer of one expert's matrices, so that groups are walked over.
    kinds["dequant_gemm"] = GroupedRoute(True, buffer_bytes=1)
    if torch_gemm.available(device, dtype):
        kinds["grouped_mm"] = GroupedRoute(True, torch_gemm=True)
    for part, route in kinds.items():
        if part in findings.errors:
            continue
        if not begin(part):
            break
        if route is None:
            findings.note(part, 0.0, lambda: dequantize_error(device, dtype))
            continue
        route = replace(route, shuffle="shuffle" in findings.passed)
        findings.note(part, LIMITS[dtype], lambda route=route: layer_error(route, device, dtype))  # type: ignore[misc]
    return findings


def check_apart(command: Sequence[str], seconds: float = _SECONDS) -> Findings | None:
    """Have a command run the checks in a process of its own, and again for the rest where one of them ended it.

    Args:
        command: is given a file, and keeps there what it has found, as `main` does.
        seconds: what one process may take.

    Returns:
        The findings; None where no process has begun a single check. Once one has, what is not among them has not
        run: the device may not be used in the caller's own process after that of a check has crashed.
    """
    with tempfile.TemporaryDirectory(prefix="expertune-check-") as folder:
        path = Path(folder) / "findings.json"
        findings = Findings()
        state: dict[str, Any] = {}
        while not state.get("done"):
            write_text(path, json.dumps({"findings": asdict(findings)}))
            ended = _run([*command, str(path)], seconds)
            state = json.loads(path.read_text(encoding="utf-8"))
            known, findings = len(findings.errors), Findings(**state["findings"])
            if part := state.get("part"):
                findings.errors[part], findings.messages[part] = math.inf, ended
                findings.ended.append(part)
            elif len(findings.errors) == known and not state.get("done"):
                if not known:
                    return None
                for part in PARTS:
                    if part not in findings.errors:
                        findings.errors[part], findings.messages[part] = math.inf, f"not run: {ended}"
                        findings.ended.append(part)
                break
        return findings


def main(arguments: Sequence[str]) -> None:
    """Check a device and a dtype, from the findings in a file on; they are kept there before and after each part."""
    device, dtype, path = torch.device(arguments[0]), getattr(torch, arguments[1]), Path(arguments[2])
    findings = Findings(**json.loads(path.read_text(encoding="utf-8"))["findings"])
    torch.empty(1, device=device)  # before anything counts as begun

    def keep(**state: object) -> None:
        write_text(path, json.dumps({"findings": asdict(findings), **state}))

    def begin(part: str) -> bool:
        # What has raised may have left the device unusable; what follows is checked in another process.
        clean = not (set(findings.messages) - before)
        keep(**({"part": part} if clean else {}))
        return clean

    before = set(findings.messages)
    check(device, dtype, findings, begin)
    keep(done=not (set(findings.messages) - before))


def _run(command: Sequence[str], seconds: float) -> str:
    """Run a command, and say how it has ended."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} seconds"
    except OSError as error:
        return f"its process cannot be started: {error}"
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}"
    return f"its process has ended with status {done.returncode}: {done.stderr.strip()[-400:]}"


def dequantize_error(device: torch.device, dtype: torch.dtype) -> float:
    """Share of dequantized weights whose bits are not those of the definition."""
    stack = _stack(2, 72, 192, seed=0)
    expected = torch.stack([stack.dequantize(index, dtype) for index in range(2)])
    out = torch.full((2 * 72, 192), math.nan, dtype=dtype, device=device)
    nf4.dequantize(stack.to(device).bytes, slice(0, 2), out)
    return (out.cpu().view(2, 72, 192) != expected).double().mean().item()


@torch.no_grad()
def layer_error(route: GroupedRoute, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients of a small layer, each against float64 on the host."""
    E, D, F, K, r, tokens = SHAPE
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    gate_up, down = _stack(2 * E, F, D, seed=2), _stack(E, D, F, seed=3)
    # Half of all first choices go to one expert, and none to the last.
    first = torch.where(torch.rand(tokens, generator=generator) < 0.5, 0, torch.arange(tokens) % (E - 1))
    index_TK = torch.stack((first, (first + 1 + torch.arange(tokens) % 2) % (E - 1)), dim=1)
    weights_TK = torch.rand(tokens, K, generator=generator)
    hidden_TD, dout_TD = random(tokens, D).to(dtype), random(tokens, D).to(dtype)
    shapes = {0: (D, F), 1: (D, F), 2: (F, D)}
    a = [random(E, r, columns, scale=columns**-0.5) for columns, _ in shapes.values()]
    b = [random(E, rows, r, scale=0.2) for _, rows in shapes.values()]
    seeds = [torch.tensor(2**61 + part) for part in shapes]
    host = [LoraUpdate(part, a[part], b[part], 2.0, 0.1, seeds[part]) for part in shapes]
    expected = _definition(hidden_TD, dout_TD, index_TK, weights_TK, gate_up, down, host)

    there = [replace(u, a=u.a.to(device), b=u.b.to(device), seed=seeds[u.part].to(device)) for u in host]
    activation = Activation(_swiglu, columnwise=True, swiglu=True)
    layer = FrozenLayer(gate_up.to(device).bytes, down.to(device).bytes, activation)
    hidden, dout, index, weights = (t.to(device) for t in (hidden_TD, dout_TD, index_TK, weights_TK))
    h = [torch.empty(tokens * K, r, device=device) for _ in there]
    out, dhidden, dweights = torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(weights)
    da, db = [torch.empty_like(u.a) for u in there], [torch.empty_like(u.b) for u in there]
    chunk = Chunk(hidden, index, weights)
    route.forward(chunk, layer, there, h, out)
    route.backward(dout, chunk, layer, there, h, Gradients(dhidden, dweights, da, db))
    found = [out, dhidden, dweights, *da, *db]
    return max(_relative(x.cpu().double(), y) for x, y in zip(found, expected, strict=True))


def _definition(
    hidden_TD: Tensor,
    dout_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    updates: list[LoraUpdate],
) -> list[Tensor]:
    """Output and gradients in float64, by autograd, token by token's experts; dropout as the counter has it."""
    tokens, K = index_TK.shape
    hidden, weights = hidden_TD.double(), weights_TK.double()
    a, b = [u.a.double() for u in updates], [u.b.double() for u in updates]
    for leaf in (hidden, weights, *a, *b):
        leaf.requires_grad_()
    out = torch.zeros(tokens, hidden.shape[1], dtype=torch.float64)

    def project(x: Tensor, part: int, stack: Nf4Stack, expert: int, matrix: int, number: Tensor) -> Tensor:
        u = updates[part]
        kept = dropout(torch.ones_like(x, dtype=torch.float32), number, u.seed, u.dropout).double()
        low = (x * kept) @ a[part][expert].t() @ b[part][expert].t()
        return x @ stack.dequantize(matrix, torch.float32).double().t() + u.scaling * low

    # The first GEMM of a process may ask for this from inside an operator.
    with differentiable():
        for expert in range(down.num_matrices):
            token, choice = (index_TK == expert).nonzero(as_tuple=True)
            number, x = token * K + choice, hidden[token]
            gate = project(x, 0, gate_up, expert, expert * 2, number)
            up = project(x, 1, gate_up, expert, expert * 2 + 1, number)
            y = project(torch.nn.functional.silu(gate) * up, 2, down, expert, expert, number)
            out = out.index_add(0, token, y * weights[token, choice, None])
        gradients = torch.autograd.grad(out, [hidden, weights, *a, *b], dout_TD.double())
    return [out.detach(), *gradients]


def _stack(num_matrices: int, rows: int, columns: int, seed: int) -> Nf4Stack:
    generator = torch.Generator().manual_seed(seed)
    stack = Nf4Stack(num_matrices, rows, columns)
    for index in range(num_matrices):
        stack.write(index, torch.randn(rows, columns, generator=generator) * columns**-0.5)
    return stack


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _relative(found: Tensor, expected: Tensor) -> float:
    error = ((found - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf


def _identity(device: torch.device, dtype: torch.dtype) -> str:
    source = hashlib.sha256()
    for folder in (Path(launch.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.glob("*.py")):
            source.update(path.read_bytes())
    parts = [
        torch.cuda.get_device_name(device),
        str(torch.cuda.get_device_capability(device)),
        torch.__version__,
        importlib.metadata.version("triton"),
        str(dtype),
        source.hexdigest(),
    ]
    return _digest(parts)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main(sys.argv[1:])
