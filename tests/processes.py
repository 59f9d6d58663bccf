"""Processes of their own for what a test must not do in its own, without the price of a start for each."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from tests.program_server import serve

ROOT = Path(__file__).parents[1]
RUN = "import expertune.api, expertune.cli, matplotlib.backends.backend_agg"
"""What a run imports: seconds of work, done once for all programs that start with it."""
BENEATH = "import torch, bitsandbytes"
"""What transformers, PEFT and expertune import before anything of their own."""
ENGINES = f"{BENEATH}, runpy, transformers, peft, transformers.models.mixtral.modeling_mixtral"
"""What programs that run an export in its engine import, and nothing of expertune."""


class Ended(NamedTuple):
    """A process that has ended: its exit status (below 0: the signal that ended it) and what it wrote."""

    status: int
    out: str
    err: str


class Server:
    """A process that has made some imports and is copied for each program (tests/program_server.py).

    Args:
        imports: code that runs once, before; it must start no thread that does anything.
        names: where this process has made the imports, the names that they have made: the server is a copy of it.
        python: the interpreter, where it is not this one.
        environment: variables beside those of this process.
    """

    def __init__(
        self, imports: str, names: dict[str, Any] | None = None, python: str = sys.executable, **environment: str
    ) -> None:
        self.folder = Path(mkdtemp())
        self.python = python
        self.output = [str(self.folder / name) for name in ("out", "err")]
        self.environment = environment
        self.has_ended = False
        self.process: subprocess.Popen[bytes] | None = None
        (program, programs), (statuses, status) = os.pipe(), os.pipe()
        self.programs, self.statuses = os.fdopen(programs, "w"), os.fdopen(statuses)
        with (self.folder / "server").open("wb") as errors:
            streams = (program, status, errors.fileno())
            if names is None:
                self.process = self._start(imports, *streams)
                self.pid = self.process.pid
            else:
                self.pid = self._copy(names, streams)
        os.close(program)
        os.close(status)

    def _start(self, imports: str, stdin: int, stdout: int, stderr: int) -> "subprocess.Popen[bytes]":
        command, variables = [self.python, str(ROOT / "tests" / "program_server.py"), imports], self._variables()
        return subprocess.Popen(
            command, env=variables, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )

    def _copy(self, names: dict[str, Any], streams: Sequence[int]) -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            self.programs.close()  # whose end is the server's
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            serve(names)
            os._exit(0)
        return pid

    def run(self, code: str, folder: Path, arguments: Sequence[str] = (), **environment: str) -> Ended:
        """Run a program to its end, in a folder; it has the names that the imports have made."""
        program = {"code": code, "folder": str(folder), "arguments": arguments}
        program |= {"environment": self._variables() | environment, "output": self.output}
        try:
            print(json.dumps(program), file=self.programs, flush=True)
            status = self.statuses.readline()
            assert status, (self.folder / "server").read_text(encoding="utf-8")[-4000:]
        except BaseException:
            self.end()
            raise
        return Ended(int(status), *(Path(path).read_text(encoding="utf-8") for path in self.output))

    def end(self) -> None:
        """End it, and the program that it may be running."""
        if self.has_ended:
            return
        self.has_ended = True
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.process:
            self.process.wait()
        for stream in (self.programs, self.statuses):
            with suppress(BrokenPipeError):
                stream.close()
        shutil.rmtree(self.folder)

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
        imports: `RUN`, `BENEATH` or `ENGINES`.
        environment: variables beside those of this process; what is imported already has been so without them.
    """
    if imports not in KEPT or KEPT[imports].has_ended:
        KEPT[imports] = Server(imports)
        atexit.register(KEPT[imports].end)
    return KEPT[imports].run(code, folder, arguments, **environment)


KEPT: dict[str, Server] = {}
"""Servers by their imports, for all programs of this process."""
