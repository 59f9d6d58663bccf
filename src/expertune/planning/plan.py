"""A run's plan: what it needs, and whether it is there."""

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import RenderableType

from expertune.checkpoint.adapter_folder import require_adapter_folder
from expertune.checkpoint.load import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.targets import ResolvedTargets, resolve_targets
from expertune.config import RunConfig, check_training_arguments
from expertune.config.arguments import checked
from expertune.errors import DoesNotFitError
from expertune.placement.experts import Location
from expertune.planning import table
from expertune.planning.devices import Machine
from expertune.planning.disk import Disk, count_disk
from expertune.planning.fit import Change, as_yaml, find_changes
from expertune.planning.inventory import FrozenWeights, Parameters, count_parameters, take_inventory
from expertune.planning.memory import Memory, estimate_memory
from expertune.planning.micro_batch import MicroBatch, choose_micro_batch
from expertune.planning.placement import PlacementChooser, PlannedPlacement
from expertune.planning.settings import Workload, read_workload
from expertune.planning.source import find_config, read_source
from expertune.planning.speed import StepTime, step_time


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run needs, and whether it is there.

    Attributes:
        model: folder or hub id, as in the run file.
        architecture: class of the transformers model.
        device: `cpu` or `cuda`.
        compute_dtype: dtype of the GEMMs, e.g. `bfloat16`.
        parameters: numbers of parameters.
        weights: exact bytes of the base model as it is held.
        micro_batch: how the examples of a step run.
        memory: peak memory by component and phase, with these micro-batches and this placement.
        planned: where the experts of each layer are held, and why.
        budget_bytes: memory that the run may use.
        what_to_change: changes that lower the peak, cheapest first; empty where the run fits. No micro-batches are
            merged in their peaks.
        disk: sizes of files.
        time: how long a step takes; None where nothing is known of the device's speed.
        gpu: the GPU of the table that was planned for.
        notes: what the plan could not look at.
    """

    model: str
    architecture: str
    device: str
    compute_dtype: str
    parameters: Parameters
    weights: FrozenWeights
    micro_batch: MicroBatch
    memory: Memory
    planned: PlannedPlacement
    budget_bytes: int
    what_to_change: tuple[Change, ...]
    disk: Disk
    time: StepTime | None
    gpu: str | None
    notes: tuple[str, ...]

    @property
    def placement(self) -> Mapping[str, Location]:
        """Where each experts module's bytes are held, by dotted name."""
        return self.planned.locations

    @property
    def changed_settings(self) -> dict[str, Any]:
        """All changes as dotted keys of the run file, of a key that is changed twice the last; empty where it fits."""
        return {key: value for change in self.what_to_change for key, value in change.settings.items()}

    @property
    def yaml(self) -> str:
        """All changes as lines of a run file."""
        return as_yaml(self.changed_settings)

    @property
    def smallest_peak_bytes(self) -> int:
        """The peak with all changes made."""
        return self.what_to_change[-1].peak_bytes if self.what_to_change else self.memory.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the budget."""
        return self.memory.peak_bytes <= self.budget_bytes

    def require_fit(self) -> "Plan":
        """Return the plan if the run fits.

        Raises:
            DoesNotFitError: it does not; the message shows the plan and what to change.
        """
        if not self.fits:
            raise DoesNotFitError(f"{self.model} does not fit: {table.shortfall(self)}\n\n{table.as_text(self)}")
        return self

    def __repr__(self) -> str:
        peak, budget = table.size(self.memory.peak_bytes), table.size(self.budget_bytes)
        return f"Plan({self.model!r}, peak {peak} of {budget}, {'fits' if self.fits else 'does not fit'})"

    def _repr_html_(self) -> str:
        """The tables, for a notebook."""
        return f"<pre>{html.escape(table.as_text(self, width=100))}</pre>"

    def render(self) -> RenderableType:
        """The plan for `rich.console.Console.print`."""
        return table.render(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; sizes are in bytes, and keys that hold one end in `_bytes`."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "parameters": {**asdict(self.parameters), "line": self.parameters.line},
            "weights": {"frozen_bytes": self.weights.frozen_bytes, **asdict(self.weights)},
            "micro_batch": asdict(self.micro_batch),
            "memory": {
                "peak_bytes": self.memory.peak_bytes,
                "moment": self.memory.phase,
                "components": dict(self.memory.components),
                "moments": self.memory.totals,
                "host_bytes": self.memory.host_bytes,
            },
            "placement": {
                "layers": self.planned.counts,
                "reason": self.planned.reason,
                "slot_bytes": self.planned.slot_bytes,
                "modules": dict(self.placement),
            },
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "what_to_change": [
                {"lines": change.lines, "yaml": change.yaml, **asdict(change)} for change in self.what_to_change
            ],
            "yaml": self.yaml,
            "smallest_peak_bytes": self.smallest_peak_bytes,
            "disk": asdict(self.disk),
            "time": self.time.to_json() if self.time else None,
            "gpu": self.gpu,
            "notes": list(self.notes),
        }


@checked
def make_plan(
    config: RunConfig,
    device: str | torch.device | None = None,
    previously_merged: int | None = None,
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
        previously_merged: for a run that resumes, how many micro-batches it ran as one; None chooses.
        gpu: a GPU of the table in `expertune.planning.devices` in place of `device`, or `cuda` for any other.
        memory: memory to plan for, as `memory_budget`, which it stands above.
        trust_remote_code: run Python that ships with the model.

    Raises:
        ConfigError: no config.json, an unknown target, training argument or GPU, a placement that cannot be, or no way
            to know the memory of `device`.
        CheckpointError: a damaged header, tensors that do not belong to the config, or no adapter in `lora.init_from`.
        UnsupportedModelError: no experts that can be packed, or a checkpoint that is quantized in a way that cannot be
            read.
    """
    check_training_arguments(config.training, config.where)
    if config.lora.init_from:
        require_adapter_folder(config.lora.init_from)
    return _Planner(config, Machine.of(config, device, gpu, memory), trust_remote_code).plan(previously_merged)


