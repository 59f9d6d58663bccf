"""Will it fit, where do the experts wait, and how long does a step take? Before a weight is read.

The way through the room: `headers.py` finds config and headers, `source.py` says what is 4-bit in them, `inventory.py`
counts shapes and exact bytes, `settings.py` reads what else decides memory, `memory.py` estimates the peak with what
`layers.py` and `generation.py` count, `places.py` chooses where experts wait, `fit.py` says what to give up, `speed.py`
how long a step takes, `disk.py` what lies on the disk, `table.py` shows it all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from rich.console import RenderableType

from expertune.checkpoint.adapter_folder import require_adapter_folder
from expertune.checkpoint.load import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.targets import ResolvedTargets, resolve_targets
from expertune.config import LoraSection, RunConfig, check_training_arguments, parse_size
from expertune.errors import ConfigError, DoesNotFitError
from expertune.placement.device import default_device, resolve_compute_dtype
from expertune.planning import table
from expertune.planning.devices import Device, device_of_this_name, find_device
from expertune.planning.disk import Disk, count_disk
from expertune.planning.fit import Change, MicroBatch, as_yaml, choose_micro_batch, merged, what_to_change
from expertune.planning.generation import cached_numbers
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
from expertune.planning.places import Choice, Location, Places
from expertune.planning.settings import Settings, answers_rows, read_settings
from expertune.planning.source import read_source
from expertune.planning.speed import Rates, StepTime, estimate_step, measured_rates, tabled_rates

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


@dataclass(frozen=True)
class Plan:
    """What a run needs, and whether it is there.

    Attributes:
        model: folder or hub id, as in the run file.
        architecture: class of the transformers model.
        device: `cpu` or `cuda`.
        compute_dtype: dtype of the matrix products, e.g. `bfloat16`.
        parameters: numbers of parameters.
        weights: exact bytes of the base model as it is held.
        micro_batch: how the rows of a step run.
        memory: peak memory by component and moment, with these micro-batches and places.
        places: where the experts of each layer wait, and why.
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
    places: Places
    budget_bytes: int
    what_to_change: tuple[Change, ...]
    disk: Disk
    time: StepTime | None = None
    gpu: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def placement(self) -> Mapping[str, Location]:
        """Where each experts module's bytes wait, by dotted name."""
        return self.places.of

    @property
    def yaml(self) -> str:
        """All changes as lines of a run file; empty where it fits."""
        return as_yaml(merged(self.what_to_change)) if self.what_to_change else ""

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
            DoesNotFitError: it does not; the message shows the plan and what to give up.
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
                "moment": self.memory.moment,
                "components": dict(self.memory.components),
                "moments": self.memory.totals,
                "host_bytes": self.memory.host_bytes,
            },
            "placement": {
                "layers": self.places.counts,
                "reason": self.places.reason,
                "slot_bytes": self.places.streaming.slot_bytes,
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
    began_with: int | None = None,
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
        began_with: for a run that resumes, how many micro-batches it ran as one; None chooses.
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
    named = find_device(gpu) if gpu is not None else None
    target = torch.device("cuda") if named else default_device() if device is None else torch.device(device)
    budget = _budget(config, target, named, memory)
    compute_dtype = _compute_dtype(config, target, named)
    folder, on_hub = find_config(config.model, config.revision, trust_remote_code)
    model = build_meta_model(folder, compute_dtype, trust_remote_code)
    # Creating parameters on the meta device parts those that the config ties.
    model.tie_weights()
    names = read_names(model)
    source = read_source(config, folder, on_hub, model, names)
    inventory = take_inventory(model, names, source.linears)
    if answers_rows(config):
        cached = cached_numbers(model, names.specs, inventory.attention, len(inventory.layers))
        inventory = replace(inventory, cached_numbers=cached)
    weights = weigh(inventory, compute_dtype, source.double_quantization, source.scheme)
    sizes = {name: experts_bytes(spec, source.double_quantization, source.scheme) for name, spec in names.specs.items()}
    here = named is None and (target.type == "cpu" or torch.cuda.is_available())
    choice = Choice(sizes, target.type, source.holds_nf4, here)
    resolved: dict[str, ResolvedTargets] = {}

    def targets_of(lora: LoraSection) -> ResolvedTargets:
        key = lora.model_dump_json()
        if key not in resolved:
            resolved[key] = resolve_targets(model, names, lora)
        return resolved[key]

    def settings_of(run: RunConfig) -> Settings:
        return read_settings(run, target.type, compute_dtype)

    def memory_in(run: RunConfig, places: Places) -> Memory:
        return estimate_memory(inventory, targets_of(run.lora), weights, settings_of(run), places.streaming)

    def places_of(run: RunConfig) -> Places:
        return choice.fixed(run) or choice.fitting(budget, lambda places: memory_in(run, places).peak_bytes)

    def memory_of(run: RunConfig) -> Memory:
        return memory_in(run, places_of(run))

    as_written = places_of(config)

    def memory_merged(run: RunConfig) -> Memory:
        # Nothing waits elsewhere for the sake of a larger batch; where something has to, more may.
        return memory_of(run) if as_written.streaming.waiting_bytes else memory_in(run, as_written)

    micro_batch = choose_micro_batch(config, model, target.type, budget, memory_merged, began_with)
    as_it_runs = config.model_copy(update={"training": micro_batch.apply(config.training)})
    places = places_of(as_it_runs)
    targets = targets_of(config.lora)
    parameters = count_parameters(inventory, targets)
    rates = _rates(named, target, compute_dtype, places)
    time = None
    if rates is not None:
        brought = places.streaming.brought_bytes
        settings = settings_of(as_it_runs)
        time = estimate_step(inventory, targets, weights, settings, micro_batch.accumulation, brought, rates)
    plan = Plan(
        model=config.model,
        architecture=type(model).__name__,
        device=target.type,
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        parameters=parameters,
        weights=weights,
        micro_batch=micro_batch,
        memory=memory_in(as_it_runs, places),
        places=places,
        budget_bytes=budget,
        what_to_change=tuple(what_to_change(config, budget, memory_of, target.type, choice.elsewhere())),
        disk=count_disk(config, source, weights, parameters.trainable, settings_of(config)),
        time=time,
        gpu=named.name if named else None,
        notes=source.notes,
    )
    return plan if plan.fits or source.holds_nf4 or target.type != "cpu" else _with_hint(plan, config, choice)


def _with_hint(plan: Plan, config: RunConfig, choice: Choice) -> Plan:
    """On a CPU experts can wait on a disk only where they lie there in 4 bits: say what that would give."""
    waiting = choice.streaming(list(choice.sizes), "disk")
    peak = plan.smallest_peak_bytes - waiting.waiting_bytes + waiting.slot_bytes
    if peak >= plan.smallest_peak_bytes:
        return plan
    note = (
        "from a folder that `expertune quantize` has written, experts can wait on the disk (placement: disk); with all "
        f"changes above, the peak would be {table.size(peak)}"
    )
    return replace(plan, notes=(*plan.notes, note))


def _rates(named: Device | None, device: torch.device, dtype: torch.dtype, places: Places) -> Rates | None:
    """What the device does in a second: by the table, or measured on a CPU."""
    if device.type == "cpu":
        return measured_rates(dtype)
    if named is None:
        named = device_of_this_name(torch.cuda.get_device_name(device)) if torch.cuda.is_available() else None
    return tabled_rates(named, places.streaming.place == "disk") if named else None


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
            raise ConfigError(f"--gpu {named.name}: say how much memory it has, e.g. --memory 24GB")
        return named.memory_bytes
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here to take the memory of; set memory_budget, e.g. 24GB")
    return int(torch.cuda.get_device_properties(device).total_memory)
