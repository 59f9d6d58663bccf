"""Stage 1: does every route compute what it should on this device? What fails here is timed nowhere."""

import argparse
import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.campaign import ahead, measure, record, shapes, weights
from benchmarks.campaign.record import Item, Record
from benchmarks.layer import Forward, Layer
from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from expertune.kernels import native, routes
from expertune.kernels.expert_mlp import Activation, LoraUpdate, reference
from expertune.kernels.nf4 import Nf4Stack, dequantize
from expertune.layers import varlen_attention as attention

LIMIT_S = 150
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Ours may be as far from float64 as this, and no further than decoding first and multiplying in bfloat16 is; two sums
# of the same roundings in another order differ in the third digit of their error.
_MOST_ERROR = 1e-2
_NOISE = 1.05

# Names of variants.
FUSED, TRITON, TORCH, SLOW = "fused", "dequant_gemm, triton", "dequant_gemm, torch, 8 GiB", "expert_by_expert"


def run(args: argparse.Namespace, out: Record) -> None:
    """Check decoding, both routes, attention, repeatability and graphs; leave what passed in `gate`."""
    device: torch.device = out.device
    gate: dict[str, dict[str, list[str]]] = {"passed": {}, "failed": {}}
    out.values["gate"] = gate
    if device.type == "cuda":
        out.item("compiled ahead", lambda: ahead.in_processes(ahead.layer_jobs(args.text), 0.6 * out.remaining_s))
    for dtype in _DTYPES:
        out.item(f"self-check {report.name_of(dtype)}", lambda dtype=dtype: _self_check(device, dtype))
    out.item("attention in one call", lambda: _attention(device))
    bits = [
        out.item(f"decode {name}", lambda make=make: _decode(make(args.small).layer, device))
        for name, make in shapes.MODELS.items()
    ]
    decodes = all(item is not None and item["passed"] for item in bits)
    layer = _layer(args, device)
    expected = weights.in_float64(layer)
    theirs = _errors(layer, layer.by_bitsandbytes, expected)
    decoded = _errors(layer, lambda *leaves: weights.by_decoding_first(layer, *leaves), expected)
    out.keep("peers' errors", {"bitsandbytes": theirs, "bitsandbytes decode + torch.mm": decoded})
    forwards = {route: layer.ours(**settings) for route, settings in variants(device).items()}
    checks: dict[str, list[Item | None]] = {}
    for route, settings in variants(device).items():
        forward = forwards[route]
        checks[route] = [
            out.item(
                f"layer {route}",
                lambda forward=forward, wanted=settings["route"]: _compare(layer, forward, wanted, expected, decoded),
            ),
            out.item(f"repeat {route}", lambda forward=forward: _repeat(layer, forward, device)),
        ]
    for route, forward in forwards.items():
        # Last of all: a capture that fails leaves torch's random generator unusable.
        graph = out.item(f"graph {route}", lambda forward=forward: _graph(layer, forward, device))
        passed = [check is not None and check["passed"] for check in checks[route]]
        # A route that cannot be captured is not wrong; one that gives other bytes when captured is.
        captured = graph is None or graph["passed"] is not False
        decoder = decodes or route == SLOW  # which decodes by plain torch
        found = {"layer": passed[0], "repeat": passed[1], "graph": captured, "decode": decoder}
        wrong = [name for name, ok in found.items() if not ok]
        gate["failed" if wrong else "passed"][route] = wrong
        out.write()
    if device.type != "cuda":
        out.item("kernels, interpreted", lambda: _interpreted(args.small))


def variants(device: torch.device) -> dict[str, dict[str, Any]]:
    """Every way in which the layer can run on a device, by name: values of `KernelSettings`.

    torch's grouped GEMM takes the weights of all experts at once, which the usual working set does not hold.
    """
    if device.type != "cuda":
        fused: dict[str, dict[str, Any]] = {FUSED: {"route": routes.FUSED}} if native.available() else {}
        return fused | {"dequant_gemm": {"route": routes.DEQUANT_GEMM}}
    usual: dict[str, Any] = {"working_set_bytes": None, "gemm": "triton"}
    large = {"route": routes.DEQUANT_GEMM, "working_set_bytes": 2**33}
    return {
        FUSED: {"route": routes.FUSED} | usual,
        TRITON: {"route": routes.DEQUANT_GEMM} | usual,
        f"{TRITON}, 8 GiB": large | {"gemm": "triton"},
        TORCH: large | {"gemm": "torch"},
        SLOW: {"route": routes.EXPERT_BY_EXPERT} | usual,
    }


