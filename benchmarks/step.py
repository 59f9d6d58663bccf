"""One optimizer step (forward, backward, AdamW) with the recipe's adapters: tokens per second and peak memory."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor, report
from benchmarks.peers.processes import GPU_STACKS, STACKS, Driver
from benchmarks.workload import DOLLY_SAMPLE, Lora, Shape, Workload, describe, prepare

# Those that run where nothing is named: on a CPU. On a GPU: `GPU_STACKS`.
PEERS = tuple(name for name in STACKS if name not in ("ours", "kept", "bfloat16", *GPU_STACKS))

# Peers that hold the same NF4 bytes as ours.
SAME_WEIGHTS = ("legacy", "tutorial", "kept", "bfloat16")

# Peers with the same NF4 values, under adapters that cannot be ours: the loss without any must agree.
SAME_BASE = GPU_STACKS

Measured = dict[str, dict[str, Any]]
"""What each stack of a session gave, by its name."""

# Two stacks in bfloat16 round at different places (tests/legacy holds them against each other in float32). What these
# bounds must catch is an adapter that is not applied or not trained, other weights, or other rows.
LOSS_TOLERANCE = 0.02
NORM_TOLERANCE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"hidden": 2048, "intermediate": 7168, "layers": 2, "experts": 8, "top-k": 2, "tokens": 320, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peers", nargs="*", choices=(*PEERS, *GPU_STACKS), help="default: all that run on the device")
    parser.add_argument("--keep", action="store_true", help="ours that keeps gate and up for backward takes turns too")
    parser.add_argument("--bfloat16", action="store_true", help="ours with tensors in bfloat16 takes turns too")
    report.add_dtype_argument(parser)
    parser.add_argument(
        "--peer-dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the peers' products; auto: as --dtype, or where that leaves the choice in what each is faster in",
    )
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout")
    parser.add_argument(
        "--cache", type=Path, help="where weights are made once and kept; default: the temporary folder"
    )
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> None:
    """Measure and report.

    Raises:
        CorrectnessError: a peer with the same weights and adapter differs from ours in loss or gradient.
    """
    shape = Shape(args.hidden, args.intermediate, args.layers, args.experts, args.top_k)
    lora = Lora()
    cache = args.cache or Path(tempfile.gettempdir()) / "expertune-bench"
    names = [*_peers(args), *(["kept"] if args.keep else []), *(["bfloat16"] if args.bfloat16 else [])]
    workload = prepare(shape, lora, args.tokens, args.text, cache)
    dtype = report.resolve_dtype(args.dtype, args.device)
    paths = ["--model", workload.model, "--adapter", workload.adapter, "--batch", workload.batch]
    options = [*map(str, paths), "--dropout", str(lora.dropout), "--device", args.device]
    given = args.dtype if args.peer_dtype == "auto" else args.peer_dtype
    tried = {name: _try_dtypes(name, options, _dtypes_to_try(name, given, args.device)) for name in names}
    dtypes = {name: min(seconds, key=lambda each: seconds[each]) for name, seconds in tried.items()}
    dtypes["ours"] = report.name_of(dtype)  # what a run takes by itself
    rates = floor.ProductRates(shape, args.tokens, dtype) if args.device == "cpu" else None
    sessions = [
        _interleave({name: [*options, "--dtype", dtypes[name]] for name in stacks}, workload, args.rounds, rates)
        for stacks in _sessions(names)
    ]
    for session in sessions:
        for name, stack in session.items():
            stack |= {"dtype": dtypes[name]} | ({"tried_seconds": tried[name]} if name in tried else {})
    medians = rates.medians() if rates else {}
    result = _result(shape, lora, workload, sessions, medians, args.device) | {"dtype": report.name_of(dtype)}
    if args.json:
        report.write(args.json, result)
    _show(result)


def _dtypes_to_try(name: str, given: str, device: str) -> list[torch.dtype]:
    """Of a stack, where `given` leaves its choice."""
    return [torch.bfloat16] if name == "bfloat16" else report.dtypes_of_peers(given, device)


def _peers(args: argparse.Namespace) -> list[str]:
    """The peers that were named, or all of the device; one of the other device is refused."""
    here = GPU_STACKS if args.device == "cuda" else PEERS
    names = list(here) if args.peers is None else args.peers
    if strangers := [name for name in names if name not in here]:
        raise SystemExit(f"{', '.join(strangers)} cannot run with --device {args.device}; {', '.join(here)} can")
    return names


def _sessions(peers: list[str]) -> list[list[str]]:
    """Each peer by turns with ours, one peer after the other: three models at once would not fit a small machine."""
    return [["ours", peer] for peer in peers] or [["ours"]]


def _try_dtypes(name: str, options: list[str], dtypes: list[torch.dtype]) -> dict[str, float]:
    """Seconds of a stack's second step in each dtype; of a single one nothing is tried, and they are 0."""
    if len(dtypes) == 1:
        return {report.name_of(dtypes[0]): 0.0}
    seconds = {}
    for dtype in map(report.name_of, dtypes):
        report.progress(f"trying {name} in {dtype}")
        driver = Driver(name, [*options, "--dtype", dtype])
        try:
            driver.ask("step")
            seconds[dtype] = driver.ask("step")["seconds"]
        finally:
            driver.close()
    return seconds


