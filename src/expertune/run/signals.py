"""Signals that ask a process to end, as an exception, so that cleanup runs as at any other end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(SystemExit):
    """The process was asked to end, by SIGTERM or by a terminal that was closed; the exit code is 128 + the signal."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)
        self.signal = signal.Signals(number).name

    def __str__(self) -> str:
        return f"interrupted by {self.signal}"


@contextmanager
def signals_raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated where they would end the process; a program's own handlers stay."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    # Only the main thread may set handlers.
    is_main = threading.current_thread() is threading.main_thread()
    ours = [signal.Signals[name] for name in names if is_main and signal.getsignal(signal.Signals[name]) is _DEFAULT]
    for number in ours:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _DEFAULT)


_DEFAULT = signal.SIG_DFL


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)
