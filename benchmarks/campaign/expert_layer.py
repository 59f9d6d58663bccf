"""Decoding's bandwidth, and one expert layer, forward and backward, by every route against its peers."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from benchmarks.campaign import floors, measure, record, shapes, weights
from benchmarks.campaign.correctness import dequantize_all
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.variants import SLOW, passed_variants
from benchmarks.layer import Layer
from benchmarks.peers import grouped_nf4_gemm as grouped
from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from benchmarks.timing import median_ratio
from expertune.kernels import nf4, routes
from expertune.kernels.nf4 import Nf4Stack

_DROPOUT = 0.05

# Of the largest tensor's norm, without dropout: another layer, factors that are not applied, or wrong rows.
_MOST_DIFFERENCE = 3e-2

# Stacks that no ratio is taken against: they hold the weights in 16 bits.
NOT_PEERS = ("grouped_mm on decoded weights",)


def compile_ahead(args: argparse.Namespace, out: Record, name: str) -> None:
    """Build what layers of a shape launch, into Triton's cache on disk, beside checks that are not timed either."""
    model = shapes.MODELS[name](args.small)

    def build(tokens: int) -> Item:
        layer = Layer(model.layer, model.lora, tokens, args.text, torch.bfloat16, out.device, weights.fill)
        for layer.dropout in (_DROPOUT, 0.0):
            for route in (routes.FUSED, routes.DEQUANT_GEMM):
                layer.step(layer.ours(route, gemm="triton"))()
        return {}

    for tokens in shapes.tokens(args.small)[:2]:
        out.item(f"T={tokens}", lambda tokens=tokens: build(tokens), needs_s=40)


def run(args: argparse.Namespace, out: Record) -> None:
    """Measure; routes that failed their check are named and left out."""
    device = out.device
    allowed = passed_variants(args.out, device.type)
    out.values["routes"] = list(allowed)
    rates = measure.rates(out)
    for name, make in shapes.MODELS.items():
        out.item(f"decode {name}", lambda make=make: _decode(make(args.small).layer, rates, out), needs_s=3)
    # The sizes that decide first, so that a short campaign has them.
    for tokens in shapes.tokens(args.small):
        for name, make in shapes.MODELS.items():
            item = f"layer {name} T={tokens}"
            out.item(
                item, lambda make=make, tokens=tokens, item=item: _layer(args, out, make, tokens, allowed, item), 25
            )
    if device.type == "cuda" and len(routes.usable_routes(device, torch.bfloat16)) == 2:
        out.item("crossover", lambda: {"rows_per_expert": routes.KernelSettings().crossover_on(device, torch.bfloat16)})


