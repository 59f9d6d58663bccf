"""A run's plan: what it needs, and whether it is there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import psutil
import torch
from rich.console import RenderableType
from transformers import PreTrainedModel

from expertune.checkpoint.adapter_folder import require_adapter_folder
from expertune.checkpoint.load import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.targets import ResolvedTargets, resolve_targets
from expertune.config import LoraSection, RunConfig, check_training_arguments, parse_size
from expertune.errors import ConfigError, DoesNotFitError, option
from expertune.placement.device import default_device, resolve_compute_dtype
from expertune.placement.experts import Location
from expertune.planning import table
from expertune.planning.devices import Device, device_of_this_name, find_device
from expertune.planning.disk import Disk, count_disk
from expertune.planning.fit import Change, Fitting, as_yaml
from expertune.planning.headers import find_config
from expertune.planning.inventory import (
    FrozenWeights,
    Inventory,
    Parameters,
    count_parameters,
    experts_bytes,
    take_inventory,
    weigh,
)
from expertune.planning.memory import Memory, estimate_memory
from expertune.planning.micro_batch import MicroBatch, choose_micro_batch
from expertune.planning.placement import PlacementChooser, PlannedPlacement
from expertune.planning.settings import Settings, read_settings, writes_answers
from expertune.planning.source import Source, read_source
from expertune.planning.speed import EFFICIENCY, Rates, StepTime, count_work, measured_rates, step_time, tabled_rates


@dataclass(frozen=True)
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
    time: StepTime | None = None
    gpu: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def placement(self) -> Mapping[str, Location]:
        """Where each experts module's bytes are held, by dotted name."""
        return self.planned.locations

    @property
    def yaml(self) -> str:
        """All changes as lines of a run file, of a key that is changed twice the last; empty where it fits."""
        return as_yaml({key: value for change in self.what_to_change for key, value in change.settings.items()})

    @property
    def smallest_peak_bytes(self) -> int:
        """The peak with all changes made."""
        return self.what_to_change[-1].peak_bytes if self.what_to_change else self.memory.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the budget."""
        return self.memory.peak_bytes <= self.budget_bytes

    @property
    def parameters_line(self) -> str:
        """Trainable and packed parameters in one line, as QLoRA tutorials print them."""
        return self.parameters.line

    def require_fit(self) -> "Plan":
        """Return the plan if the run fits.

        Raises:
            DoesNotFitError: it does not; the message shows the plan and what to change.
        """
        if not self.fits:
            raise DoesNotFitError(f"{self.model} does not fit: {table.shortfall(self)}\n\n{table.as_text(self)}")
        return self

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
                "slot_bytes": self.planned.offloading.slot_bytes,
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
    machine = Machine.of(config, device, gpu, memory)
    planner = _Planner.of(config, machine, trust_remote_code)
    micro_batch = planner.micro_batch(config, previously_merged)
    return planner.plan(config, micro_batch)


@dataclass(frozen=True)
class Machine:
    """The device that is planned for.

    Attributes:
        device: `cpu` or `cuda`.
        named: the GPU that was asked for by name.
        compute_dtype: dtype of the GEMMs.
        budget_bytes: memory that a run may use.
    """

    device: torch.device
    named: Device | None
    compute_dtype: torch.dtype
    budget_bytes: int

    @classmethod
    def of(
        cls, config: RunConfig, device: str | torch.device | None, gpu: str | None, memory: str | int | None
    ) -> "Machine":
        """The machine of `make_plan`'s arguments."""
        named = find_device(gpu) if gpu is not None else None
        target = torch.device("cuda") if named else default_device() if device is None else torch.device(device)
        budget = _budget(config, target, named, memory)
        return cls(target, named, _compute_dtype(config, target, named), budget)

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        return self.named is None and (self.device.type == "cpu" or torch.cuda.is_available())

    def rates(self, from_disk: bool) -> Rates | None:
        """What the device does in a second: by the table, or measured on a CPU."""
        if self.device.type == "cpu":
            return measured_rates(self.compute_dtype)
        named = self.named
        if named is None and torch.cuda.is_available():
            named = device_of_this_name(torch.cuda.get_device_name(self.device))
        return tabled_rates(named, from_disk) if named else None


