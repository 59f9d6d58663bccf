"""A run's plan: what it needs, and whether it is there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import RenderableType

from expertune.checkpoint.adapter_folder import require_adapter_folder
from expertune.checkpoint.load import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.targets import ResolvedTargets, most_selected, resolve_targets
from expertune.config import RunConfig, check_training_arguments
from expertune.config.arguments import checked
from expertune.config.training_keys import MUON
from expertune.errors import ConfigError, DoesNotFitError
from expertune.notebook.html import as_html
from expertune.placement.experts import Location
from expertune.planning import table
from expertune.planning.communication import Traffic
from expertune.planning.devices import Machine
from expertune.planning.disk import Disk, count_disk
from expertune.planning.duration import Lengths, Pace, RunTime
from expertune.planning.fit import Advice, Change, Room, as_yaml, find_advice
from expertune.planning.inventory import FrozenWeights, Inventory, Parameters, count_parameters, take_inventory
from expertune.planning.memory import Memory, estimate_memory
from expertune.planning.micro_batch import MicroBatch, choose_micro_batch
from expertune.planning.placement import PlacementChooser, PlannedPlacement
from expertune.planning.ranks import ModePlan, RanksPlan, choose_mode, count_traffic, possible_distributions
from expertune.planning.settings import Workload, read_workload
from expertune.planning.source import Source, find_config, read_source
from expertune.planning.speed import StepCost, StepTime, decomposition_flops
from expertune.run.progress import in_words
from expertune.train.muon import MuonSettings


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
        advice: what makes the run fit where it does not. No micro-batches are merged in its peaks.
        disk: sizes of files.
        time: how long a step takes; None where nothing is known of the device's speed.
        gpu: the GPU of the table that was planned for.
        notes: what the plan could not look at.
        ranks: of several ranks, what each holds and sends; all else is of the one that has the most. None for one.
        pace: how fast batches are; None where nothing is known of the device's speed.
        run_time: how long the whole run takes, see `timed`; None where nobody has counted the examples.
        objective: the run's.
        passes: what it computes beside a forward and a backward for each example, in words; empty for `sft`.
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
    advice: Advice
    disk: Disk
    time: StepTime | None
    gpu: str | None
    notes: tuple[str, ...]
    ranks: RanksPlan | None = None
    pace: Pace | None = None
    run_time: RunTime | None = None
    objective: str = "sft"
    passes: str = ""

    def timed(self, lengths: Lengths) -> "Plan":
        """The plan with the time of the whole run.

        Args:
            lengths: how many examples there are, and how long.
        """
        return replace(self, run_time=self.pace.run_time(lengths)) if self.pace else self

    @property
    def what_to_change(self) -> tuple[Change, ...]:
        """The cheapest changes that make the run fit; all that lower the peak where none do; empty where it fits."""
        return self.advice.changes

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
        return as_html(table.render(self))

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
            "alternatives": [
                {"lines": change.lines, "yaml": change.yaml, **asdict(change)} for change in self.advice.alternatives
            ],
            "yaml": self.yaml,
            "smallest_peak_bytes": self.smallest_peak_bytes,
            "disk": asdict(self.disk),
            "time": self.time.to_json() if self.time else None,
            "run": self.run_time.to_json() if self.run_time else None,
            "gpu": self.gpu,
            "notes": list(self.notes),
            "ranks": self.ranks.to_json() if self.ranks else None,
            **({"objective": self.objective, "passes": self.passes} if self.passes else {}),
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
        ConfigError: see `plan_for`; or an unknown GPU, or no way to know the memory of `device`.
        CheckpointError: see `plan_for`.
        UnsupportedModelError: see `plan_for`.
    """
    return plan_for(config, Machine.of(config, device, gpu, memory), previously_merged, trust_remote_code)


