"""Processes of their own for what a test must not do in its own, without the price of a start for each."""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RUN = "import expertune.api, expertune.cli, matplotlib.backends.backend_agg"
"""What a run imports: seconds of work, done once for all programs that start with it."""
BENEATH = "import torch, bitsandbytes"
"""What transformers, PEFT and expertune import before anything of their own."""


class Ended(NamedTuple):
    """A process that has ended: its exit status (below 0: the signal that ended it) and what it wrote."""

    status: int
    out: str
    err: str


class Server:
    """A process that has made some imports and is copied for each program (tests/program_server.py).

    Args:
        imports: code that runs once, before; it must start no thread that does anything.
        environment: variables beside those of this process.
    """

    def __init__(self, imports: str, **environment: str) -> None:
        self.folder = TemporaryDirectory()
        self.output = [str(Path(self.folder.name) / name) for name in ("out", "err")]
        self.environment = environment
        command = [sys.executable, str(ROOT / "tests" / "program_server.py"), imports]
        with (Path(self.folder.name) / "server").open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                env=self._variables(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def run(self, code: str, folder: Path, arguments: Sequence[str] = (), **environment: str) -> Ended:
        """Run a program to its end, in a folder; it has the names that the imports have made."""
        program = {"code": code, "folder": str(folder), "arguments": arguments}
        program |= {"environment": self._variables() | environment, "output": self.output}
        try:
            print(json.dumps(program), file=self.process.stdin, flush=True)
            status = self.process.stdout.readline()  # type: ignore[union-attr]
        except BaseException:
            self.end()
            raise
        assert status, (Path(self.folder.name) / "server").read_text(encoding="utf-8")[-4000:]
        return Ended(int(status), *(Path(path).read_text(encoding="utf-8") for path in self.output))

    def end(self) -> None:
        """End it, and the program that it may be running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.folder.cleanup()

    def _variables(self) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
        return os.environ | fixed | self.environment


def run_copies(imports: str, codes: Sequence[str], folder: Path, **environment: str) -> list[Ended]:
    """Run each piece of code in a process of its own, one after the other, all with the imports already made.

    Args:
        imports: code that runs once, before; it must start no thread that does anything.
        codes: what runs in each process, with the names that the imports have made.
        folder: where the processes run.
        environment: variables beside those of this process.
    """
    server = Server(imports, **environment)
    try:
        return [server.run(code, folder) for code in codes]
    finally:
        server.end()


def run_program(code: str, *arguments: str, folder: Path = ROOT, imports: str = RUN, **environment: str) -> Ended:
    """Run code in a process of its own, with imports made that are made once for all tests.

    Args:
        code: the program.
        arguments: its command line.
        folder: where it runs.
        imports: `RUN` or `BENEATH`.
        environment: variables beside those of this process; what is imported already has been so without them.
    """
    if imports not in _kept or _kept[imports].process.poll() is not None:
        _kept[imports] = Server(imports)
        atexit.register(_kept[imports].end)
    return _kept[imports].run(code, folder, arguments, **environment)


_kept: dict[str, Server] = {}
