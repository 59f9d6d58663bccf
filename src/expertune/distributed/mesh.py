"""The processes of a run as one group, and all that they exchange.

Of one process each method below is the identity, and nothing of torch.distributed is touched: callers need not ask how
many there are. Every method that exchanges something is called by all ranks, in the same order.
"""

import gc
import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from expertune.distributed.output import LastWords, open_board
from expertune.distributed.processes import Launch, launched
from expertune.distributed.shares import BUCKET_BYTES
from expertune.errors import ConfigError

T = TypeVar("T")

# Seconds that ranks wait for each other: transformers' own default of `ddp_timeout`.
_TIMEOUT_S = 1800.0


class AbandonedError(Exception):
    """Another rank cannot finish the pass that all of them are in."""


class Ranks:
    """One process's view of the run's processes.

    Args:
        launch: which process this is.
        last_words: what ranks leave each other when they end; None for one process.
        control: the group for small messages between CPUs; None means torch's default group.
        timeout: how long ranks wait for each other; None for one process.

    Attributes:
        rank: its number.
        world_size: how many there are.
        local_rank: its number on this machine.
        local: the ranks on this machine, by their numbers.
    """

    def __init__(
        self,
        launch: Launch | None = None,
        last_words: LastWords | None = None,
        control: "dist.ProcessGroup | None" = None,
        timeout: timedelta | None = None,
    ) -> None:
        launch = launch or Launch()
        self.rank, self.world_size, self.local_rank = launch.rank, launch.world_size, launch.local_rank
        self._last_words, self._control, self._timeout = last_words, control, timeout
        self._ends: list[Callable[[], None]] = []
        machine = _machine()
        self.local = [rank for rank, its in enumerate(self.gather(machine)) if its == machine]

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run directory, prints and tracks: rank 0 alone does."""
        return self.rank == 0

    def on_main(self, do: Callable[[], T]) -> T | None:
        """What `do` returns on rank 0; elsewhere nothing is done."""
        return do() if self.writes else None

    def new_group(self, ranks: list[int] | None = None) -> dist.ProcessGroup:
        """Another group, of some ranks or of all, in which the order of messages is its own; all ranks call this.

        They wait as long as in the first; in torch's own groups of a device mesh they would for half an hour.
        """
        return dist.new_group(ranks, timeout=self._timeout)

    def at_end(self, close: Callable[[], None]) -> None:
        """Have a function called when these processes part."""
        self._ends.append(close)

    def close(self) -> None:
        """Call what `at_end` was given."""
        while self._ends:
            self._ends.pop()()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order; any that can be pickled."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on all ranks; it is called there alone."""
        if not self.several:
            return make()
        held: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(held, src=0, group=self._control)
        return held[0]

    def spread(self, items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[T]]) -> list[T]:
        """What `work` makes of items, one for each; every rank works on as many (see `rounds`)."""
        done = self.gather(work([item for item, _ in self.rounds(items)]))
        return [done[index % self.world_size][index // self.world_size] for index in range(len(items))]

    def rounds(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's items, and whether each counts: as many on all ranks, where one would have none the first again.

        Ranks that exchange something in the work on an item have to do it equally often.
        """
        for start in range(0, len(items), self.world_size):
            counts = start + self.rank < len(items)
            yield items[start + self.rank if counts else 0], counts

    def wait(self) -> None:
        """Return when all ranks have come here."""
        self.gather(None)

    def any(self, holds: bool) -> bool:
        """Whether something holds on one rank or more."""
        return self.total([holds])[0] > 0 if self.several else holds

    def proceed(self) -> None:
        """Go on with a pass of a model whose experts ranks hold together: called before each exchange in its layers.

        Exchanges elsewhere have no such vote: `average`, `copy`, the norm of gradients, and tensors that become whole
        for a file.

        A rank that cannot go on calls `any(True)` in place of its next `proceed`, or of the `any` after the pass.

        Raises:
            AbandonedError: a rank has done so, and all of them leave the pass here.
        """
        if self.any(False):
            raise AbandonedError

    def begin_pass(self, needed: bool) -> bool:
        """Whether any rank needs one more pass of such a model, so that all take one.

        Called before each pass where ranks need different numbers of them, and once more when none is needed.

        Raises:
            AbandonedError: see `proceed`.
        """
        self.proceed()
        return self.any(needed)

    def total(self, figures: Sequence[float]) -> list[float]:
        """Sums over the ranks, figure by figure."""
        if not self.several:
            return list(figures)
        summed = torch.tensor(figures, dtype=torch.float64)
        dist.all_reduce(summed, group=self._control)
        return summed.tolist()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over the ranks: each rank has the same shapes and dtypes, in one order."""
        if self.several:
            sum_and_divide(tensors, self.world_size)

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of rank 0, in place."""
        if self.several:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def require_same(self, what: Mapping[str, Any]) -> None:
        """Refuse ranks that do not start from the same.

        Args:
            what: values that JSON can hold, by the name that a message gives them; a mapping is compared key by key.

        Raises:
            ConfigError: on all ranks; names what differs, and where.
        """
        if not self.several:
            return
        digests = self.gather({name: _digest(value) for name, value in _flat(what).items()})
        others = [
            (rank, sorted(name for name in {**digests[0], **held} if digests[0].get(name) != held.get(name)))
            for rank, held in enumerate(digests)
        ]
        if found := [f"rank {rank}: {', '.join(names[:5])}" for rank, names in others if names]:
            raise ConfigError(
                f"the processes do not start from the same. Other than on rank 0 are {'; '.join(found[:8])}. Every "
                "process needs the same command, packages, model and data files"
            )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Around what may fail on one rank: all ranks end, and each error is said once, with its rank.

        Raises:
            RankError: another rank has ended, which says why itself if it can.
        """
        if self._last_words is None:
            yield
            return
        with self._last_words.said():
            yield


@contextmanager
def open_ranks(timeout_s: Any = None) -> Iterator[Ranks]:
    """The processes that a launcher has started: one without a launcher.

    A group that the program has made itself (Ray does) is used and stays; one that is made here ends with the block.

    Args:
        timeout_s: seconds that ranks wait for each other before all of them end; for what is no such number, which the
            check of the run file refuses later, the default.

    Raises:
        ConfigError: the launcher's variables are half set, or the others cannot be reached.
    """
    launch = launched()
    if launch.world_size == 1:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"this is one of {dist.get_world_size()} processes of a torch.distributed group, but the environment "
                "does not say so; start them by torchrun"
            )
        yield Ranks()
        return
    seconds = float(timeout_s) if isinstance(timeout_s, int | float) and timeout_s > 0 else _TIMEOUT_S
    timeout, on_gpu = timedelta(seconds=seconds), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    made, control = not dist.is_initialized(), None
    board = open_board(launch, timeout)
    # A program may have several runs, one after the other.
    board = dist.PrefixStore(f"run {board.add(f'runs of {launch.rank}', 1)}", board)
    last_words = LastWords(board, launch, seconds)
    ranks = None

    def close() -> None:
        if ranks is not None:
            ranks.close()
        gc.collect()
        if made and dist.is_initialized():
            _abort()

    last_words.close = close
    try:
        with last_words.said():
            if made:
                # Small messages travel between CPUs, so that a rank that has ended is noticed at once.
                backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
                # NCCL connects at once and to this GPU, not when memory may be full.
                device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
                its = (launch.world_size, launch.rank, board)
                dist.init_process_group(backend, None, timeout, *its, device_id=device)
            elif on_gpu:
                control = dist.new_group(backend="gloo", timeout=timeout)
            ranks = Ranks(launch, last_words, control, timeout)
            yield ranks
    except BaseException:
        close()
        last_words.linger()
        raise
    ranks.close()
    if made:
        dist.destroy_process_group()


def sum_and_divide(tensors: Iterable[Tensor], divisor: int, group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors by their sums over a group (None means all ranks), divided by a number."""
    for bucket in _buckets(tensors):
        flat = parameters_to_vector(bucket)
        dist.all_reduce(flat, group=group)
        vector_to_parameters(flat.div_(divisor), bucket)


def _abort() -> None:
    """Close all connections, so that ranks which still wait for this one notice.

    `destroy_process_group` would first let transfers end that NCCL has begun, and those with a rank that has failed
    never do. torch has no public function that gives them up: this one was read in 2.13.
    """
    dist.distributed_c10d._abort_process_group()


def _machine() -> tuple[str, str]:
    """This machine's name, and what its kernel drew when it started: several may have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text(encoding="ascii").strip() if boot.exists() else ""


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that are sent together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in _flat({str(k): v for k, v in value.items()}).items()}
        else:
            flat[name] = value
    return flat


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
