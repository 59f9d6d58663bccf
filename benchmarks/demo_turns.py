"""Training steps in processes that take turns, each with an environment and a source tree of its own.

They are the demo's, or another run file's. Every process takes the same steps on the same examples, so that a turn is
the same work in each of them. `demo_worker.py` is what they run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.peers.processes import ROOT

# A variable with which a process sets its threads as the command line does.
PREPARE = "DEMO_WORKER_PREPARES_THREADS"

DEMO = Path("examples/demo.yaml")


@dataclass(frozen=True)
class Turn:
    """What a process did in one turn."""

    tokens: int
    seconds: float


@contextmanager
def process(
    environment: Mapping[str, str],
    tree: Path,
    steps: int,
    turns: int,
    output_dir: Path,
    run_file: Path = DEMO,
) -> Iterator[subprocess.Popen[str]]:
    """A process that trains and waits for its turns.

    Args:
        environment: all of its variables.
        tree: the src folder that it imports from.
        steps: optimizer steps of a turn.
        turns: how many turns it will be given.
        output_dir: its run directory.
        run_file: what it trains; the demo by default.
    """
    arguments = [str(each) for each in (steps, turns, output_dir, run_file)]
    command = [sys.executable, "-m", "benchmarks.demo_worker", *arguments]
    path = os.pathsep.join([str(tree), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (
        Path(f"{output_dir}.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as started,
    ):
        try:
            yield started
        finally:
            started.kill()


def take_turn(started: subprocess.Popen[str]) -> Turn:
    """Let a process take its next turn, and wait for the end of it."""
    assert started.stdin is not None
    assert started.stdout is not None
    started.stdin.write("\n")
    started.stdin.flush()
    line = started.stdout.readline()
    if not line:
        raise RuntimeError(f"the run ended early: {started.args}")
    return Turn(*json.loads(line))


def in_turns(processes: Mapping[str, subprocess.Popen[str]], rounds: int, first: int = 0) -> dict[str, list[Turn]]:
    """Each process's turns; which one is first changes from round to round, from number `first` on."""
    turns: dict[str, list[Turn]] = {name: [] for name in processes}
    names = list(processes)
    for round_ in range(first, first + rounds):
        begin = round_ % len(names)
        for name in (*names[begin:], *names[:begin]):
            turn = take_turn(processes[name])
            turns[name].append(turn)
            report.progress(f"  {name}: {turn.tokens / turn.seconds:,.0f} tokens/s")
    return turns