class _Planner:
    """One run's model on one machine; runs that are tried in its place differ in settings alone."""

    def __init__(self, config: RunConfig, machine: Machine, trust_remote_code: bool) -> None:
        self.config, self.machine, self.device = config, machine, machine.device.type
        folder, on_hub = find_config(config.model, config.revision, trust_remote_code)
        self.model = build_meta_model(folder, machine.compute_dtype, trust_remote_code)
        # Creating parameters on the meta device separates those that the config ties.
        self.model.tie_weights()
        names = read_names(self.model)
        self.source = read_source(config, folder, on_hub, self.model, names)
        self.inventory = take_inventory(
            self.model, names, self.source.recipe, machine.compute_dtype, machine.expert_ranks
        )
        sizes, holds_nf4 = self.inventory.expert_bytes, self.source.holds_nf4
        self.chooser = PlacementChooser(sizes, self.device, holds_nf4, machine.is_here)
        self.targets: dict[str, ResolvedTargets] = {}

    def plan(self, previously_merged: int | None) -> Plan:
        """The plan of the run."""
        config, machine = self.config, self.machine
        micro_batch = self.micro_batch(previously_merged)
        runs = config.model_copy(update={"training": micro_batch.apply(config.training)})
        workload, placement = self.workload(runs), self.placement(runs)
        changes = tuple(find_changes(config, self.peak_bytes, machine.budget_bytes, self.device, self.chooser.lower()))
        memory = estimate_memory(workload, placement)
        rates = machine.rates(from_disk=placement.offloads_to("disk"))
        return Plan(
            model=config.model,
            architecture=type(self.model).__name__,
            device=self.device,
            compute_dtype=str(machine.compute_dtype).removeprefix("torch."),
            parameters=count_parameters(self.inventory, workload.targets),
            weights=self.inventory.weights,
            micro_batch=micro_batch,
            memory=memory,
            planned=placement,
            budget_bytes=machine.budget_bytes,
            what_to_change=changes,
            disk=count_disk(config, workload, self.source),
            time=step_time(workload, placement, micro_batch.accumulation, rates) if rates else None,
            gpu=machine.gpu.name if machine.gpu else None,
            notes=self.source.notes + self.hints(memory.peak_bytes, changes),
        )

    def micro_batch(self, previously_merged: int | None) -> MicroBatch:
        """How a step's micro-batches run."""
        as_written = self.placement(self.config)
        # Nothing is offloaded for the sake of a larger batch; where something has to be, more may.
        kept = None if as_written.offloaded else as_written
        budget = self.machine.budget_bytes

        def peak_of(run: RunConfig) -> int:
            return self.peak_bytes(run, kept)

        return choose_micro_batch(self.config, self.model, self.device, budget, peak_of, previously_merged)

    def peak_bytes(self, run: RunConfig, placement: PlannedPlacement | None = None) -> int:
        """Peak memory of a run, in the placement that it will have unless another is given."""
        return estimate_memory(self.workload(run), placement or self.placement(run)).peak_bytes

    def placement(self, run: RunConfig) -> PlannedPlacement:
        """Where a run's experts are held."""
        return self.chooser.choose(run, self.machine.budget_bytes, lambda tried: self.peak_bytes(run, tried))

    def workload(self, run: RunConfig) -> Workload:
        """What a run file says of memory; targets are looked up once, since many run files are tried."""
        key = run.lora.model_dump_json()
        if key not in self.targets:
            self.targets[key] = resolve_targets(self.model, self.inventory.names, run.lora)
        return read_workload(run, self.inventory, self.targets[key], self.device, self.machine.compute_dtype)

    def hints(self, peak: int, changes: tuple[Change, ...]) -> tuple[str, ...]:
        """On a CPU experts can be offloaded to a disk only from an NF4 folder: what that would give a run."""
        if peak <= self.machine.budget_bytes or self.device != "cpu" or self.source.holds_nf4:
            return ()
        on_disk = self.chooser.offloading(list(self.inventory.expert_bytes), "disk")
        saved = on_disk.offloaded_bytes - on_disk.slot_bytes
        peak = changes[-1].peak_bytes if changes else peak
        shown = table.size(peak - saved)
        if saved <= 0 or shown == table.size(peak):
            return ()
        return (
            "from a folder that `expertune quantize` has written, experts can be offloaded to the disk (placement: "
            f"disk); with all changes above, the peak would be {shown}",
        )
