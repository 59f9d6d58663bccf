"""What the ranks of a run decide together when memory runs out on one of them: whether, and with which change.

All run again what they do at the same time, with the changes of all that ran out of memory. Batches whose results do
not depend on them (of an evaluation, of answers) are cut by each rank as its own memory demands, except where ranks
hold the experts together, and need each other in every pass.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from expertune.distributed.mesh import AbandonedError, Ranks
from expertune.experts.module import in_lockstep, parallel_of
from expertune.kernels import workspace
from expertune.placement.experts import placement_of
from expertune.placement.out_of_memory import in_one_line, is_out_of_memory

Phase = Literal["preflight", "optimizer", "training", "evaluation", "generation", "checkpoint"]
T = TypeVar("T")

# A fallback that a rank has chosen: the setting's name and value, and what the allocator reported.
Choice = tuple[str, int, str]

# What an attempt reports in place of the allocator's words where another rank has ended the pass.
ELSEWHERE = "on another rank"

_TOGETHER: tuple[Phase, ...] = ("preflight", "optimizer", "training")
_IN_LOCKSTEP: tuple[Phase, ...] = (*_TOGETHER, "evaluation", "generation")


def attempt(do: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `do` returns, or the allocator's report (or `ELSEWHERE`); what a failed attempt has left is freed."""
    try:
        return do(), None
    except AbandonedError:
        report = ELSEWHERE
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        report = in_one_line(error)
    # Not inside the except block: there the error's traceback holds every tensor of the failed attempt.
    gc.collect()
    workspace.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None, report


class Votes:
    """One rank's part in these decisions; of one process each is its own.

    Args:
        model: the model, adapted or not.
        ranks: the run's processes.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._in_lockstep, self._parallel = in_lockstep(model), parallel_of(model)
        self._together = _IN_LOCKSTEP if self._in_lockstep else _TOGETHER

    def finish_exchanges(self, phase: Phase, error: str | None) -> str | None:
        """Do this rank's part of exchanges that it ran out of memory in; the allocator's report where it cannot."""
        if self._parallel is None or phase not in self._together or error in (None, ELSEWHERE):
            return None
        return attempt(self._parallel.finish)[1]

    def failed(self, phase: Phase, error: str | None) -> bool:
        """Whether something has to be run again: because memory ran out here, or on any rank that does the same.

        Args:
            phase: what was attempted.
            error: what `attempt` reported.
        """
        if phase not in self._together:
            return error is not None
        failed = error == ELSEWHERE or self._ranks.any(error is not None)
        placement = placement_of(self._model) if failed and self._in_lockstep else None
        if placement:
            placement.drop_loaded()  # all begin again with the same layers under way: none
        return failed

    def choices(self, phase: Phase, own: Sequence[Choice]) -> Sequence[Choice]:
        """The fallbacks that all ranks use, from those that this one has chosen: the strictest of each name."""
        if phase not in self._together or not self._ranks.several:
            return own
        chosen: dict[str, Choice] = {}
        for rank, of_rank in enumerate(self._ranks.gather(own)):
            for name, value, text in of_rank:
                if name not in chosen or value < chosen[name][1]:
                    chosen[name] = name, value, f"on rank {rank}: {text}"
        return list(chosen.values())

    def is_last(self, phase: Phase, nothing_left: bool) -> bool:
        """Whether nothing is left to change on a rank: what is held where may differ between machines."""
        return self._ranks.any(nothing_left) if phase in self._together else nothing_left

    def num_idle(self, num_parts: int) -> int:
        """How many more parts another rank has of a batch that is cut: ranks in lockstep compute equally often."""
        if not self._in_lockstep:
            return 0
        self._ranks.proceed()
        return max(self._ranks.gather(num_parts)) - num_parts

    def wait(self) -> None:
        """Let the rank that ran out of memory end first, and say why."""
        self._ranks.wait()
