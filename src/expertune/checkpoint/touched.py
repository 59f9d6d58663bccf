"""Memory that threads have touched before it is written to, while the disk is waited for.

The first touch of a page is what takes the time of reading into fresh memory: 0.1 s a gigabyte on a machine of its own,
and more than a second in a virtual machine that has its pages back from the host one by one. Reading into it comes
after that, and so it goes on while the disk brings what is read next.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from expertune.checkpoint.reader import Memory
from expertune.kernels.huge_pages import ask_for_huge_pages

# Of which each touches a block of its own: a machine's host gives its pages back faster to two.
_THREADS = 2

# Less is handed out as it comes.
LEAST_BYTES = 4 * 2**20

# What is touched before it is asked for, so that a model that does not fit is not allocated before it is read.
_AHEAD_BYTES = 2**30

_PAGE_BYTES = 4096


class Touched(Memory):
    """Blocks of fresh memory, in the order in which they were announced; each is its taker's own.

    Args:
        sizes: bytes of the blocks that will be asked for. Small ones are made when they are asked for, and so is one of
            another size than the next.
        touching: the threads.
    """

    def __init__(self, sizes: Iterable[int], touching: ThreadPoolExecutor) -> None:
        super().__init__()
        self._left = deque(size for size in sizes if size >= LEAST_BYTES)
        self._touching = touching
        self._blocks: deque[tuple[int, Future[Tensor]]] = deque()
        self._ahead()

    def take(self, nbytes: int) -> Tensor:
        """Uninitialized uint8 [nbytes], which shares memory with nothing."""
        if not self._blocks or self._blocks[0][0] != nbytes:
            return Memory().take(nbytes)
        block = self._blocks.popleft()[1].result()
        self._ahead()
        return block

    def _ahead(self) -> None:
        while self._left and sum(size for size, _ in self._blocks) < _AHEAD_BYTES:
            size = self._left.popleft()
            self._blocks.append((size, self._touching.submit(_touch, size)))


def _touch(nbytes: int) -> Tensor:
    block = ask_for_huge_pages(torch.empty(nbytes, dtype=torch.uint8))
    for piece in block.split(2**26):  # of so few pages that torch shares them out to no other threads
        piece[::_PAGE_BYTES].zero_()
    return block


@contextmanager
def touched(sizes: Iterable[int]) -> Iterator[Touched]:
    """`Touched` of these sizes, and threads for it while the block runs."""
    with ThreadPoolExecutor(min(_THREADS, torch.get_num_threads())) as touching:
        try:
            yield Touched(sizes, touching)
        finally:
            touching.shutdown(cancel_futures=True)
