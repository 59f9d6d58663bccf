"""Will it fit, where are the experts held, and how long does a step take? Before a weight is read.

The way through the room: `headers.py` finds config and headers, `source.py` says what is 4-bit in them, `inventory.py`
counts shapes and exact bytes, `settings.py` reads what else decides memory, `memory.py` estimates the peak,
`placement.py` chooses where experts are held, `micro_batch.py` how a step's examples run, `fit.py` says what to change,
`speed.py` how long a step takes, `disk.py` what is on the disk; `plan.py` makes all of it one plan, and `table.py`
shows it. A plan is of one process and its device.
"""

from expertune.planning.fit import Change
from expertune.planning.inventory import FrozenWeights, Inventory, Parameters
from expertune.planning.memory import Memory
from expertune.planning.micro_batch import MicroBatch
from expertune.planning.plan import Plan, make_plan
from expertune.planning.settings import Settings
from expertune.planning.speed import StepTime

__all__ = [
    "Change",
    "FrozenWeights",
    "Inventory",
    "Memory",
    "MicroBatch",
    "Parameters",
    "Plan",
    "Settings",
    "StepTime",
    "make_plan",
]