def _interleave(
    arguments: dict[str, list[str]], workload: Workload, rounds: int, rates: floor.ProductRates | None
) -> Measured:
    """Rounds of one step per stack, in turn, after a check and, on a GPU, a step each to warm up.

    On a CPU the check has run what a step runs, and nothing is compiled at its first use.

    Args:
        arguments: of each stack's driver, by its name.
        workload: what they are given.
        rounds: how many.
        rates: bare products, which are measured after each round; None on a GPU.
    """
    names = list(arguments)
    drivers: list[Driver] = []
    try:
        for name in names:
            report.progress(f"loading {name}")
            drivers.append(Driver(name, arguments[name]))
        report.progress("checking what they compute")
        checks = {driver.name: driver.ask("check") for driver in drivers}
        for name in checks.keys() & SAME_WEIGHTS:
            _require_agreement(checks["ours"], name, checks[name])
        if checks.keys() & set(SAME_BASE):
            for driver in drivers:
                checks[driver.name]["base_loss"] = driver.ask("base")["loss"]
        for name in checks.keys() & set(SAME_BASE):
            require_same_base(checks["ours"], name, checks[name])
        for driver in drivers if rates is None else ():
            driver.ask("step")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            report.progress(f"round {number + 1} of {rounds}")
            for driver in drivers:
                seconds[driver.name].append(driver.ask("step")["seconds"])
            if rates:
                rates.measure()
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


def _require_agreement(ours: dict[str, Any], name: str, peer: dict[str, Any]) -> None:
    """The same NF4 bytes, adapter and rows must give the same loss and gradient."""
    if abs(ours["loss"] - peer["loss"]) > LOSS_TOLERANCE:
        raise report.CorrectnessError(f"the loss is {ours['loss']:.4f} here and {peer['loss']:.4f} on {name}")
    here, there = ours["gradient_norm"], peer["gradient_norm"]
    if abs(here / there - 1) > NORM_TOLERANCE:
        raise report.CorrectnessError(f"the gradient's norm is {here:.4f} here and {there:.4f} on {name}")


def require_same_base(ours: dict[str, Any], name: str, peer: dict[str, Any]) -> None:
    """Without adapters, the same NF4 values must give the same loss; and with them, every factor a gradient."""
    if abs(ours["base_loss"] - peer["base_loss"]) > LOSS_TOLERANCE:
        raise report.CorrectnessError(
            f"without adapters the loss is {ours['base_loss']:.4f} here and {peer['base_loss']:.4f} on {name}"
        )
    if peer["factors_without_gradient"]:
        raise report.CorrectnessError(
            f"{peer['factors_without_gradient']} of {peer['factors']} factors get no gradient on {name}"
        )


def _result(
    shape: Shape,
    lora: Lora,
    workload: Workload,
    sessions: list[Measured],
    rates: dict[str, dict[str, float]],
    device: str,
) -> dict[str, Any]:
    """Everything as JSON; a ratio compares the two stacks of one session, whose steps took turns."""
    seconds = [second for session in sessions for second in session["ours"]["seconds"]]
    ours = sessions[0]["ours"] | {
        "tokens_per_second": workload.tokens / statistics.median(seconds),
        "seconds": seconds,
        "peak_bytes": max(session["ours"]["peak_bytes"] for session in sessions),
    }
    peers = {name: stack for session in sessions for name, stack in session.items() if name != "ours"}
    ratios = {
        name: session["ours"]["tokens_per_second"] / stack["tokens_per_second"]
        for session in sessions
        for name, stack in session.items()
        if name != "ours"
    }
    return {
        "benchmark": "step",
        "ours": ours,
        "peers": peers,
        "ratios": ratios,
        "floor": _floor(shape, workload.tokens, ours["tokens_per_second"], rates),
        "gate": {
            "held_to_ours": [name for name in peers if name in SAME_WEIGHTS],
            "held_to_ours_without_adapters": [name for name in peers if name in SAME_BASE],
            "loss_tolerance": LOSS_TOLERANCE,
            "gradient_norm_relative_tolerance": NORM_TOLERANCE,
        },
        "model": describe(shape, lora),
        "batch": workload.to_json(),
        **report.environment(),
        **({"device": torch.cuda.get_device_name()} if device == "cuda" else {}),
    }


def _floor(
    shape: Shape, tokens: int, tokens_per_second: float, rates: dict[str, dict[str, float]]
) -> dict[str, Any] | None:
    """The bound by products alone; None on a GPU, where their rate is not measured here."""
    if not rates:
        return None
    flops = floor.step_flops(shape, tokens)
    limit = tokens * max(rate["flops_per_second"] for rate in rates.values()) / flops
    return {
        "tokens_per_second": limit,
        "share_reached": tokens_per_second / limit,
        "step_flops": flops,
        "product_rates": rates,
    }


def _show(result: dict[str, Any]) -> None:
    stacks = {"ours": result["ours"], **result["peers"]}
    best = result["ours"]["tokens_per_second"]
    rows = [
        [
            name,
            f"{stack['tokens_per_second']:.1f}",
            f"{result['ratios'].get(name, 1.0):.2f}",
            f"{min(stack['seconds']):.2f} - {max(stack['seconds']):.2f}",
            f"{stack['peak_bytes'] / 1e9:.2f}",
            f"{stack['check']['loss']:.4f}",
            stack["dtype"],
        ]
        for name, stack in stacks.items()
    ]
    if result["floor"]:
        limit = result["floor"]["tokens_per_second"]
        rows.append(["floor", f"{limit:.1f}", f"{best / limit:.2f}", *[""] * 4])
    title = f"One step of {result['batch']['tokens']} tokens on {result['device']}, {result['threads']} threads"
    header = ["", "tokens/s", "ours over it", "seconds", "peak GB", "loss", "dtype"]
    notes = [f"{name}: {note}" for name, stack in stacks.items() for note in stack["notes"]]
    if not result["gate"]["held_to_ours"] and not result["gate"]["held_to_ours_without_adapters"]:
        notes.append("no peer with the same weights took part, so that nothing was checked against one")
    report.show(title, header, rows, notes)
