"""How OpenMP's threads wait for each other: steps of the demo by setting, alone and beside other work on the cores."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.peers.processes import ROOT
from benchmarks.timing import median_ratio

# What OpenMP reads when torch is imported; each process is started with its setting's variables and no others of them.
_READ = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
SETTINGS: dict[str, dict[str, str]] = {
    "unset": {},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
    "short": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"},
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
            name: stack.enter_context(_process(SETTINGS[name] | threads, args.steps, turns, folder / name))
            for name in args.settings
        }
        for name, process in processes.items():
            report.progress(f"{name}: {_take_turn(process):,.0f} tokens/s in the first turn")
        for count in args.beside:
            report.progress(f"beside {count} jobs")
            with _spinning(count):
                rates[str(count)] = in_turns(processes, rounds[count])
    result = {
        "benchmark": "wait_policy",
        "settings": {name: SETTINGS[name] for name in args.settings},
        "steps_per_turn": args.steps,
        # Of each turn, in the order that they were taken; the load average says whether the machine was quiet.
        "tokens_per_second": rates,
        "medians": {count: {name: median(values) for name, values in of.items()} for count, of in rates.items()},
        "over_first": {count: over_first(of) for count, of in rates.items()},
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
    report.show("Demo, tokens/s by wait policy", ["jobs beside", *args.settings], rows, notes)
    return result


def in_turns(processes: Mapping[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each process's turns; who is first changes from round to round."""
    rates: dict[str, list[float]] = {name: [] for name in processes}
    names = list(processes)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in (*names[first:], *names[:first]):
            rates[name].append(_take_turn(processes[name]))
            report.progress(f"  {name}: {rates[name][-1]:,.0f} tokens/s")
    return rates


def over_first(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times the first setting's speed each has: the median over paired turns."""
    first = next(iter(rates.values()))
    return {name: median_ratio(list(values), list(first)) for name, values in rates.items()}


def _take_turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the run ended early: {process.args}")
    tokens, seconds = json.loads(line)
    return float(tokens / seconds)


@contextmanager
def _process(variables: Mapping[str, str], steps: int, turns: int, output_dir: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in _READ} | dict(variables)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.wait_policy", str(steps), str(turns), str(output_dir)]
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


@contextmanager
def _spinning(count: int) -> Iterator[None]:
    jobs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def _train(steps: int, turns: int, output_dir: str) -> None:
    """The demo's training; waits for a line on stdin before each turn, and says after it what it took."""
    import torch  # noqa: F401 - first, so that nothing of ours has a say in what OpenMP reads

    import expertune
    from expertune.train.callbacks import History

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    on_step_end, taken = History.on_step_end, [0, 0.0]

    def in_turns_on_step_end(self: History, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step % steps == 0:
            print(json.dumps([self.tokens - taken[0], self.seconds - taken[1]]), file=answers)
            taken[:] = self.tokens, self.seconds
            sys.stdin.readline()

    History.on_step_end = in_turns_on_step_end  # type: ignore[method-assign]
    sys.stdin.readline()
    overrides = (
        *("data.eval=null", "task.metric=null", "training.eval_on_start=false", "training.eval_strategy=no"),
        *("training.save_strategy=no", f"training.max_steps={steps * turns}", f"output_dir={output_dir}"),
    )
    expertune.finetune("examples/demo.yaml", overrides)


if __name__ == "__main__":
    _train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
