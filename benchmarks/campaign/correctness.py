"""Does every route compute what it should on this device? What fails here is timed nowhere.

Each function is a process of its own: a route whose kernel reads where it may not ends nothing but its own checks.
"""

import argparse
import dataclasses
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.campaign import measure, record, shapes, weights
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.variants import VARIANTS
from benchmarks.layer import Forward, Layer
from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from expertune.kernels import native, routes
from expertune.kernels.nf4 import Nf4Stack, dequantize
from expertune.layers import varlen_attention as attention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Ours may be as far from float64 as this, and no further than decoding first and multiplying in bfloat16 is. Two sums
# of the same roundings in another order differ in the third digit of their error, over a dry run's few tokens in the
# second.
_MOST_ERROR = 1e-2
_NOISE, _NOISE_OF_SMALL = 1.05, 1.25


def self_check(args: argparse.Namespace, out: Record, dtype: str) -> None:
    """The product's own check in one dtype, which is kept for its runs."""
    out.item(f"self-check {dtype}", lambda: _self_check(out.device, getattr(torch, dtype)), needs_s=40)


def decoding(args: argparse.Namespace, out: Record) -> None:
    """Decoding's bits, and attention in one call."""
    for name, make in shapes.MODELS.items():
        out.item(f"decode {name}", lambda make=make: _decode(make(args.small).layer, out.device), needs_s=10)
    out.item("attention in one call", lambda: _attention(out.device), needs_s=5)


def route(args: argparse.Namespace, out: Record, variant: str) -> None:
    """One way to run the layer: right, the same twice, and last the same from a captured graph."""
    device, settings = out.device, VARIANTS[out.device.type][variant]
    if settings["route"] == routes.FUSED and device.type == "cpu" and not native.available():
        out.item("layer", lambda: measure.unmeasured(native.status().reason or "no native library"))
        return
    torch.manual_seed(0)  # of the weights: every route is checked on the same layer
    layer = _layer(args, device)
    forward, noise = layer.ours(**settings), _NOISE_OF_SMALL if args.small else _NOISE

    def right() -> Item:
        expected = weights.in_float64(layer)
        theirs = _errors(layer, layer.by_bitsandbytes, expected)
        decoded = _errors(layer, lambda *leaves: weights.by_decoding_first(layer, *leaves), expected)
        limits = {name: min(_MOST_ERROR, noise * error) for name, error in decoded.items()}
        found = _compare(layer, forward, settings["route"], expected, limits)
        return found | {"theirs": decoded, "bitsandbytes": theirs}

    out.item("layer", right, needs_s=30)
    out.item("repeat", lambda: _repeat(layer, forward, device), needs_s=5)
    # Last: a capture that fails leaves torch's random generator unusable.
    out.item("graph", lambda: _graph(layer, forward, device), needs_s=5)


def _self_check(device: torch.device, dtype: torch.dtype) -> Item:
    if device.type != "cuda":
        return measure.unmeasured("Triton's kernels run on a GPU; here tests/kernels/gpu interprets them")
    from expertune.kernels.expert_mlp import selfcheck

    findings = selfcheck.checked(device, dtype)
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


def _compare(layer: Layer, forward: Forward, wanted: str, expected: list[Tensor], limits: dict[str, float]) -> Item:
    """Against float64, beside decoding first and multiplying in bfloat16."""
    errors = _errors(layer, forward, expected)
    ran = dict(forward.settings.ran)
    within = all(error <= limits[name] for name, error in errors.items())
    return {"errors": errors, "limits": limits, "ran": ran, "passed": within and set(ran) == {wanted}}


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
