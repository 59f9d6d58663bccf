"""Figures beside the loss, such as rewards: means over the examples of a step or an evaluation."""

from typing import NamedTuple

from torch import Tensor

from expertune.distributed.mesh import Ranks


class LossOutput(NamedTuple):
    """A batch's loss, and its figures.

    Attributes:
        loss: the mean over its examples, as TRL has it.
        num_examples: how many it has.
        figures: by TRL's names, each with the number of examples that it is the mean of.
    """

    loss: Tensor
    num_examples: int
    figures: dict[str, tuple[float, int]]


class Figures:
    """Sums up figures, each over as many examples as it is known of.

    Args:
        ranks: the processes that share the examples out.

    Attributes:
        names: of all figures so far.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.names: list[str] = []
        self._ranks = ranks or Ranks()
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, mean: float, count: float = 1) -> None:
        """Add the mean of a figure over some examples; of none, it is no number and does not count."""
        if count:
            self._add(name, mean * count, count)

    def add_up(self) -> None:
        """Make the sums those of all ranks, which call this together."""
        of_ranks = self._ranks.gather(self._sums)
        self.clear()
        for name, (total, counted) in (each for sums in of_ranks for each in sums.items()):
            self._add(name, total, counted)

    def _add(self, name: str, total: float, counted: float) -> None:
        if name not in self.names:
            self.names.append(name)
        earlier, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = earlier + total, count + counted

    def clear(self) -> None:
        """Forget what was added: it is computed again."""
        self._sums = {}

    def take(self) -> dict[str, float]:
        """The means by name; summing up starts again."""
        means = {name: total / counted for name, (total, counted) in self._sums.items()}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():  # also where no example has both
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        self.clear()
        return means
