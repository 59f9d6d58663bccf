"""Plan a run: read its model's shapes, and try what it comes to."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from expertune.checkpoint.adapter_folder import require_beginning
from expertune.checkpoint.targets import ResolvedTargets, most_selected, resolve
from expertune.config import RunConfig, check_training_arguments
from expertune.config.training_keys import MUON
from expertune.errors import ConfigError
from expertune.kernels.amounts import FLOAT32, Dtype
from expertune.planning.communication import Traffic
from expertune.planning.devices import Machine
from expertune.planning.disk import count_disk
from expertune.planning.duration import Pace, about
from expertune.planning.fit import Room, find_advice
from expertune.planning.inventory import Inventory, count_parameters
from expertune.planning.kept import KeptLayers, choose_kept
from expertune.planning.memory import Memory, estimate_memory
from expertune.planning.micro_batch import MicroBatch, choose_micro_batch
from expertune.planning.placement import PlacementChooser, PlannedPlacement
from expertune.planning.ranks import ModePlan, RanksPlan, choose_mode, count_traffic, possible_distributions
from expertune.planning.result import Plan
from expertune.planning.settings import Workload, read_workload
from expertune.planning.shapes import Shapes
from expertune.planning.speed import StepCost, StepTime, decomposition_flops
from expertune.train.optimizers import MuonSettings


def plan_for(
    config: RunConfig,
    machine: Machine,
    started: "Started | None" = None,
    trust_remote_code: bool = False,
    read: Callable[[RunConfig, Dtype, bool], Shapes] | None = None,
) -> Plan:
    """Plan a run on as many devices as a machine stands for; see `expertune.planning.make.make_plan`.

    Args:
        config: the run.
        machine: what it is planned for.
        started: see `make_plan`.
        trust_remote_code: see `make_plan`.
        read: reads the run's model in place of `expertune.planning.reading.read_shapes`.

    Raises:
        ConfigError: no config.json, an unknown target or training argument, a placement that cannot be, or ranks that
            cannot share the experts out as the run file says.
        CheckpointError: a damaged header, tensors that do not belong to the config, or no adapter of this model in
            `lora.init_from`.
        UnsupportedModelError: no experts that can be packed, or a checkpoint that is quantized in a way that cannot be
            read.
    """
    check_training_arguments(config.training, config.origin, config.objective)
    if config.training.get("optim") == MUON:
        MuonSettings.parse(config.training.get("optim_args"))  # refuses what is wrong in it
    if machine.world_size > 1 and config.objective == "grpo":
        raise ConfigError(
            f"objective: {config.objective} runs in one process, and {machine.world_size} were asked for; start one"
        )
    if machine.world_size > 1 and (config.is_calibrated or config.lora.init != "default"):
        key = f"lora.init: {config.lora.init}" if config.lora.init != "default" else "quantization.fit: calibrated"
        raise ConfigError(
            f"{key} is made by one process alone, and {machine.world_size} were asked for; remove the key"
        )
    require_beginning(config.lora)
    shapes = (read or _read_anew)(config, machine.compute_dtype, trust_remote_code)
    planner = _planner(config, machine, shapes)
    if machine.world_size == 1:
        return planner.plan(planner.find(started), None)
    config = planner.config
    distributions = possible_distributions(config, planner.workload(config), machine.world_size)
    planners = [replace(planner, inventory=shapes.inventory.on_ranks(each)) for each in distributions]
    found = [planner.find(started) for planner in planners]
    modes = tuple(planner.mode(each) for planner, each in zip(planners, found, strict=True))
    ranks = choose_mode(config.distributed.experts, modes, machine.link, machine.compared_links)
    chosen = modes.index(ranks.chosen)
    return planners[chosen].plan(found[chosen], ranks)


def _read_anew(config: RunConfig, compute_dtype: Dtype, trust_remote_code: bool) -> Shapes:
    from expertune.planning.reading import read_shapes  # which imports torch and transformers' models

    return read_shapes(config, compute_dtype, trust_remote_code)


def _planner(config: RunConfig, machine: Machine, shapes: Shapes) -> "_Planner":
    """The planner of a run; one that starts from an adapter is planned with that one's ranks and targets.

    Raises:
        ConfigError, CheckpointError: see `plan_for`.
    """
    inventory = shapes.inventory
    if shapes.begun is None:
        return _Planner(config, machine, shapes, inventory)
    lora, targets = shapes.begun
    lora = lora.model_copy(update={"init": "default"})  # its first factors are there: nothing is computed for them
    if machine.world_size > 1 and (problem := lora.why_not_held(config.distributed.experts)):
        raise ConfigError(f"lora.init_from: the adapter at {config.lora.init_from}: {problem}")
    of_adapter = config.model_copy(update={"lora": lora})
    return _Planner(of_adapter, machine, shapes, inventory, {lora.model_dump_json(): targets})


@dataclass(frozen=True)
class Started:
    """What a run began with that resumes: numbers of a step change with it, to rounding.

    Attributes:
        merged: how many micro-batches ran as one.
        kept_layers: how many expert layers kept gate and up.
    """

    merged: int = 1
    kept_layers: int = 0


@dataclass(frozen=True)
class _Found:
    """What a run comes to."""

    micro_batch: MicroBatch
    workload: Workload
    placement: PlannedPlacement
    kept: KeptLayers
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
        return self.machine.kind

    def find(self, started: Started | None) -> _Found:
        """What the run comes to."""
        micro_batch = self.micro_batch(started.merged if started else None)
        runs = self.config.model_copy(update={"training": micro_batch.apply(self.config.training)})
        placement = self.placement(runs)
        kept = self.kept(runs, placement, started.kept_layers if started else None)
        workload = replace(self.workload(runs), kept_layers=kept.layers)
        traffic, time = count_traffic(workload, micro_batch.accumulation), None
        pace = None
        if rates := self.machine.rates(from_disk=placement.offloads_to("disk")):
            of_step = StepCost(workload, placement, micro_batch.accumulation, rates, traffic, self.machine.link)
            time, pace = of_step.time(), Pace(runs, of_step)
        memory = estimate_memory(workload, placement)
        return _Found(micro_batch, workload, placement, kept, memory, traffic, time, pace)

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
            architecture=self.inventory.architecture,
            device=self.device,
            compute_dtype=machine.compute_dtype.name,
            products_in=machine.products_in,
            parameters=count_parameters(self.inventory, found.workload.targets),
            weights=self.inventory.weights,
            micro_batch=found.micro_batch,
            memory=found.memory,
            planned=found.placement,
            budget_bytes=budget,
            advice=find_advice(config, self.peak_bytes, room),
            kept=found.kept,
            disk=count_disk(config, replace(found.workload, inventory=self.shapes.inventory), self.shapes.source),
            time=found.time,
            gpu=machine.gpu.name if machine.gpu else None,
            notes=(*self.shapes.source.notes, *self.hints(), *([found.kept.note] if found.kept.note else [])),
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

        return choose_micro_batch(self.config, self.inventory.traits, self.device, budget, peak_of, previously_merged)

    def peak_bytes(self, run: RunConfig, placement: PlannedPlacement | None = None) -> int:
        """Peak memory of a run, in the placement that it will have unless another is given."""
        return estimate_memory(self.workload(run), placement or self.placement(run)).peak_bytes

    def placement(self, run: RunConfig) -> PlannedPlacement:
        """Where a run's experts are held."""
        workload, chooser = self.workload(run), self.chooser
        if run.model != self.config.model:  # the folder that `expertune quantize` is to write of it
            chooser = replace(chooser, holds_nf4=True)
        return chooser.choose(run, self.machine.budget_bytes, lambda tried: estimate_memory(workload, tried).peak_bytes)

    def kept(self, run: RunConfig, placement: PlannedPlacement, previously: int | None) -> KeptLayers:
        """How many layers of a run keep gate and up."""

        def peak_of(tried: Workload) -> int:
            return estimate_memory(tried, placement).peak_bytes

        most, budget = run.kernels.keep_bytes, self.machine.budget_bytes
        return choose_kept(self.workload(run), placement, most, budget, peak_of, previously)

    def workload(self, run: RunConfig) -> Workload:
        """What a run file says of memory; targets are looked up once, since many run files are tried."""
        key = run.lora.model_dump_json()
        if key not in self.targets:
            self.targets[key] = resolve(self.inventory.candidates, run.lora)
        return read_workload(run, self.inventory, self.targets[key], self.device, self.machine.compute_dtype)

    def hints(self) -> tuple[str, ...]:
        """Why there is no time, and what of the adapter is known only when the run selects its experts."""
        lora = self.config.lora
        if lora.experts and lora.experts.share and not lora.experts.layers:
            counts = {spec.num_experts for spec in self.inventory.specs.values()}
            most = " or ".join(f"{most_selected(count, lora.experts.share)} of {count}" for count in sorted(counts))
            return (f"lora.experts: planned for the most experts that can be selected, {most} a layer", *self._speed())
        return (*self._corrected(), *self._speed())

    def _corrected(self) -> tuple[str, ...]:
        """How long first factors take that are computed of each matrix; the time of the run leaves it out."""
        if self.config.lora.init == "default" or not (rates := self.machine.rates(from_disk=False)):
            return ()
        matrices, rank = list(self.inventory.matrices), self.config.lora.r
        seconds = sum(decomposition_flops(shape, rank) for shape in matrices) / rates.flops_per_second
        return (f"lora.init: {len(matrices)} matrices are decomposed once, {about(seconds)}",)

    def _speed(self) -> tuple[str, ...]:
        if self.device == "cuda" and self.machine.compute_dtype == FLOAT32:
            return ("no time of a step: rates of GPUs are known for products in 16 bits, and these are in float32",)
        return ()
