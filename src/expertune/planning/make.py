"""A plan for a program that has a device of torch at hand; `expertune.plan` needs no torch for its arguments."""

import torch

from expertune.config import RunConfig
from expertune.config.arguments import checked
from expertune.planning.devices import Machine
from expertune.planning.plan import Started, plan_for
from expertune.planning.result import Plan


@checked
def make_plan(
    config: RunConfig,
    device: str | torch.device | None = None,
    started: Started | None = None,
    *,
    gpu: str | None = None,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a run. Reads config.json and safetensors headers, no weights.

    Args:
        config: the run.
        device: `cpu` or `cuda`, to plan for another machine than this one (`memory_budget` then says what it has);
            None plans for the device that a run would take here.
        started: for a run that resumes, what it began with; None chooses.
        gpu: a GPU of the table in `expertune.gpus` in place of `device`, or `cuda` for any other.
        memory: memory to plan for, as `memory_budget`, which it stands above.
        trust_remote_code: run Python that ships with the model.

    Raises:
        ConfigError: see `plan_for`; or an unknown GPU, or no way to know the memory of `device`.
        CheckpointError: see `plan_for`.
        UnsupportedModelError: see `plan_for`.
    """
    return plan_for(config, Machine.of(config, device, gpu, memory), started, trust_remote_code)
