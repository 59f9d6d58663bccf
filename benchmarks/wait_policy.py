"""How OpenMP's threads wait for each other: steps by setting, alone and beside other work on the cores.

The steps are the demo's, or with `--full-layers N` those of `full_mixtral_step.py` with so many layers: Mixtral-8x7B's
width, experts on disk, 320 tokens. Rounds alone and beside other work take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import demo_turns, report
from benchmarks.demo_turns import DEMO
from benchmarks.full_mixtral_step import MIXTRAL, run_values, write_folder
from benchmarks.peers.processes import ROOT
from benchmarks.timing import median_ratio
from expertune.checkpoint.model_folder import FOLDER_MARK

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
    parser.add_argument(
        "--full-layers", type=int, default=0, help="steps of so many layers of Mixtral-8x7B, not the demo's"
    )
    parser.add_argument("--folder", type=Path, help="where these layers are written and kept; default: temporary")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    rounds = {count: args.rounds_beside if count else args.rounds for count in args.beside}
    turns = 1 + sum(rounds.values())  # the first turn warms up
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    rates: dict[str, dict[str, list[float]]] = {
        str(count): {name: [] for name in args.settings} for count in args.beside
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run_file = _full_run(args.folder or folder, folder, args.full_layers) if args.full_layers else DEMO
        processes = {
            name: stack.enter_context(
                demo_turns.process(
                    _environment(SETTINGS[name] | threads), ROOT / "src", args.steps, turns, folder / name, run_file
                )
            )
            for name in args.settings
        }
        for name, process in processes.items():
            demo_turns.take_turn(process)
            report.progress(f"{name}: the first turn is over")
        for round_ in range(max(rounds.values())):
            for count in (count for count in args.beside if round_ < rounds[count]):
                report.progress(f"beside {count} jobs")
                with _spinning(count):
                    taken = demo_turns.in_turns(processes, 1, first=round_)
                for name, of in taken.items():
                    rates[str(count)][name] += [turn.tokens / turn.seconds for turn in of]
    result = {
        "benchmark": "wait_policy",
        "settings": {name: SETTINGS[name] for name in args.settings},
        "trains": f"{args.full_layers} layers of Mixtral-8x7B on disk" if args.full_layers else "the demo",
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
    report.show(f"Tokens/s of {result['trains']} by wait policy", ["jobs beside", *args.settings], rows, notes)
    return result


def _full_run(folder: Path, scratch: Path, layers: int) -> Path:
    """The run file of a full-size step with so many layers, which are written where they are not there yet."""
    model = folder / f"mixtral-{layers}-layers"
    if not (model / FOLDER_MARK).is_file():
        write_folder(model, replace(MIXTRAL, layers=layers))
    path = scratch / "run.yaml"
    path.write_text(json.dumps(run_values(model, scratch)), encoding="utf-8")  # JSON is YAML
    return path


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