def plan_for(
    config: RunConfig,
    machine: Machine,
    previously_merged: int | None = None,
    trust_remote_code: bool = False,
    shapes: "Shapes | None" = None,
) -> Plan:
    """Plan a run on as many devices as a machine stands for; see `make_plan`.

    Args:
        config: the run.
        machine: what it is planned for.
        previously_merged: see `make_plan`.
        trust_remote_code: see `make_plan`.
        shapes: the run's model, where it has been read for another machine of this dtype; None reads it.

    Raises:
        ConfigError: no config.json, an unknown target or training argument, a placement that cannot be, or ranks that
            cannot share the experts out as the run file says.
        CheckpointError: a damaged header, tensors that do not belong to the config, or no adapter in `lora.init_from`.
        UnsupportedModelError: no experts that can be packed, or a checkpoint that is quantized in a way that cannot be
            read.
    """
    check_training_arguments(config.training, config.where, config.objective)
    if config.training.get("optim") == MUON:
        MuonSettings.parse(config.training.get("optim_args"))  # refuses what is wrong in it
    if machine.world_size > 1 and config.objective != "sft":
        raise ConfigError(
            f"objective: {config.objective} runs in one process, and {machine.world_size} were asked for; start one"
        )
    if machine.world_size > 1 and (config.is_calibrated or config.lora.init != "default"):
        key = f"lora.init: {config.lora.init}" if config.lora.init != "default" else "quantization.fit: calibrated"
        raise ConfigError(
            f"{key} is made by one process alone, and {machine.world_size} were asked for; remove the key"
        )
    if config.lora.init_from:
        require_adapter_folder(config.lora.init_from)
    shapes = shapes or read_shapes(config, machine.compute_dtype, trust_remote_code)
    planner = _Planner(config, machine, shapes, shapes.inventory)
    if machine.world_size == 1:
        return planner.plan(planner.find(previously_merged), None)
    distributions = possible_distributions(config, planner.workload(config), machine.world_size)
    planners = [replace(planner, inventory=shapes.inventory.on_ranks(each)) for each in distributions]
    found = [planner.find(previously_merged) for planner in planners]
    modes = tuple(planner.mode(each) for planner, each in zip(planners, found, strict=True))
    ranks = choose_mode(config.distributed.experts, modes, machine.link, machine.compared_links)
    chosen = modes.index(ranks.chosen)
    return planners[chosen].plan(found[chosen], ranks)


@dataclass(frozen=True)
class Shapes:
    """A model as far as a plan reads it: what its checkpoint says, and its shapes."""

    source: Source
    inventory: Inventory


def read_shapes(config: RunConfig, compute_dtype: torch.dtype, trust_remote_code: bool = False) -> Shapes:
    """Read a run's model; see `plan_for`."""
    folder, on_hub = find_config(config.model, config.revision, trust_remote_code)
    model = build_meta_model(folder, compute_dtype, trust_remote_code, shapes_only=True)
    # Creating parameters on the meta device separates those that the config ties.
    model.tie_weights()
    names = read_names(model)
    source = read_source(config, folder, on_hub, model, names)
    return Shapes(source, take_inventory(model, names, source.recipe, compute_dtype))


@dataclass(frozen=True)
class _Found:
    """What a run comes to."""

    micro_batch: MicroBatch
    workload: Workload
    placement: PlannedPlacement
    memory: Memory
    traffic: Traffic
    time: StepTime | None
    pace: Pace | None


