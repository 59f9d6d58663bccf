"""Will it fit, where are the experts held, and how long does a step take? Before a weight is read.

The way through the room: `source.py` reads config and headers, and `reading.py` a model's shapes as plain values,
which `recall.py` keeps for the next plan; from there on nothing imports torch. `inventory.py` counts them,
`settings.py` reads what the run file says of memory, `memory.py` and `layer_memory.py` have one function for each
component of the peak, `placement.py` chooses where experts are held, `micro_batch.py` how a step's examples run,
`kept.py` what layers keep for backward, `fit.py` says what makes a run fit, `devices.py` knows budgets and rates,
`speed.py` how long a step takes, `examples.py` counts a run's examples, `duration.py` says how long a whole run takes,
and `disk.py` what is on the disk. Of several ranks, `distribution.py` says how they can hold the experts,
`communication.py` what they send, `ranks.py` which way is taken. `plan.py` makes all of it one plan, of the rank that
holds most, and `table.py` shows it.
"""

from typing import TYPE_CHECKING, Any

from expertune.planning.micro_batch import MicroBatch
from expertune.planning.result import Plan

if TYPE_CHECKING:
    from expertune.planning.make import make_plan

__all__ = ["MicroBatch", "Plan", "make_plan"]

if not TYPE_CHECKING:  # which would take every name for one of the package's

    def __getattr__(name: str) -> Any:
        if name == "make_plan":  # which takes devices of torch
            from expertune.planning.make import make_plan

            return make_plan
        raise AttributeError(f"module 'expertune.planning' has no attribute {name!r}")
