"""What the processes of a run exchange, as seen from one of them: bytes that leave it, and seconds that it waits.

Bytes are counted where torch dispatches a collective, whoever has called it. What leaves a rank of W:

| collective | bytes that leave a rank |
|---|---|
| all_to_all | rows for other ranks |
| all_gather | its own part, W - 1 times: around a ring each rank passes on all parts but one |
| reduce_scatter | (W - 1) / W of its input |
| all_reduce | 2 (W - 1) / W of the tensor: around a ring, a reduce_scatter and an all_gather |
| broadcast | (W - 1) / W of the tensor: all ranks but one pass it on |
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.placement.slots import SlotLayers

# Calls and bytes by kind of collective.
Counted = dict[str, dict[str, float]]


def _nbytes(tensors: Any) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_nbytes, tensors))


Sent = Callable[[dist.ProcessGroup, Sequence[Any]], float]


def _around_ring(tensor: int, times: int = 1) -> Sent:
    """(W - 1) / W of the argument with this number, so many times."""
    return lambda group, given: times * _nbytes(given[tensor]) * (group.size() - 1) / group.size()


def _to_each(group: dist.ProcessGroup, given: Sequence[Any]) -> float:
    return _nbytes(given[1]) * (group.size() - 1)


def _rows_for_others(group: dist.ProcessGroup, given: Sequence[Any]) -> float:
    rows, splits = given[1], given[4]
    if not splits:
        return rows.nbytes * (group.size() - 1) / group.size()
    return (sum(splits) - splits[group.rank()]) * rows[:1].nbytes


# By torch's operators, with their arguments as torch 2.13 has them: where an output comes first, the input is second.
_SENT: Mapping[str, tuple[str, Sent]] = {
    "allreduce_": ("all_reduce", _around_ring(0, times=2)),
    "allgather_": ("all_gather", _to_each),
    "_allgather_base_": ("all_gather", _to_each),
    "_reduce_scatter_base_": ("reduce_scatter", _around_ring(1)),
    "alltoall_base_": ("all_to_all", _rows_for_others),
    "broadcast_": ("broadcast", _around_ring(0)),
    "barrier": ("barrier", lambda group, given: 0),
}


class _Seen(TorchDispatchMode):
    """Counts the collectives that torch dispatches while it is entered."""

    def __init__(self, counted: Counted, lock: threading.Lock) -> None:
        super().__init__()
        self._counted, self._lock = counted, lock

    def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        """Count it if it is a collective, and run it.

        Raises:
            NotImplementedError: a collective that this does not know.
        """
        if "c10d" in operator.namespace:
            self._count(operator._schema.name.split("::")[1], given)
        return operator(*given, **(named or {}))

    def _count(self, name: str, given: Sequence[Any]) -> None:
        if name not in _SENT:
            raise NotImplementedError(f"what a rank sends in {name} is not known here")
        kind, sent = _SENT[name]
        group = next(filter(None, map(_group, given)))
        with self._lock:
            of_kind = self._counted.setdefault(kind, {"calls": 0, "bytes": 0})
            of_kind["calls"] += 1
            of_kind["bytes"] += sent(group, given)


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith("ProcessGroup"):
        return dist.ProcessGroup.unbox(argument)
    return None


def sent_bytes(counted: Counted) -> float:
    """Bytes of all collectives."""
    return sum(of_kind["bytes"] for of_kind in counted.values())


# Where Python enters a collective, by the names of torch 2.13 and of those before.
_ENTERED = (
    *("allreduce", "broadcast", "barrier", "allgather", "all_gather_single", "_allgather_base"),
    *("all_to_all_single", "alltoall_base", "reduce_scatter", "reduce_scatter_single", "_reduce_scatter_base"),
)


class Traffic:
    """What this process exchanges, on all its threads.

    Attributes:
        counted: calls and bytes by kind of collective, so far.
        waits: seconds of each time that the thread which made this was in a collective, or waited for one that another
            thread has started. All ranks have them in one order.
    """

    def __init__(self) -> None:
        self.counted: Counted = {}
        self.waits: list[float] = []
        self._lock, self._here = threading.Lock(), threading.local()
        self._waits = threading.get_ident()

    def clear(self) -> None:
        """Start again from nothing."""
        with self._lock:
            self.counted.clear()
        self.waits.clear()

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Around what exchanges."""
        places = [(dist.ProcessGroup, name, self._counting) for name in _ENTERED]
        places += [(dist.Work, "wait", self._timing), (SlotLayers, "wait", self._timing)]
        # As the class holds it: what it gives when it is asked no longer knows its object.
        held = [(owner, name, vars(owner)[name]) for owner, name, _ in places if name in vars(owner)]
        for owner, name, through in places:
            if name in vars(owner):
                setattr(owner, name, through(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, original in held:
                setattr(owner, name, original)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*given: Any, **named: Any) -> Any:
            with _Seen(self.counted, self._lock):
                return original(*given, **named)

        return self._timing(entered)

    def _timing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            if getattr(self._here, "inside", False):  # one entrance may lead to another
                return original(*given, **named)
            self._here.inside, started = True, time.perf_counter()
            try:
                return original(*given, **named)
            finally:
                self._here.inside = False
                if threading.get_ident() == self._waits:
                    self.waits.append(time.perf_counter() - started)

        return timed


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself (Linux only): 0 where that is not known."""
    try:
        lines = [line.split() for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines()]
    except FileNotFoundError:
        return 0
    return next((int(line[9]) for line in lines if line and line[0] == "lo:"), 0)
