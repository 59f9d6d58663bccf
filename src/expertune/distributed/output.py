"""Who says what when processes end: each error reaches the terminal once, with the rank that it happened on.

Ranks that end leave a note in the launcher's store, which under torchrun outlives all of them. A rank whose connection
breaks, or that waits in vain, reads there why the others have ended, and which of them left no word: those are gone.
"""

import contextlib
import hashlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from rich.console import Console

from expertune.distributed.processes import Launch, launched
from expertune.errors import ConfigError, ExpertuneError, RankError, first_line, option
from expertune.notebook.progress import in_notebook, notebook_console

# How long a rank that has lost the others looks for what they say. torchrun ends it itself half a minute later.
_LOOK_S = 3.0

# Without a launcher's own store rank 0 holds it, and may have ended.
_REACH_S = 10.0

# What gloo's and NCCL's own errors say of a connection or of waiting; torch 2.11 to 2.13 raise most as RuntimeError.
_OF_A_CONNECTION = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "onnection closed",
    "onnection reset",
    "pair closure",
    "imed out",
    "ocket",
)


def console_of(rank: int, console: Console | None) -> Console:
    """Where a rank's lines and bars go: on rank 0 to the console, elsewhere nowhere.

    Args:
        rank: this process.
        console: None means stderr, as stdout is for results; in a notebook its text output.
    """
    if rank:
        return Console(quiet=True)
    return console or (notebook_console() if in_notebook() else Console(stderr=True))


def speaks(error: BaseException) -> bool:
    """Whether this process is the one that says an error, of all processes that a launcher has started."""
    try:
        launch = launched()
    except ConfigError:
        return True  # it is about the launcher
    if launch.world_size == 1:
        return True
    if (rank := getattr(error, "rank", None)) is not None:
        return bool(rank == launch.rank)
    # It happened before the processes had found each other, such as a mistake in the run file.
    try:
        board = open_board(launch, timedelta(seconds=_REACH_S))
        says = _first(board, str(error), launch.rank) == launch.rank
        board.add("heard", 1)
        end = time.monotonic() + _LOOK_S
        while launch.rank == 0 and board.add("heard", 0) < launch.world_size and time.monotonic() < end:
            time.sleep(0.05)  # the board may be rank 0's, and end with it
        return says
    except (ConfigError, RuntimeError):
        return True


def open_board(launch: Launch, timeout: timedelta) -> "dist.Store":
    """The launcher's store.

    Raises:
        ConfigError: it cannot be reached, or rank 0 cannot open it.
    """
    met: list[dist.Store | Exception] = []

    def meet() -> None:
        try:
            met.append(next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))[0])
        except (RuntimeError, ValueError) as error:
            met.append(error)

    # On a thread, since torch waits forever where another program listens at the port.
    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + _LOOK_S)
    store = met[0] if met else TimeoutError(f"no answer after {timeout.total_seconds():g} seconds")
    if isinstance(store, Exception):
        raise ConfigError(
            f"MASTER_ADDR and MASTER_PORT: the processes cannot meet there ({first_line(store)}); start all "
            f"{launch.world_size} of them, with a port that is free on rank 0's machine (torchrun --master-port) and "
            "an address that all of them reach"
        )
    return dist.PrefixStore("expertune", store)


