"""How OpenMP's threads wait for each other: steps of the demo by setting, alone and beside other work on the cores."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import demo_turns, report
from benchmarks.peers.processes import ROOT
from benchmarks.timing import median_ratio

# What OpenMP reads when torch is imported; each process is started with its setting's variables and no others of them.
_READ = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
SETTINGS: dict[str, dict[str, str]] = {
    "unset": {},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
    **{f"spin{count}": {"GOMP_SPINCOUNT": str(count)} for count in (1_000, 10_000, 30_000, 100_000)},
    # As the command line starts.
    "default": {demo_turns.PREPARE: "1"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=["unset", "passive"], help="what takes turns"
    )
    parser.add_argument("--beside", nargs="+", type=int, default=[0, 1, 4], help="spinning jobs beside; default 0 1 4")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each setting alone; default 12")
    parser.add_argument(
        "--rounds-beside", type=int, default=3, help="the same beside jobs, where they take long; default 3"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn; default 2")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    rounds = {count: args.rounds_beside if count else args.rounds for count in args.beside}
    turns = 1 + sum(rounds.values())  # the first turn warms up
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    rates: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = {
            name: stack.enter_context(
                demo_turns.process(
                    _environment(SETTINGS[name] | threads), ROOT / "src", args.steps, turns, folder / name
                )
            )
            for name in args.settings
        }
        for name, process in processes.items():
            demo_turns.take_turn(process)
            report.progress(f"{name}: the first turn is over")
        for count in args.beside:
            report.progress(f"beside {count} jobs")
            with _spinning(count):
                taken = demo_turns.in_turns(processes, rounds[count])
            rates[str(count)] = {name: [turn.tokens / turn.seconds for turn in of] for name, of in taken.items()}
    result = {
        "benchmark": "wait_policy",
        "settings": {name: SETTINGS[name] for name in args.settings},
        "steps_per_turn": args.steps,
        # Of each turn, in the order that they were taken; the load average says whether the machine was quiet.
        "tokens_per_second": rates,
        "medians": {count: {name: median(values) for name, values in of.items()} for count, of in rates.items()},
        "over_first": {count: over_first(of) for count, of in rates.items()},
        "of_alone": {count: of_alone(of, rates["0"]) for count, of in rates.items()} if "0" in rates else {},
        "load_average": os.getloadavg(),
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [
        [count, *(f"{result['medians'][count][name]:,.0f} ({result['over_first'][count][name]:.3f})" for name in of)]
        for count, of in rates.items()
    ]
    notes = [f"in brackets: over {args.settings[0]}, the median of paired turns; load {os.getloadavg()[0]:.1f}"]
    for count, of in result["of_alone"].items():
        kept = ", ".join(f"{name} {part:.0%}" for name, part in of.items())
        notes.append(f"beside {count} jobs, of the speed alone: {kept}")
    report.show("Demo, tokens/s by wait policy", ["jobs beside", *args.settings], rows, notes)
    return result


def over_first(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times the first setting's speed each has: the median over paired turns."""
    first = next(iter(rates.values()))
    return {name: median_ratio(list(values), list(first)) for name, values in rates.items()}


def of_alone(rates: Mapping[str, Sequence[float]], alone: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Which part of its speed alone each setting keeps."""
    return {name: median(values) / median(alone[name]) for name, values in rates.items()}


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _READ} | dict(variables)


@contextmanager
def _spinning(count: int) -> Iterator[None]:
    jobs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for job in jobs:
            job.kill()
            job.wait()
