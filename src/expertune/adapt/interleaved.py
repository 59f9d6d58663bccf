"""Forwards of one model that pass its layers in turns, so that what is brought of a layer serves all of them.

A model's forward is one call of the family's own code, and what it keeps between its layers (masks, positions, keys
that layers share) is its own. So each forward beside the one of this thread has a thread, on which it waits before
every layer until it is let on. Only one of them computes at a time, in an order that is the same each time.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from expertune.kernels import workspace

_Result = TypeVar("_Result")


class PausingForward(Generic[_Result]):
    """A forward without gradients that goes on layer by layer, or is computed at once where it was never begun.

    Args:
        forward: what computes it.

    Attributes:
        has_ended: whether nothing of it is left to compute.
    """

    def __init__(self, forward: Callable[[], _Result]) -> None:
        self.has_ended = False
        self._forward = forward
        self._result: list[_Result] = []
        self._let_on, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_abandoned = False

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is the forward itself."""
        return threading.current_thread() is self._thread

    def advance(self) -> None:
        """Compute up to the next layer, or to the end; raises what the forward raises."""
        if self.has_ended:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=_surroundings(), name="forward", daemon=True)
            self._thread.start()
        self._let_on.release()
        self._waits.acquire()
        if (error := self._error) is not None:
            self._error = None
            raise error

    def finish(self) -> None:
        """Compute what is left of it, on this thread where it was never begun."""
        if self._thread is None and not self.has_ended:
            self._result, self.has_ended = [self._forward()], True
        while not self.has_ended:
            self.advance()

    def take(self) -> _Result:
        """What it returned, once: it is not kept."""
        return self._result.pop()

    def pause(self) -> None:
        """Called by the forward itself: wait until it is let on."""
        self._waits.release()
        self._let_on.acquire()
        if self._is_abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        """End it where it is; returns when its thread has ended."""
        if self._thread is None:
            return
        self._is_abandoned = True
        self._let_on.release()
        self._thread.join()
        self._thread = None

    def _run(self, memory: dict[str, Any], stream: Any) -> None:
        try:
            self._let_on.acquire()
            if self._is_abandoned:
                return
            torch.get_num_threads()  # as many as other threads take: torch tells OpenMP on each thread's first use
            workspace.share(memory)
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                self._result, self.has_ended = [self._forward()], True
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._waits.release()


class _AbandonedError(BaseException):
    """Ends a forward that nobody waits for."""


@contextmanager
def in_turns(
    layers: Iterable[nn.Module], forwards: Sequence[PausingForward[Any]], turn: Callable[[], None]
) -> Iterator[None]:
    """Around a forward on this thread: before it computes a layer, others do.

    Args:
        layers: which it passes, each with its own kind of forward.
        forwards: the others. What is left of one at the end can be finished.
        turn: lets each of them on once. Also called before the first layer, to which they then come.
    """
    main = threading.current_thread()

    def before(_layer: nn.Module, _inputs: Any) -> None:
        own = next((forward for forward in forwards if forward.is_this_thread), None)
        if own is not None:
            own.pause()
        elif threading.current_thread() is main:
            turn()

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        turn()
        yield
        while not all(forward.has_ended for forward in forwards):
            turn()
    except BaseException:
        for forward in forwards:
            forward.abandon()
        raise
    finally:
        for handle in handles:
            handle.remove()


def _surroundings() -> tuple[dict[str, Any], Any]:
    """What the forwards of this thread compute in: its memory, and its stream on a GPU."""
    stream = torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return workspace.of_this_thread(), stream
