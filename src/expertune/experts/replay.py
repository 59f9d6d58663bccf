"""Experts under activation checkpointing: computed once in forward, replayed in the recomputation.

Checkpointing runs a decoder layer a second time in backward, so that whatever the layer's operators save for their
gradients is there again. The experts' operator saves its inputs only; gate and up it computes again by itself, or has
kept them beside what is saved. What it returned is therefore kept (the layer's output [T, D] and x @ A), and handed out
again instead of being computed. Where it is kept is the caller's to say (`held_by`): on the device, or away from it.

Used through the `context_fn` of `torch.utils.checkpoint.checkpoint`, which takes two contexts for each region: one
around its forward, one around its recomputation.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

Output = tuple[Tensor, list[Tensor]]

Hold = Callable[[Tensor], Callable[[], Tensor]]
"""Puts a tensor away, and returns how to have it back; must not keep the tensor itself, which may be written to."""


class Tape:
    """What the experts of one checkpointed region returned, in the order of their calls."""

    def __init__(self) -> None:
        self._outputs: list[list[Callable[[], Tensor]]] = []
        self._next: int | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the forward."""
        with _in_use(self):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around a recomputation, which begins at the first call again."""
        self._next = 0
        with _in_use(self):
            yield

    @property
    def replays(self) -> bool:
        """Whether it is handed out again."""
        return self._next is not None

    def run(self, compute: Callable[[list[Tensor]], Output]) -> Output:
        """`compute` with what was recorded at this place, or with nothing; what it returns is then recorded."""
        if self._next is not None:
            self._next += 1
            return compute([take() for take in self._outputs[self._next - 1]])
        output, low_rank = compute([])
        hold: Hold | None = getattr(_local, "hold", None)
        if hold is None:
            # A copy: the family's own code may change its experts' output in place.
            self._outputs.append([_kept(output.detach().clone()), *(_kept(tensor.detach()) for tensor in low_rank)])
        else:
            self._outputs.append([hold(tensor.detach()) for tensor in (output, *low_rank)])
        return output, low_rank


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of a checkpointed region that holds experts."""
    tape = Tape()
    return tape.recording(), _Replays(tape)


def with_replay(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments for `torch.utils.checkpoint.checkpoint`, with replay where its variant can have it.

    The reentrant variant takes no contexts, and needs inputs that require gradients, which frozen embeddings do not
    give: the other one is the default.
    """
    arguments = {"use_reentrant": False, **(arguments or {})}
    if not arguments["use_reentrant"]:
        arguments.setdefault("context_fn", checkpoint_contexts)
    return arguments


def run(compute: Callable[[list[Tensor]], Output]) -> Output:
    """`compute([])`, or what the tape in use makes of it."""
    tape: Tape | None = getattr(_local, "tape", None)
    return compute([]) if tape is None else tape.run(compute)


def is_recomputing() -> bool:
    """Whether this thread is in the recomputation of a checkpointed region."""
    tape: Tape | None = getattr(_local, "tape", None)
    return tape is not None and tape.replays


@contextmanager
def held_by(hold: Hold) -> Iterator[None]:
    """While open, what tapes record on this thread is put away by `hold`."""
    before = getattr(_local, "hold", None)
    _local.hold = hold
    try:
        yield
    finally:
        _local.hold = before


_local = threading.local()


class _Replays(AbstractContextManager[None]):
    """Around recomputations of a region, of which a graph that is retained has several."""

    def __init__(self, tape: Tape) -> None:
        self._tape, self._opened = tape, ExitStack()

    def __enter__(self) -> None:
        self._opened.enter_context(self._tape.replaying())

    def __exit__(self, *raised: Any) -> None:
        self._opened.__exit__(*raised)


def _kept(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


@contextmanager
def _in_use(tape: Tape) -> Iterator[None]:
    before = getattr(_local, "tape", None)
    _local.tape = tape
    try:
        yield
    finally:
        _local.tape = before