@dataclass(frozen=True)
class _Planner:
    """One model on one machine; run files on it may differ in everything but these."""

    machine: Machine
    model: PreTrainedModel
    source: Source
    inventory: Inventory
    weights: FrozenWeights
    chooser: PlacementChooser

    @classmethod
    def of(cls, config: RunConfig, machine: Machine, trust_remote_code: bool) -> "_Planner":
        folder, on_hub = find_config(config.model, config.revision, trust_remote_code)
        model = build_meta_model(folder, machine.compute_dtype, trust_remote_code)
        # Creating parameters on the meta device separates those that the config ties.
        model.tie_weights()
        names = read_names(model)
        source = read_source(config, folder, on_hub, model, names)
        inventory = take_inventory(model, names, source.linears, writes_answers(config))
        held = source.double_quantization, source.scheme
        sizes = {name: experts_bytes(spec, *held) for name, spec in names.specs.items()}
        chooser = PlacementChooser(sizes, machine.device.type, source.holds_nf4, machine.is_here)
        return cls(machine, model, source, inventory, weigh(inventory, machine.compute_dtype, *held), chooser)

    def plan(self, config: RunConfig, micro_batch: MicroBatch) -> Plan:
        """The plan of a run with its micro-batches as they run."""
        runs = config.model_copy(update={"training": micro_batch.apply(config.training)})
        planned = self.placement(runs)
        targets, settings = self.targets(config.lora), self.settings(runs)
        parameters = count_parameters(self.inventory, targets)
        rates = self.machine.rates(from_disk=planned.offloading.location == "disk")
        work = count_work(self.inventory, targets, self.weights, settings, planned.offloading)
        device = self.machine.device.type
        fitting = Fitting(self.machine.budget_bytes, self.memory, device, self.chooser.lower())
        plan = Plan(
            model=config.model,
            architecture=type(self.model).__name__,
            device=device,
            compute_dtype=str(self.machine.compute_dtype).removeprefix("torch."),
            parameters=parameters,
            weights=self.weights,
            micro_batch=micro_batch,
            memory=self.memory(runs, planned),
            planned=planned,
            budget_bytes=self.machine.budget_bytes,
            what_to_change=tuple(fitting.changes(config)),
            disk=count_disk(config, self.source, self.weights, parameters.trainable, settings),
            time=step_time(work, micro_batch.accumulation, rates, EFFICIENCY[device]) if rates else None,
            gpu=self.machine.named.name if self.machine.named else None,
            notes=self.source.notes,
        )
        return plan if plan.fits or self.source.holds_nf4 or device != "cpu" else self._with_hint(plan)

    def micro_batch(self, config: RunConfig, previously_merged: int | None) -> MicroBatch:
        """How a step's micro-batches run."""
        as_written = self.placement(config)

        def memory_merged(run: RunConfig) -> Memory:
            # Nothing is offloaded for the sake of a larger batch; where something has to be, more may.
            return self.memory(run, None if as_written.offloading.offloaded_bytes else as_written)

        device, budget = self.machine.device.type, self.machine.budget_bytes
        return choose_micro_batch(config, self.model, device, budget, memory_merged, previously_merged)

    def memory(self, run: RunConfig, planned: PlannedPlacement | None = None) -> Memory:
        """Peak memory of a run, in the placement that it will have unless another is given."""
        planned = planned or self.placement(run)
        targets, settings = self.targets(run.lora), self.settings(run)
        return estimate_memory(self.inventory, targets, self.weights, settings, planned.offloading)

    def placement(self, run: RunConfig) -> PlannedPlacement:
        """Where a run's experts are held."""
        fixed = self.chooser.fixed(run)
        budget = self.machine.budget_bytes
        return fixed or self.chooser.fitting(budget, lambda planned: self.memory(run, planned).peak_bytes)

    def settings(self, run: RunConfig) -> Settings:
        """What a run file says of memory."""
        return read_settings(run, self.machine.device.type, self.machine.compute_dtype)

    def targets(self, lora: LoraSection) -> ResolvedTargets:
        """What an adapter changes; looked up once, since many run files are tried."""
        key = lora.model_dump_json()
        if key not in self._resolved:
            self._resolved[key] = resolve_targets(self.model, self.inventory.names, lora)
        return self._resolved[key]

    @cached_property
    def _resolved(self) -> dict[str, ResolvedTargets]:
        return {}

    def _with_hint(self, plan: Plan) -> Plan:
        """On a CPU experts can be offloaded to a disk only from an NF4 folder: note what that would give."""
        offloading = self.chooser.offloading(list(self.chooser.sizes), "disk")
        peak = plan.smallest_peak_bytes - offloading.offloaded_bytes + offloading.slot_bytes
        if peak >= plan.smallest_peak_bytes:
            return plan
        note = (
            "from a folder that `expertune quantize` has written, experts can be offloaded to the disk (placement: "
            f"disk); with all changes above, the peak would be {table.size(peak)}"
        )
        return replace(plan, notes=(*plan.notes, note))


def _compute_dtype(config: RunConfig, device: torch.device, named: Device | None) -> torch.dtype:
    elsewhere = named is not None or (device.type == "cuda" and not torch.cuda.is_available())
    if elsewhere and config.quantization.compute_dtype == "auto":
        # A plan for another machine: every NVIDIA generation since 2020 has bfloat16.
        return torch.bfloat16 if named is None or named.has_bfloat16 else torch.float16
    return resolve_compute_dtype(config.quantization.compute_dtype, device)


def _budget(config: RunConfig, device: torch.device, named: Device | None, memory: str | int | None) -> int:
    asked = memory if memory is not None else config.memory_budget
    if asked is not None and (named is None or memory is not None):
        return parse_size(asked)
    if named is not None:
        if not named.memory_bytes:
            raise ConfigError(f"gpu {named.name}: say how much memory it has, e.g. {option('memory', '24GB')}")
        return named.memory_bytes
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here to take the memory of; set memory_budget, e.g. 24GB")
    return int(torch.cuda.get_device_properties(device).total_memory)
