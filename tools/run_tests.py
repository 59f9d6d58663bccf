"""The default tests in two processes of one thread each, copies of one that has made the imports and found the tests.

Most tests start programs or work on tiny tensors, where a second thread only waits. The two take rooms of tests from
one queue, so that they end together; what the second says is shown once both have ended. Imports are made once for
both, and for the servers of the programs that tests start: each by itself would spend ten seconds on them. Meanwhile
the other core compiles kernels for a test that looks at them later.

    python tools/run_tests.py [ARGUMENTS OF PYTEST]
"""

import atexit
import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

import tests.conftest  # noqa: E402, F401 - the environment of tests, before anything reads it
from tests.kernels.gpu.compilation import AHEAD, BY_DEFAULT, Compilation  # noqa: E402
from tests.processes import BENEATH, ENGINES, KEPT, RUN, Server  # noqa: E402

LONGEST = ("distributed", "train", "kernels", "families")
"""Rooms that are begun first: one of them at the end would leave the other process without work."""

OPTIONS = (
    *("-p", "no:cacheprovider"),
    *("-p", "no:logging"),  # looks at each of two thousand loggers, six times a test; what they say is on stderr
    *("-o", "console_output_style=classic"),  # no parts of a whole, of which each process runs some
    *("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"),
    *("--durations", "15", "--durations-min", "3"),  # where time goes, of each process
)


class TwoProcesses:
    """Runs the tests in this process and in a copy of it.

    Args:
        log: what the copy says.
        servers: for the programs that the tests of each start.
    """

    def __init__(self, log: BinaryIO, *servers: dict[str, Server]) -> None:
        self.log, self.servers = log, servers
        self.copy = -1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest's own loop says so
        rooms = rooms_of(session.items)
        queue, numbers = os.pipe()
        os.write(numbers, bytes(range(len(rooms))))
        os.close(numbers)
        self._copy(session.config.pluginmanager.get_plugin("capturemanager"))
        drawn = (item for number in iter(lambda: os.read(queue, 1), b"") for item in rooms[number[0]])
        item = next(drawn, None)
        while item:
            following = next(drawn, None)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail or session.shouldstop:
                raise (
                    session.Failed(session.shouldfail)
                    if session.shouldfail
                    else session.Interrupted(session.shouldstop)
                )
            item = following
        return True

    def _copy(self, capture: Any) -> None:
        # Begun anew, it gives the terminal back to this process and the log to the copy.
        capture.stop_global_capturing()
        self.copy = os.fork()
        if self.copy == 0:
            for stream in (1, 2):
                os.dup2(self.log.fileno(), stream)
        capture.start_global_capturing()
        capture.suspend_global_capture()
        KEPT.update(self.servers[self.copy == 0])


def rooms_of(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Tests by the folder or the file of `tests` that they are in."""
    rooms: dict[str, list[pytest.Item]] = {name: [] for name in LONGEST}
    for item in items:
        rooms.setdefault(item.path.relative_to(ROOT / "tests").parts[0], []).append(item)
    return list(rooms.values())


@contextmanager
def compiling() -> Iterator[None]:
    """Have kernels compiled while this process makes imports."""
    process, folder = os.getpid(), Path(mkdtemp())
    compilation = Compilation(folder, BY_DEFAULT)
    AHEAD.append(compilation)
    try:
        yield
    finally:
        if os.getpid() == process:  # its copy leaves this way as well
            if compilation.process.poll() is None:
                os.killpg(compilation.process.pid, signal.SIGKILL)
                compilation.process.wait()
            shutil.rmtree(folder)


def main() -> int:
    with nullcontext() if sys.argv[1:] else compiling():  # arguments choose tests, that one perhaps not among them
        return run()


def run() -> int:
    """Make the imports and run the tests; the exit status."""
    servers: tuple[dict[str, Server], ...] = ({}, {})
    for imports in (BENEATH, ENGINES, RUN):
        names: dict[str, Any] = {"__name__": "__main__"}
        with redirect_stderr(StringIO()):  # what libraries remark on
            exec(imports, names)
        gc.collect()
        gc.freeze()  # here once, and not in each server
        for each in servers:
            each[imports] = Server(imports, dict(names))
    with TemporaryFile() as log:
        processes = TwoProcesses(log, *servers)
        status = int(pytest.main([*OPTIONS, *sys.argv[1:]], plugins=[processes]))
        for server in servers[processes.copy == 0].values():
            server.end()
        if processes.copy > 0:
            _, ended = os.waitpid(processes.copy, 0)
            log.seek(0)
            sys.stdout.buffer.write(log.read())
            status = status or os.waitstatus_to_exitcode(ended)
    return status


if __name__ == "__main__":
    status = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking all modules apart takes two seconds of both processes