def passed_variants(folder: Path, device: torch.device) -> tuple[dict[str, dict[str, Any]], str]:
    """Variants that may be timed, and on whose word: stage 1's, or where it has not run the start-up check's."""
    known = variants(device)
    gate = (record.read(folder / "stage1.json") or {}).get("gate", {})
    if gate.get("passed") or gate.get("failed"):
        return {name: known[name] for name in known if name in gate["passed"]}, "stage 1"
    usable: set[str] = {*routes.usable_routes(device, torch.bfloat16), routes.EXPERT_BY_EXPERT}
    allowed = {name: settings for name, settings in known.items() if settings["route"] in usable}
    if device.type == "cuda" and TORCH in allowed:
        from expertune.kernels.expert_mlp.selfcheck import checked

        if "grouped_mm" not in checked(device, torch.bfloat16).passed:
            allowed.pop(TORCH)
    return allowed, "the start-up check alone: stage 1 has not run"


def passed_settings(folder: Path, device: torch.device) -> tuple[routes.KernelSettings, dict[str, Any]]:
    """Settings that choose among what passed and among nothing else, and a description of them.

    Raises:
        CorrectnessError: neither fast route passed.
    """
    passed, word = passed_variants(folder, device)
    fast = {settings["route"] for settings in passed.values()} & {routes.FUSED, routes.DEQUANT_GEMM}
    if not fast:
        raise report.CorrectnessError("no route passed its check: no speed is reported")
    wanted = {settings["route"] for settings in variants(device).values()} - {routes.EXPERT_BY_EXPERT}
    chosen: dict[str, Any] = {"route": "auto" if fast == wanted else fast.pop()}
    gemms = {settings.get("gemm") for settings in passed.values() if settings["route"] == routes.DEQUANT_GEMM}
    if device.type == "cuda" and len(gemms) == 1:
        chosen |= {"gemm": gemms.pop()}
    return routes.KernelSettings(**chosen), chosen | {"passed": list(passed), "by": word}


def _self_check(device: torch.device, dtype: torch.dtype) -> Item:
    if device.type != "cuda":
        return measure.unmeasured("Triton's kernels run on a GPU; see `kernels, interpreted`")
    from expertune.kernels.expert_mlp import selfcheck

    findings = selfcheck.check(device, dtype)
    return dataclasses.asdict(findings) | {"limit": selfcheck.LIMITS[dtype]}


def _attention(device: torch.device) -> Item:
    try:
        error = attention.check_varlen(device)
    except RuntimeError as missing:
        return measure.unmeasured(str(missing))
    return {"error": error, "passed": error <= 2e-2}


def _decode(shape: Any, device: torch.device) -> Item:
    """Every dtype, with and without double quantization: our decoder's bits against bitsandbytes'."""
    same: dict[str, bool] = {}
    for double in (True, False):
        stack = Nf4Stack(2, shape.intermediate, shape.hidden, double, device)
        weights.fill(stack)
        for dtype in _DTYPES:
            ours = torch.empty(2 * stack.out_features, stack.in_features, dtype=dtype, device=device)
            dequantize_all(stack, ours)
            theirs = torch.cat([_by_bitsandbytes(stack, index, dtype) for index in range(2)])
            same[f"{report.name_of(dtype)}, {'double' if double else 'single'}"] = torch.equal(ours, theirs)
    return {"identical": same, "passed": all(same.values())}


def dequantize_all(stack: Nf4Stack, out: Tensor) -> None:
    """All matrices of a stack into [M * N, K], by the kernel on a GPU."""
    if out.device.type == "cuda":
        from expertune.kernels.gpu import nf4

        nf4.dequantize(stack.bytes, slice(0, stack.num_matrices), out)
        return
    for index, target in enumerate(out.unflatten(0, (stack.num_matrices, stack.out_features))):
        dequantize(stack.bytes, index, target)


def _by_bitsandbytes(stack: Nf4Stack, index: int, dtype: torch.dtype) -> Tensor:
    if stack.double_quantization:
        packed, state = bitsandbytes_weight(stack, index, dtype)
        return bnb.dequantize_4bit(packed.t(), state)
    state = bnb.QuantState(
        absmax=stack.absmax[index],
        shape=torch.Size([stack.out_features, stack.in_features]),
        dtype=dtype,
        blocksize=64,
        code=bnb.get_4bit_type("nf4", device=stack.packed.device),
        quant_type="nf4",
    )
    return bnb.dequantize_4bit(stack.packed[index].reshape(-1, 1), state)


def _layer(args: argparse.Namespace, device: torch.device) -> Layer:
    """Mixtral's width with few experts."""
    model = shapes.mixtral(args.small)
    shape = dataclasses.replace(model.layer, experts=4, layers=1)
    return Layer(shape, model.lora, 48 if args.small else 320, args.text, torch.bfloat16, device, weights.fill)


def _errors(layer: Layer, forward: Any, expected: list[Tensor]) -> dict[str, float]:
    out, gradients = layer.step(forward)()
    return weights.relative_errors([out.detach(), *gradients], expected)


