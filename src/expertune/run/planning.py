"""What `expertune.plan` makes of a run file; nothing that trains is imported for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertune.config import RunConfig
from expertune.config.arguments import checked
from expertune.planning import Plan
from expertune.planning.devices import Machine
from expertune.planning.examples import read_lengths
from expertune.planning.plan import plan_for
from expertune.planning.recall import may_recall, recall_lengths, recall_shapes
from expertune.run.source import load_config


@checked
def plan(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    memory: str | int | None = None,
    gpu: str | None = None,
    trust_remote_code: bool = False,
    devices: int | None = None,
) -> Plan:
    """What a run needs, tensor by tensor, whether it fits, and how long a step takes; no weights are loaded.

    Args:
        config: a run file, a record of a run or a run directory; or a run file's content as a mapping or RunConfig.
        overrides: `section.key=value` strings on top of it.
        memory: memory to plan for, e.g. `24GB`, above the run file's `memory_budget`.
        gpu: a GPU to plan for without having it, e.g. `rtx-4090`.
        trust_remote_code: run Python that ships with the model. No run file can ask for it.
        devices: how many devices to plan for, each with a process; None means the processes that a launcher has
            started, or one.

    Raises:
        ExpertuneError: the run file or the model cannot be read.
    """
    config = load_config(config, overrides, starts=False)
    machine = Machine.of(config, gpu=gpu, memory=memory, devices=devices)
    recalls = may_recall(trust_remote_code)
    made = plan_for(config, machine, trust_remote_code=trust_remote_code, read=recall_shapes if recalls else None)
    return made.timed(read_lengths(config, trust_remote_code, recall_lengths if recalls else None))