def _decode(shape: Any, rates: Item, out: Record) -> Item:
    """Bytes read and written per second, for a stack of matrices in bfloat16."""
    device, count = out.device, 2 if out.small else max(2**29 // (shape.intermediate * shape.hidden), 1)
    stack = Nf4Stack(count, shape.intermediate, shape.hidden, device=device)
    weights.fill(stack)
    ours, theirs = (
        torch.empty(count, stack.out_features, stack.in_features, dtype=torch.bfloat16, device=device) for _ in range(2)
    )

    def by_bitsandbytes() -> None:
        for index in range(count):
            packed, state = bitsandbytes_weight(stack, index, torch.bfloat16)
            if device.type == "cuda":
                bnb.dequantize_4bit(packed.t(), state, out=theirs[index])
            else:  # it has no operator that writes in place there
                theirs[index] = bnb.dequantize_4bit(packed.t(), state)

    source = torch.empty_like(ours)
    runs = {
        "ours": lambda: dequantize_all(stack, ours.flatten(0, 1)),
        "bitsandbytes": by_bitsandbytes,
        "copy of the decoded matrices": lambda: source.copy_(ours),
    }
    for one in runs.values():
        one()
    if not torch.equal(ours, theirs):
        raise ValueError("ours and bitsandbytes decode to other values: no speed is reported")
    moved = dict.fromkeys(("ours", "bitsandbytes"), stack.nbytes + ours.nbytes)
    moved["copy of the decoded matrices"] = 2 * ours.nbytes
    times = measure.interleave(runs, 2 if out.small else 20, device)
    rate = {name: moved[name] / statistics.median(values) for name, values in times.items()}
    return {
        "matrices": [count, stack.out_features, stack.in_features],
        "seconds": times,
        "bytes": moved,
        "bytes_per_second": rate,
        "share_of_copy": rate["ours"] / rates["copy"]["bytes_per_second"],
    }


Step = Callable[[], Any]


def _layer(
    args: argparse.Namespace, out: Record, make: Any, tokens: int, allowed: dict[str, dict[str, Any]], item: str
) -> Item:
    """All stacks on one layer: held to each other without dropout, then timed in turn with it."""
    model, device = make(args.small), out.device
    layer = Layer(model.layer, model.lora, tokens, args.text, torch.bfloat16, device, weights.fill)
    # The loop over experts takes seconds where these are many, and says nothing of a route that is taken.
    allowed = {route: settings for route, settings in allowed.items() if route != SLOW}
    stacks: dict[str, Step] = {
        f"ours, {route}": layer.step(layer.ours(**settings)) for route, settings in allowed.items()
    }
    stacks["bitsandbytes, per expert"] = layer.step(layer.by_bitsandbytes)
    stacks["grouped_mm on decoded weights"] = layer.step(layer.by_grouped_mm)
    result: Item = {"tokens": tokens, "rows_per_expert": layer.rows_per_expert, "dropout": _DROPOUT, "left_out": {}}
    weight_bytes = layer.gate_up.nbytes + layer.down.nbytes
    result["floor"] = floors.layer_floor(model.layer, tokens, weight_bytes, out.values["items"]["rates"])
    _agree(stacks, layer, result)
    if (problem := grouped.missing()) is None:
        try:
            stacks["grouped_nf4_gemm"] = _grouped(layer, result)
        except Exception as error:
            result["left_out"]["grouped_nf4_gemm"] = record.error_line(error)
    else:
        result["left_out"]["grouped_nf4_gemm"] = problem
    out.require_time()
    layer.dropout = _DROPOUT
    for route, settings in allowed.items():
        if (name := f"ours, {route}") in stacks:
            result.setdefault("launches", {})[name] = _passes(layer, settings, device)
    out.keep(item, result)
    for name, step in stacks.items():
        measure.reset_peak(device)
        step()
        result.setdefault("memory", {})[name] = measure.memory(device)
    result["seconds"] = times = measure.interleave(stacks, 2 if args.small else 7, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = {name: value for name, value in medians.items() if name.startswith("ours,")}
    peers = {name: value for name, value in medians.items() if name not in ours and name not in NOT_PEERS}
    result["medians"] = medians
    if ours and peers:
        fastest = min(ours, key=medians.__getitem__)
        best = min(peers, key=peers.__getitem__)
        result["fastest"], result["best_peer"] = fastest, best
        result["ratio"] = median_ratio(times[best], times[fastest])
        result["share_of_floor"] = {name: floors.seconds(result["floor"]) / value for name, value in ours.items()}
    return result


def _agree(stacks: dict[str, Step], layer: Layer, result: Item) -> None:
    """Take out what cannot run, and what is far from bitsandbytes' results (or the first stack's that runs)."""
    layer.dropout = 0.0
    results: dict[str, list[Tensor]] = {}
    for name in ["bitsandbytes, per expert", *(name for name in stacks if not name.startswith("bitsandbytes"))]:
        try:
            output, gradients = stacks[name]()
            results[name] = [output.detach(), *gradients]
        except Exception as error:
            stacks.pop(name)
            result["left_out"][name] = record.error_line(error)
            continue
        errors = weights.relative_errors(results[name], next(iter(results.values())))
        result.setdefault("differences", {})[name] = errors
        if not all(error <= _MOST_DIFFERENCE for error in errors.values()):
            stacks.pop(name)
            result["left_out"][name] = f"its results differ from {next(iter(results))}'s by {max(errors.values()):.1e}"
        results = dict(list(results.items())[:1])  # the one that others are held to


def _passes(layer: Layer, settings: dict[str, Any], device: torch.device) -> Item:
    """Launches and host synchronisations of forward and of backward, apart."""
    forward, leaves = layer.ours(**settings), layer.leaves
    kept: list[Tensor] = []

    def ahead() -> None:
        kept[:] = [forward(layer.hidden_TD, layer.weights_TK)]

    def back() -> None:
        torch.autograd.grad(kept[0], leaves, layer.dout_TD)

    def both() -> None:
        ahead()
        back()

    both()  # kernels are built and tables cached before anything is counted
    found = {"forward": measure.profiled(ahead, device), "backward": measure.profiled(back, device)}
    found["synchronisations"] = measure.synchronisations(both, device)
    for one in ("forward", "backward"):
        found[one]["top"] = found[one].get("top", [])[:12]
    if device.type == "cuda":
        from expertune.kernels.gpu import launch

        before = launch.launches()
        both()
        found["of_our_kernels"] = launch.launches() - before
    found["ran"] = dict(forward.settings.ran)
    return found


def _grouped(layer: Layer, result: Item) -> Step:
    """grouped-nf4-gemm on rows that are sorted already: it neither sorts, weighs nor combines, and has no dropout."""
    E = layer.shape.experts
    flat_R = layer.index_TK.flatten()
    order_R = flat_R.argsort(stable=True)
    offsets_E = torch.bincount(flat_R, minlength=E).cumsum(0)
    rows_RD = layer.hidden_TD.detach()[order_R // layer.shape.top_k]
    first, second = (_experts(stack, E) for stack in (layer.gate_up, layer.down))
    gate, up, down = (grouped.Factors(a.detach(), b.detach(), layer.scaling) for a, b in layer.factors)
    down = grouped.Factors(down.a_EDK.requires_grad_(), down.b_END.requires_grad_(), layer.scaling)
    forward, backward = grouped.layer(first, second, rows_RD, offsets_E, grouped.merge_factors(gate, up), down)
    y_RD = forward()
    weighted = y_RD.float() * layer.weights_TK.flatten()[order_R, None].float()
    total = torch.zeros_like(layer.hidden_TD, dtype=torch.float32).index_add(0, order_R // layer.shape.top_k, weighted)
    layer.dropout = 0.0
    expected = layer.by_bitsandbytes(layer.hidden_TD, layer.weights_TK).float()
    error = float((total - expected).norm() / expected.norm())
    result.setdefault("differences", {})["grouped_nf4_gemm"] = {"output": error}
    if not error <= _MOST_DIFFERENCE:
        raise ValueError(f"its results differ from bitsandbytes' by {error:.1e}")
    result["grouped_nf4_gemm_notes"] = [
        *grouped.NOTES,
        "rows sorted beforehand; not weighted, not combined; no dropout",
    ]
    dy_RD = layer.dout_TD[order_R // layer.shape.top_k]

    def step() -> None:
        forward()
        backward(dy_RD)

    step()
    return step


def _experts(stack: Nf4Stack, num_experts: int) -> Any:
    absmax = torch.stack([nf4.dequantize_absmax(stack.bytes, index) for index in range(stack.num_matrices)])
    return grouped.experts_from_flat(
        stack.packed, absmax, num_experts, stack.num_matrices // num_experts * stack.out_features
    )