def _compare(layer: Layer, forward: Forward, wanted: str, expected: list[Tensor], theirs: dict[str, float]) -> Item:
    """Against float64, beside decoding first and multiplying in bfloat16."""
    errors = _errors(layer, forward, expected)
    ran = dict(forward.settings.ran)
    close = all(error <= _MOST_ERROR for error in errors.values())
    no_worse = all(errors[name] <= theirs[name] * _NOISE for name in errors)
    return {
        "errors": errors,
        "theirs": theirs,
        "within": _MOST_ERROR,
        "no_worse": no_worse,
        "ran": ran,
        "passed": close and no_worse and set(ran) == {wanted},
    }


def _repeat(layer: Layer, forward: Forward, device: torch.device) -> Item:
    """The same bytes twice, dropout included."""
    layer.dropout = 0.05
    step = layer.step(forward)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            out, gradients = step()
            results.append([out, *gradients])
    finally:
        layer.dropout = 0.0
    measure.synchronize(device)
    same = [torch.equal(one, other) for one, other in zip(*results, strict=True)]
    return {"identical": same, "passed": all(same)}


def _graph(layer: Layer, forward: Forward, device: torch.device) -> Item:
    """The same bytes from a captured graph as without."""
    step = layer.step(forward)
    out, gradients = step()
    expected = [tensor.detach().clone() for tensor in (out, *gradients)]
    # What is kept of an autograd graph ties the next one to its stream, which no capture may wait for.
    del out, gradients
    try:
        replay = measure.captured(step, device)
    except RuntimeError as error:
        return {"passed": None, "reason": record.error_line(error)}
    for _ in range(2):
        found = replay()
    measure.synchronize(device)
    assert isinstance(found, tuple)
    same = [torch.equal(one, other) for one, other in zip((found[0], *found[1]), expected, strict=True)]
    return {"identical": same, "passed": all(same)}


def _interpreted(small: bool) -> Item:
    """The Triton kernels through Triton's interpreter, on a layer of a few rows, against plain float32."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return measure.unmeasured("set TRITON_INTERPRET=1 to run the kernels on a CPU")
    from expertune.kernels.expert_mlp import selfcheck
    from expertune.kernels.expert_mlp.grouped import GroupedRoute

    cpu = torch.device("cpu")
    if not small:
        return dataclasses.asdict(selfcheck.check(cpu, torch.float32))
    errors = {"decode": selfcheck.dequantize_error(cpu, torch.float32)}
    for name, dequantize_first in ((routes.FUSED, False), (routes.DEQUANT_GEMM, True)):
        errors[name] = _tiny_layer_error(GroupedRoute(dequantize_first, buffer_bytes=1))
    return {"errors": errors, "passed": all(error <= 1e-4 for error in errors.values())}


def _tiny_layer_error(route: Any) -> float:
    """Largest relative error of a layer of 2 experts of 64 x 64 and 5 tokens: seconds in the interpreter."""
    from expertune.kernels.expert_mlp.plan import Chunk, FrozenLayer, Gradients

    E, size, rank, tokens = 2, 64, 2, 5
    gate_up, down = Nf4Stack(2 * E, size, size), Nf4Stack(E, size, size)
    generator = torch.Generator().manual_seed(0)
    for stack in (gate_up, down):
        for index in range(stack.num_matrices):
            stack.write(index, torch.randn(size, size, generator=generator) / size**0.5)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    hidden, router = leaf(tokens, size), leaf(tokens, 1)
    a, b = [leaf(E, rank, size) for _ in range(3)], [leaf(E, size, rank) for _ in range(3)]
    dout, index = torch.randn(tokens, size, generator=generator), torch.arange(tokens)[:, None] % E
    activation = Activation(_swiglu, columnwise=True, swiglu=True)
    updates = [LoraUpdate(part, a[part], b[part], 2.0) for part in range(3)]
    plain = reference.expert_mlp(hidden, index, router, gate_up, down, activation, updates)
    expected = [plain, *torch.autograd.grad(plain, [hidden, router, *a, *b], dout)]
    with torch.no_grad():
        frozen, chunk = FrozenLayer(gate_up.bytes, down.bytes, activation), Chunk(hidden, index, router)
        h = [torch.empty(tokens, rank) for _ in updates]
        out, dhidden, drouter = (torch.empty_like(x) for x in (hidden, hidden, router))
        da, db = [torch.empty_like(x) for x in a], [torch.empty_like(x) for x in b]
        route.forward(chunk, frozen, updates, h, out)
        route.backward(dout, chunk, frozen, updates, h, Gradients(dhidden, drouter, da, db))
        pairs = zip([out, dhidden, drouter, *da, *db], expected, strict=True)
        return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
