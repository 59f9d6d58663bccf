"""What a command takes before it does anything: CPU and wall seconds of each, by source tree, in turns on one machine.

python benchmarks/run.py startup --against ../before/src
python benchmarks/run.py startup --commands plan doctor --rounds 5 --json benchmarks/results/startup.json

`plan` is the first of a model, `plan_examples` one of a known model with new examples, and `plan_again` another one of
the same run file; what is measured of a machine once (`cpu_rates`) is there for all of them. `train` is
the demo up to and with its first step, without evaluations and scores.
`torch` is `import torch` alone, the unit in which the others can be compared between machines. Of this machine's result
that exists, what is not measured again is kept.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.peers.processes import ROOT

_DEMO = "examples/demo.yaml"
_EXPERTUNE = ("-m", "expertune")
COMMANDS: dict[str, tuple[str, ...]] = {
    "torch": ("-c", "import torch"),
    "help": (*_EXPERTUNE, "--help"),
    "plan": (*_EXPERTUNE, "plan", _DEMO),
    "plan_examples": (*_EXPERTUNE, "plan", _DEMO),
    "plan_again": (*_EXPERTUNE, "plan", _DEMO),
    "doctor": (*_EXPERTUNE, "doctor"),
    "train": (
        *(*_EXPERTUNE, "train", _DEMO, "training.max_steps=1", "training.eval_on_start=false"),
        *("training.eval_strategy=no", "task.metric=null"),
    ),
}
"""Arguments of Python by what they are called; `train` gets an output_dir of its own."""

_FORGOTTEN = {"plan": "*.json", "plan_examples": "lengths-*.json"}
"""What of earlier plans is not there, by command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", type=Path, help="the src folder of another tree, which is timed as `before`")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="all by default")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; default 3")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    earlier = (report.read_own(args.json) or {}).get("commands", {}) if args.json else {}
    trees = {"now": ROOT / "src"} | ({"before": args.against.resolve()} if args.against else {})
    taken: dict[str, Any] = {name: {tree: [] for tree in trees} for name in args.commands}
    with tempfile.TemporaryDirectory() as folder:
        caches = {tree: Path(folder) / tree for tree in trees}
        for tree, source in trees.items():
            _run(COMMANDS["plan"], source, caches[tree])  # measures the machine, and keeps what plans keep
        for _ in range(args.rounds):
            for name in args.commands:
                for tree, source in trees.items():
                    for path in (caches[tree] / "expertune" / "plans").glob(_FORGOTTEN.get(name, "none")):
                        path.unlink()
                    taken[name][tree].append(_run(COMMANDS[name], source, caches[tree]))
    found = {name: {tree: _medians(runs) for tree, runs in of.items()} for name, of in taken.items()}
    result = {
        "benchmark": "startup",
        "rounds": args.rounds,
        "commands": earlier | found,
        "load_average": os.getloadavg(),
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    rows = [
        [name, tree, *(f"{values[key]:.2f}" for key in ("cpu_seconds", "wall_seconds"))]
        for name, of in found.items()
        for tree, values in of.items()
    ]
    report.show("Start-up", ["command", "tree", "CPU s", "wall s"], rows, [f"medians of {args.rounds} runs"])
    return result


def _run(arguments: tuple[str, ...], source: Path, cache: Path) -> dict[str, Any]:
    """One run in a process of its own; the hub is not asked, whose answer takes as long as the network does."""
    cache.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        output = [f"output_dir={folder}/run"] if "train" in arguments else []
        environment = os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache)}
        before, started = _cpu_seconds(), time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments, *output], env=environment, cwd=ROOT, check=True, capture_output=True
        )
        taken = {"cpu_seconds": _cpu_seconds() - before, "wall_seconds": time.perf_counter() - started}
        record = Path(folder) / "run" / "record.json"
        phases = json.loads(record.read_text(encoding="utf-8"))["run"]["phases"] if record.exists() else {}
    return {**taken, "phases": phases}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of CPU and wall seconds, with all of them; and of a run's phases, by its record."""
    found: dict[str, Any] = {key: median(each[key] for each in runs) for key in ("cpu_seconds", "wall_seconds")}
    found["each_cpu_seconds"] = [each["cpu_seconds"] for each in runs]
    if phases := runs[0]["phases"]:
        found["phases"] = {name: median(each["phases"].get(name, 0.0) for each in runs) for name in phases}
    return found
