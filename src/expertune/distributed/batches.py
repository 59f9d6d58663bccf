"""A rank's part of each batch of the whole run.

accelerate gives each rank whole batches, and repeats examples where they run out before every rank has one. Here a
batch of the whole run is the same examples as one process would take, each once, and is cut into parts of nearly one
size: a rank may have none. Attributes of accelerate's sampler were read in 1.10 to 1.15; transformers' own Trainer sets
the same ones for its sampler that knows of ranks.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler

from expertune.distributed.mesh import Ranks


class RankBatches(BatchSampler):
    """A rank's part of each batch that the ranks take together; all ranks have as many, of which some may be empty.

    Args:
        batches: gives batches of one rank's size, of all examples.
        ranks: the processes.
    """

    def __init__(self, batches: BatchSampler, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sampler: Any = batches.sampler  # accelerate tells it of each epoch
        self.batch_size = batches.batch_size * ranks.world_size
        self.drop_last = batches.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        # The order may be drawn by chance, and what chance gives is each rank's own by then.
        order = self.ranks.share(lambda: list(self.sampler))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield batch[self._bound(batch, self.ranks.rank) : self._bound(batch, self.ranks.rank + 1)]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def _bound(self, batch: list[int], rank: int) -> int:
        """Where a rank's part of a batch begins; the first ranks have one more where it does not divide."""
        each, more = divmod(len(batch), self.ranks.world_size)
        return rank * each + min(rank, more)


def take_parts(loader: Any, ranks: Ranks) -> None:
    """Have a loader that accelerate has prepared give this rank its part of each batch of the whole run."""
    shard = loader.batch_sampler
    shard.batch_sampler = RankBatches(shard.batch_sampler, ranks)
    # From here on it passes batches on as they are.
    shard.batch_size, shard.num_processes, shard.process_index, shard.even_batches = None, 1, 0, False
