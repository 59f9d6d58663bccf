"""Will it fit? Counts and memory of a run from the model's config and headers, before a weight is read.

The way through the room: `headers.py` finds config and headers, `inventory.py` counts shapes and exact bytes,
`memory.py` estimates the peak, `fit.py` says what to give up, `table.py` shows it all.
"""

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from rich.console import RenderableType

from expertune.checkpoint.load import build_meta_model
from expertune.checkpoint.targets import resolve_targets
from expertune.config import RunConfig, check_training_arguments, parse_size
from expertune.errors import ConfigError, DoesNotFitError, UnsupportedModelError
from expertune.placement.device import default_device, resolve_compute_dtype
from expertune.plan import table
from expertune.plan.fit import Change, MicroBatch, choose_micro_batch, what_to_change
from expertune.plan.headers import NF4_FOLDER_MARK, Headers, check_headers, find_config, read_headers
from expertune.plan.inventory import FrozenWeights, Inventory, Parameters, count_parameters, take_inventory, weigh
from expertune.plan.memory import Memory, Settings, estimate_memory, read_settings

__all__ = [
    "Change",
    "FrozenWeights",
    "Inventory",
    "Memory",
    "MicroBatch",
    "Parameters",
    "Plan",
    "Settings",
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
        memory: peak memory by component, with these micro-batches.
        budget_bytes: memory that the run may use.
        what_to_change: changes that lower the peak, cheapest first; empty where the run fits. No micro-batches are
            merged in their peaks.
        adapter_bytes: size of the adapter's tensors on disk.
        download_bytes: size of the checkpoint's tensors; None where nothing says.
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
    budget_bytes: int
    what_to_change: tuple[Change, ...]
    adapter_bytes: int
    download_bytes: int | None
    notes: tuple[str, ...] = ()

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
            raise DoesNotFitError(f"{self.model} does not fit.\n\n{table.as_text(self)}")
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
                "at_peak": [name for name in self.memory.components if self.memory.at_peak(name)],
            },
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "what_to_change": [{"lines": change.lines, **asdict(change)} for change in self.what_to_change],
            "disk": {"adapter_bytes": self.adapter_bytes, "download_bytes": self.download_bytes},
            "notes": list(self.notes),
        }


def make_plan(config: RunConfig, device: str | torch.device | None = None, began_with: int | None = None) -> Plan:
    """Plan a run. Reads config.json and safetensors headers, no weights.

    Args:
        config: the run.
        device: `cpu` or `cuda`, to plan for another machine than this one (`memory_budget` then says what it has);
            None plans for the device that a run would take here.
        began_with: for a run that resumes, how many micro-batches it ran as one; None chooses.

    Raises:
        ConfigError: no config.json, an unknown target or training argument, or no way to know the memory of `device`.
        CheckpointError: a damaged header, or tensors that do not belong to the config.
        UnsupportedModelError: no experts that can be packed, or a checkpoint that is already quantized otherwise.
    """
    check_training_arguments(config.training)
    target_device = default_device() if device is None else torch.device(device)
    compute_dtype = _compute_dtype(config, target_device)
    folder, on_hub = find_config(config.model, config.revision, config.trust_remote_code)
    model = build_meta_model(folder, compute_dtype, config.trust_remote_code)
    holds_nf4 = (folder / NF4_FOLDER_MARK).is_file()
    if not holds_nf4:
        _require_16_bit(model, config.model)
    inventory = take_inventory(model)
    headers = None if holds_nf4 else read_headers(config.model, folder, config.revision, on_hub)
    notes = _check(headers, inventory, holds_nf4)

    def settings_of(run: RunConfig) -> Settings:
        return read_settings(run, target_device.type, compute_dtype)

    def memory_of(run: RunConfig) -> Memory:
        return estimate_memory(inventory, resolve_targets(model, inventory.names, run.lora), weights, settings_of(run))

    weights = weigh(inventory, compute_dtype, config.quantization.double_quantization)
    parameters = count_parameters(inventory, resolve_targets(model, inventory.names, config.lora))
    budget = _budget(config, target_device)
    micro_batch = choose_micro_batch(config, model, target_device.type, budget, memory_of, began_with)
    return Plan(
        model=config.model,
        architecture=type(model).__name__,
        device=target_device.type,
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        parameters=parameters,
        weights=weights,
        micro_batch=micro_batch,
        memory=memory_of(config.model_copy(update={"training": micro_batch.apply(config.training)})),
        budget_bytes=budget,
        what_to_change=tuple(what_to_change(config, budget, memory_of)),
        adapter_bytes=parameters.trainable * settings_of(config).adapter_dtype.itemsize,
        download_bytes=headers.nbytes if headers else None,
        notes=tuple(notes),
    )


def _check(headers: Headers | None, inventory: Inventory, holds_nf4: bool) -> list[str]:
    if holds_nf4:
        return []
    if headers is None:
        return ["no weights to look at; the counts rest on config.json alone"]
    notes = []
    if None in headers.shapes.values():
        notes.append("the shards were not found; tensors were checked by the names in the index alone")
    unused = check_headers(headers, inventory.model, inventory.names)
    if unused:
        more = f" and {len(unused) - 2} more" if len(unused) > 2 else ""
        notes.append(f"tensors that the model has no place for are left out: {', '.join(unused[:2])}{more}")
    return notes


def _require_16_bit(model: Any, name: str) -> None:
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise UnsupportedModelError(
            f"model {name}: its weights are already quantized ({method}); give the 16-bit checkpoint, from which "
            "Expertune makes its own NF4"
        )


def _compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not torch.cuda.is_available() and config.quantization.compute_dtype == "auto":
        return torch.bfloat16  # A plan for another machine: every NVIDIA generation since 2020 has it.
    return resolve_compute_dtype(config.quantization.compute_dtype, device)


def _budget(config: RunConfig, device: torch.device) -> int:
    if config.memory_budget is not None:
        return parse_size(config.memory_budget)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here to take the memory of; set memory_budget, e.g. 24GB")
    return int(torch.cuda.get_device_properties(device).total_memory)
