"""Processes of their own for what a test must not do in its own: several of them for the price of one start."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# One process imports, which takes seconds, and is then copied for each piece of code. It has one thread until then:
# a copy of a process with several may wait forever for what a thread that was not copied holds.
_COPIES = """
import json, os, sys
imports, codes = json.load(sys.stdin)
names = {"__name__": "__main__"}
exec(imports, names)
statuses = []
for number, code in enumerate(codes):
    pid = os.fork()
    if pid == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        exec(code, names)
        sys.exit()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
json.dump(statuses, open("statuses.json", "w"))
"""


class Ended(NamedTuple):
    """A process that has ended: its exit status (below 0: the signal that ended it) and what it wrote."""

    status: int
    out: str
    err: str


def run_copies(imports: str, codes: Sequence[str], folder: Path, **environment: str) -> list[Ended]:
    """Run each piece of code in a process of its own, one after the other, all with the imports already made.

    Args:
        imports: code that runs once, before; it must start no thread.
        codes: what runs in each process, with the names that the imports have made.
        folder: an empty folder, where the processes run and their output is kept.
        environment: variables beside those of this process.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _COPIES],
        input=json.dumps([imports, list(codes)]),
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    statuses = json.loads((folder / "statuses.json").read_text(encoding="utf-8"))
    return [
        Ended(status, *((folder / f"{number}.{name}").read_text(encoding="utf-8") for name in ("out", "err")))
        for number, status in enumerate(statuses)
    ]
