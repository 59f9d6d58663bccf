"""One optimizer step (forward, backward, AdamW) with the recipe's adapters: tokens per second and peak memory."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import floor, report
from benchmarks.peers.processes import Driver, interpreter
from benchmarks.workload import DOLLY_SAMPLE, Lora, Shape, Workload, describe, prepare

PEERS = ("legacy", "stock5")

# Two stacks in bfloat16 round at different places; on float32 they agree to 1e-5. What these bounds must catch is an
# adapter that is not applied or not trained, other weights or other rows.
LOSS_TOLERANCE = 0.02
NORM_TOLERANCE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"hidden": 2048, "intermediate": 7168, "layers": 2, "experts": 8, "top-k": 2, "tokens": 320, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout")
    parser.add_argument(
        "--cache", type=Path, help="where weights are made once and kept; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> None:
    """Measure and report.

    Raises:
        CorrectnessError: ours and legacy, on the same weights and adapter, differ in loss or gradient.
    """
    shape = Shape(args.hidden, args.intermediate, args.layers, args.experts, args.top_k)
    lora = Lora()
    cache = args.cache or Path(tempfile.gettempdir()) / "expertune-bench"
    workload = prepare(shape, lora, args.tokens, args.text, cache)
    stacks = _measure(["ours", *args.peers], workload, lora, args.rounds)
    rates = floor.product_rates(shape, args.tokens)
    result = _result(shape, lora, workload, stacks, rates)
    if args.json:
        report.write(args.json, result)
    _show(result)


def _measure(names: list[str], workload: Workload, lora: Lora, rounds: int) -> dict[str, dict[str, Any]]:
    """Rounds of one step per stack, in turn, after a step each to warm up."""
    paths = ["--model", workload.model, "--adapter", workload.adapter, "--batch", workload.batch]
    arguments = [*map(str, paths), "--dropout", str(lora.dropout)]
    pythons = {name: interpreter(name) for name in names}
    drivers: list[Driver] = []
    try:
        for name in names:
            drivers.append(Driver(name, pythons[name], arguments))
        checks = {driver.name: driver.ask("check") for driver in drivers}
        _require_agreement(checks)
        for driver in drivers:
            driver.ask("step")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for driver in drivers:
                seconds[driver.name].append(driver.ask("step")["seconds"])
        return {
            driver.name: {
                "tokens_per_second": workload.tokens / statistics.median(seconds[driver.name]),
                "seconds": seconds[driver.name],
                **driver.ask("memory"),
                "check": checks[driver.name],
                **driver.ready,
            }
            for driver in drivers
        }
    finally:
        for driver in drivers:
            driver.close()


def _require_agreement(checks: dict[str, dict[str, Any]]) -> None:
    """Hold ours against legacy: the same NF4 bytes, the same adapter and rows must give the same loss and gradient."""
    if "legacy" not in checks:
        return
    ours, legacy = checks["ours"], checks["legacy"]
    if abs(ours["loss"] - legacy["loss"]) > LOSS_TOLERANCE:
        raise report.CorrectnessError(f"loss is {ours['loss']:.4f} here and {legacy['loss']:.4f} on the legacy stack")
    if abs(ours["gradient_norm"] / legacy["gradient_norm"] - 1) > NORM_TOLERANCE:
        raise report.CorrectnessError(
            f"the gradient's norm is {ours['gradient_norm']:.4f} here and {legacy['gradient_norm']:.4f} on the legacy stack"
        )


def _result(
    shape: Shape,
    lora: Lora,
    workload: Workload,
    stacks: dict[str, dict[str, Any]],
    rates: dict[str, dict[str, float]],
) -> dict[str, Any]:
    ours = stacks.pop("ours")
    best_rate = max(rate["flops_per_second"] for rate in rates.values())
    flops = floor.step_flops(shape, workload.tokens)
    limit = workload.tokens * best_rate / flops
    return {
        "benchmark": "step",
        "ours": ours,
        "peers": stacks,
        "floor": {
            "tokens_per_second": limit,
            "step_flops": flops,
            "product_rates": rates,
            "share_reached": ours["tokens_per_second"] / limit,
        },
        "ratios": {name: ours["tokens_per_second"] / peer["tokens_per_second"] for name, peer in stacks.items()},
        "gate": {
            "compared": ["ours", "legacy"] if "legacy" in stacks else [],
            "loss_tolerance": LOSS_TOLERANCE,
            "gradient_norm_relative_tolerance": NORM_TOLERANCE,
        },
        "model": describe(shape, lora),
        "batch": workload.to_json(),
        **report.environment(),
    }


def _show(result: dict[str, Any]) -> None:
    stacks = {"ours": result["ours"], **result["peers"]}
    best = result["ours"]["tokens_per_second"]
    rows = [
        [
            name,
            f"{stack['tokens_per_second']:.1f}",
            f"{best / stack['tokens_per_second']:.2f}",
            f"{min(stack['seconds']):.2f} - {max(stack['seconds']):.2f}",
            f"{stack['peak_bytes'] / 1e9:.2f}",
            f"{stack['check']['loss']:.4f}",
        ]
        for name, stack in stacks.items()
    ]
    limit = result["floor"]["tokens_per_second"]
    rows.append(["floor", f"{limit:.1f}", f"{best / limit:.2f}", "", "", ""])
    title = f"One step of {result['batch']['tokens']} tokens on {result['device']}, {result['threads']} threads"
    header = ["", "tokens/s", "ours over it", "seconds", "peak GB", "loss"]
    notes = [f"{name}: {note}" for name, stack in stacks.items() for note in stack["notes"]]
    if "legacy" not in stacks:
        notes.append("legacy was left out, so nothing was checked against it")
    report.show(title, header, rows, notes)
