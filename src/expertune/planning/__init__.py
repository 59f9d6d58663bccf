"""Will it fit, where are the experts held, and how long does a step take? Before a weight is read.

The way through the room: `source.py` reads config and headers, `inventory.py` counts shapes and exact bytes,
`settings.py` reads what the run file says of memory, `memory.py` and `layer_memory.py` have one function for each
component of the peak, `placement.py` chooses where experts are held, `micro_batch.py` how a step's examples run,
`kept.py` what layers keep for backward, `fit.py` says what makes a run fit, `devices.py` knows budgets and rates,
`speed.py` how long a step takes, `duration.py` how long a whole run, and `disk.py` what is on the disk. Of several
ranks, `distribution.py` says how they can hold the experts, `communication.py` what they send, `ranks.py` which way is
taken. `plan.py` makes all of it one plan, of the rank that holds most, and `table.py` shows it.
"""

from expertune.planning.micro_batch import MicroBatch
from expertune.planning.plan import make_plan
from expertune.planning.result import Plan

__all__ = ["MicroBatch", "Plan", "make_plan"]
