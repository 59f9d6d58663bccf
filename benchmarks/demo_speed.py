"""Training speed of the demo by source tree or environment: each in a process of its own, in turns on one machine.

python benchmarks/run.py demo_speed --against ../before/src       # this tree's speed over another tree's
python benchmarks/run.py demo_speed --variable MALLOC_ARENA_MAX=8 # over the same tree without the variable
"""

import argparse
import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import demo_turns, report
from benchmarks.peers.processes import ROOT
from benchmarks.timing import median_ratio


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", type=Path, help="the src folder of another tree, which is timed as `before`")
    parser.add_argument("--variable", nargs="+", default=[], metavar="NAME=VALUE", help="set for `now` alone")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each; default 12")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn; default 2")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    now = dict(pair.split("=", 1) for pair in args.variable)
    trees = {"before": (args.against or ROOT / "src", {}), "now": (ROOT / "src", now)}
    turns = 1 + args.rounds  # the first turn warms up
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = {
            name: stack.enter_context(
                demo_turns.process({**os.environ, **variables}, tree.resolve(), args.steps, turns, folder / name)
            )
            for name, (tree, variables) in trees.items()
        }
        for process in processes.values():
            demo_turns.take_turn(process)
        taken = demo_turns.in_turns(processes, args.rounds)
        peaks = {name: _peak_bytes(process) for name, process in processes.items()}
    seconds = {name: [turn.seconds / args.steps for turn in of] for name, of in taken.items()}
    result = {
        "benchmark": "demo_speed",
        "variables": now,
        "steps_per_turn": args.steps,
        "seconds_per_step": seconds,
        "medians": {name: median(values) for name, values in seconds.items()},
        # The median over paired turns: how many times as fast as before.
        "speedup": median_ratio(seconds["before"], seconds["now"]),
        "peak_bytes": peaks,
        "load_average": os.getloadavg(),
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [[name, f"{result['medians'][name]:.3f}", f"{peaks[name] / 1e9:.2f}"] for name in processes]
    notes = [f"{result['speedup']:.2f} times as fast as before; load {os.getloadavg()[0]:.1f}"]
    report.show("Demo", ["", "s/step", "peak GB"], rows, notes)
    return result


def _peak_bytes(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