class LastWords:
    """What the ranks of one run leave each other when they end.

    Args:
        board: the store.
        launch: which process this is.
        timeout_s: how long ranks wait for each other, for messages.

    Attributes:
        close: closes this rank's connections.
    """

    def __init__(self, board: "dist.Store", launch: Launch, timeout_s: float) -> None:
        self._board, self._rank, self._world_size, self._timeout_s = board, launch.rank, launch.world_size, timeout_s
        self.close: Callable[[], None] = lambda: None

    @contextmanager
    def said(self) -> Iterator[None]:
        """Around what may fail on one rank.

        Raises:
            RankError: in place of the broken connection that another rank has left behind.
        """
        try:
            yield
        except BaseException as error:
            if getattr(error, "rank", None) is not None:  # it has been through here
                raise
            with _no_signals():
                found = self._of(error)
            if found is error:
                raise
            raise found from None

    def _of(self, error: BaseException) -> BaseException:
        """An error as the whole run has it, with the rank that says it."""
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        if not stopped and not is_of_a_connection(error):
            text = str(error) if isinstance(error, ExpertuneError) else f"{type(error).__name__}: {error}"
            said_by = self._leave("error", text)
            if isinstance(error, ExpertuneError):
                error = type(error)(f"rank {self._rank}: {text}")
            return _said_by(error, said_by)
        self._leave("stopped" if stopped else "alone", str(error))
        traceback.clear_frames(error.__traceback__)  # in which connections are held
        self.close()  # ranks that wait for this one notice, and leave a note too
        left, again = self._left(), option("resume")
        for rank, (kind, text) in left.items():
            if kind == "error":
                return _said_by(RankError(f"rank {rank}: {text}"), rank)
        if gone := [rank for rank in range(self._world_size) if rank not in left]:
            ranks = f"rank {gone[0]}" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))}"
            text = (
                f"{ranks} of {self._world_size} ended without a word, or kept the others waiting for more than "
                f"{self._timeout_s:g} s (training.ddp_timeout); give the same command again with {again}"
            )
            self._leave("error", text)  # for the one that comes late
            return _said_by(RankError(text), self._first("gone"))
        if stopped:
            return _said_by(error, self._first("stopped"))
        if any(kind == "stopped" for kind, _ in left.values()):
            return _said_by(RankError("the other processes were stopped"), self._world_size)  # which they say
        text = f"the processes lost their connection ({first_line(error)}); give the same command again with {again}"
        return _said_by(RankError(text), self._first("lost"))

    def linger(self) -> None:
        """Wait until the others have left their notes where this rank may hold the store, which ends with it."""
        if self._rank == 0:
            with _no_signals():
                self._left()

    def _leave(self, kind: str, text: str) -> int:
        """Leave a note; returns the rank that says it, the first of those with the same text."""
        with contextlib.suppress(RuntimeError):
            said_by = self._first(text) if kind == "error" else self._rank
            self._board.set(f"end/{self._rank}", json.dumps([kind, text]))
            return said_by
        return self._rank  # nobody can be asked: rather twice than not at all

    def _left(self) -> dict[int, tuple[str, str]]:
        """The notes by rank, when all are there or nobody else leaves one."""
        left: dict[int, tuple[str, str]] = {self._rank: ("alone", "")}
        end = time.monotonic() + _LOOK_S
        with contextlib.suppress(RuntimeError):
            while len(left) < self._world_size and time.monotonic() < end:
                for rank in set(range(self._world_size)) - left.keys():
                    if self._board.check([f"end/{rank}"]):
                        kind, text = json.loads(self._board.get(f"end/{rank}"))
                        left[rank] = kind, text
                time.sleep(0.05)
        return left

    def _first(self, text: str) -> int:
        try:
            return _first(self._board, text, self._rank)
        except RuntimeError:
            return self._rank


def _first(board: "dist.Store", text: str, rank: int) -> int:
    """The rank that was the first to have this text."""
    key = f"said/{hashlib.sha256(text.encode()).hexdigest()}"
    return int(board.compare_set(key, "", str(rank)))


def _said_by(error: BaseException, rank: int) -> BaseException:
    error.rank = rank  # type: ignore[attr-defined]
    return error


def is_of_a_connection(error: BaseException) -> bool:
    """Whether an error is what a collective raises when another rank is gone or late."""
    if isinstance(error, ExpertuneError):
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OF_A_CONNECTION)


@contextmanager
def _no_signals() -> Iterator[None]:
    """A launcher ends all ranks as soon as one is gone; first it is found out which."""
    held: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        held = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