@dataclass(frozen=True)
class _Planner:
    """One run's model on one machine; runs that are tried in its place differ in settings alone.

    Attributes:
        config: the run.
        machine: what it is planned for.
        shapes: the model in one process.
        inventory: the model as a rank holds it.
        targets: what adapters change, by `lora` section.
    """

    config: RunConfig
    machine: Machine
    shapes: Shapes
    inventory: Inventory
    targets: dict[str, ResolvedTargets] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self.machine.device.type

    def find(self, previously_merged: int | None) -> _Found:
        """What the run comes to."""
        micro_batch = self.micro_batch(previously_merged)
        runs = self.config.model_copy(update={"training": micro_batch.apply(self.config.training)})
        workload, placement = self.workload(runs), self.placement(runs)
        traffic, time = count_traffic(workload, micro_batch.accumulation), None
        pace = None
        if rates := self.machine.rates(from_disk=placement.offloads_to("disk")):
            of_step = StepCost(workload, placement, micro_batch.accumulation, rates, traffic, self.machine.link)
            time, pace = of_step.time(), Pace(runs, of_step)
        return _Found(micro_batch, workload, placement, estimate_memory(workload, placement), traffic, time, pace)

    def mode(self, found: _Found) -> ModePlan:
        """What is compared between ways to hold the experts."""
        return ModePlan(
            distribution=self.inventory.distribution,
            peak_bytes=found.memory.peak_bytes,
            experts_bytes=self.inventory.weights.experts_bytes,
            host_bytes=found.memory.host_bytes,
            fits=found.memory.peak_bytes <= self.machine.budget_bytes,
            offloads=bool(found.placement.offloaded),
            traffic=found.traffic,
            seconds=found.time.seconds if found.time else None,
        )

    def plan(self, found: _Found, ranks: RanksPlan | None) -> Plan:
        """The whole plan of what the run comes to."""
        config, machine, budget = self.config, self.machine, self.machine.budget_bytes
        chooser = self.chooser
        room = Room(budget, self.device, chooser.lower(), chooser.gains_by_quantizing)
        return Plan(
            model=config.model,
            architecture=type(self.inventory.model).__name__,
            device=self.device,
            compute_dtype=str(machine.compute_dtype).removeprefix("torch."),
            parameters=count_parameters(self.inventory, found.workload.targets),
            weights=self.inventory.weights,
            micro_batch=found.micro_batch,
            memory=found.memory,
            planned=found.placement,
            budget_bytes=budget,
            advice=find_advice(config, self.peak_bytes, room),
            disk=count_disk(config, replace(found.workload, inventory=self.shapes.inventory), self.shapes.source),
            time=found.time,
            gpu=machine.gpu.name if machine.gpu else None,
            notes=self.shapes.source.notes + self.hints(),
            ranks=ranks,
            pace=found.pace,
            objective=config.objective,
            passes=found.workload.passes.line,
        )

    @property
    def chooser(self) -> PlacementChooser:
        """Chooses where the experts that a rank holds lie."""
        sizes, holds_nf4 = self.inventory.expert_bytes, self.shapes.source.holds_nf4
        return PlacementChooser(sizes, self.device, holds_nf4, self.machine.host_bytes)

    def micro_batch(self, previously_merged: int | None) -> MicroBatch:
        """How a step's micro-batches run."""
        as_written = self.placement(self.config)
        # Nothing is offloaded for the sake of a larger batch; where something has to be, more may.
        kept = None if as_written.offloaded else as_written
        budget = self.machine.budget_bytes

        def peak_of(run: RunConfig) -> int:
            return self.peak_bytes(run, kept)

        return choose_micro_batch(self.config, self.inventory.model, self.device, budget, peak_of, previously_merged)

    def peak_bytes(self, run: RunConfig, placement: PlannedPlacement | None = None) -> int:
        """Peak memory of a run, in the placement that it will have unless another is given."""
        return estimate_memory(self.workload(run), placement or self.placement(run)).peak_bytes

    def placement(self, run: RunConfig) -> PlannedPlacement:
        """Where a run's experts are held."""
        workload, chooser = self.workload(run), self.chooser
        if run.model != self.config.model:  # the folder that `expertune quantize` is to write of it
            chooser = replace(chooser, holds_nf4=True)
        return chooser.choose(run, self.machine.budget_bytes, lambda tried: estimate_memory(workload, tried).peak_bytes)

    def workload(self, run: RunConfig) -> Workload:
        """What a run file says of memory; targets are looked up once, since many run files are tried."""
        key = run.lora.model_dump_json()
        if key not in self.targets:
            self.targets[key] = resolve_targets(self.inventory.model, self.inventory.names, run.lora)
        return read_workload(run, self.inventory, self.targets[key], self.device, self.machine.compute_dtype)

    def hints(self) -> tuple[str, ...]:
        """Why there is no time, and what of the adapter is known only when the run selects its experts."""
        lora = self.config.lora
        if lora.experts and lora.experts.share and not lora.experts.layers:
            counts = {spec.num_experts for spec in self.inventory.names.specs.values()}
            most = " or ".join(f"{most_selected(count, lora.experts.share)} of {count}" for count in sorted(counts))
            return (f"lora.experts: planned for the most experts that can be selected, {most} a layer", *self._speed())
        return (*self._corrected(), *self._speed())

    def _corrected(self) -> tuple[str, ...]:
        """How long first factors take that correct what 4 bits lost; the time of the run leaves it out."""
        if self.config.lora.init == "default" or not (rates := self.machine.rates(from_disk=False)):
            return ()
        matrices, rank = list(self.inventory.matrices), self.config.lora.r
        seconds = sum(decomposition_flops(shape, rank) for shape in matrices) / rates.flops_per_second
        return (f"lora.init: {len(matrices)} matrices are decomposed once, about {in_words(seconds)}",)

    def _speed(self) -> tuple[str, ...]:
        if self.device == "cuda" and self.machine.compute_dtype == torch.float32:
            return ("no time of a step: rates of GPUs are known for products in 16 bits, and these are in float32",)
        return ()
