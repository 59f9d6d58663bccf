"""Training speed of the demo by source tree or environment: each in a process of its own, in turns on one machine.

    python benchmarks/run.py demo_speed --against ../before/src       # this tree's speed over another tree's
    python benchmarks/run.py demo_speed --variable MALLOC_ARENA_MAX=8 # over the same tree without the variable

Every process takes the same steps on the same examples, so that a turn is the same work in each of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
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
            name: stack.enter_context(_process(tree.resolve(), variables, args.steps, turns, folder / name))
            for name, (tree, variables) in trees.items()
        }
        for process in processes.values():
            _take_turn(process)
        seconds = _in_turns(processes, args.rounds)
        peaks = {name: _peak_bytes(process) for name, process in processes.items()}
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


def _in_turns(processes: Mapping[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each process's turns; who is first changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for round_ in range(rounds):
        for name in sorted(processes, reverse=bool(round_ % 2)):
            seconds[name].append(_take_turn(processes[name]))
            report.progress(f"  {name}: {seconds[name][-1]:.3f} s/step")
    return seconds


def _take_turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the run ended early: {process.args}")
    return float(json.loads(line))


def _peak_bytes(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@contextmanager
def _process(
    tree: Path, variables: Mapping[str, str], steps: int, turns: int, output_dir: Path
) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)])}
    command: Sequence[str] = [sys.executable, __file__, str(steps), str(turns), str(output_dir)]
    with (
        Path(f"{output_dir}.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _train(steps: int, turns: int, output_dir: str) -> None:
    """The demo's training; waits for a line on stdin before each turn, and says after it how long a step took."""
    from transformers.trainer_callback import CallbackHandler

    import expertune

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    on_step_end, started = CallbackHandler.on_step_end, [0.0]

    def in_turns_on_step_end(self: CallbackHandler, args: Any, state: Any, control: Any) -> Any:
        control = on_step_end(self, args, state, control)
        if state.global_step % steps == 0:
            print(json.dumps((time.perf_counter() - started[0]) / steps), file=answers)
            sys.stdin.readline()
            started[0] = time.perf_counter()
        return control

    CallbackHandler.on_step_end = in_turns_on_step_end
    sys.stdin.readline()
    started[0] = time.perf_counter()
    overrides = (
        *("data.eval=null", "task.metric=null", "training.eval_on_start=false", "training.eval_strategy=no"),
        *("training.save_strategy=no", f"training.max_steps={steps * turns}", f"output_dir={output_dir}"),
    )
    expertune.finetune("examples/demo.yaml", overrides)


if __name__ == "__main__":
    _train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
