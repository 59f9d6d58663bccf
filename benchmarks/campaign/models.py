"""A whole model of random NF4 weights, made on its device, and optimizer steps as Expertune's trainer takes them."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.campaign import measure, weights
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.shapes import Model
from benchmarks.campaign.variants import passed_settings
from expertune.adapt.attach import attach
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.nf4_linears import quantized_linear
from expertune.checkpoint.recipe import linears_to_quantize
from expertune.config import LoraSection, QuantizationConfig
from expertune.experts.contract import find_experts
from expertune.experts.module import Nf4Experts
from expertune.kernels.routes import use_settings
from expertune.layers.varlen_attention import use_varlen_attention
from expertune.objectives.sft import SupervisedFineTuning
from expertune.train.arguments import training_arguments
from expertune.train.promises import Promised
from expertune.train.trainer import ExpertTrainer

_LORA_B_STD = 0.01
_EMBEDDING_STD = 0.02
_LEARNING_RATE = 2.5e-5
_MOST_GRADIENT_NORM = 1.0  # as transformers' Trainer clips


@torch.no_grad()
def random_model(model: Model, dtype: torch.dtype, device: torch.device) -> ExpertPeftModel:
    """The model with its adapter, as `load_model` and `attach` would give it; 16-bit matrices exist one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
        built = build_meta_model(folder, dtype)
    use_varlen_attention(built)
    names, quantization = read_names(built), QuantizationConfig()
    linears = linears_to_quantize(built)
    for name, experts in list(find_experts(built)):
        swapped = Nf4Experts(experts, name, quantization.double_quantization, device)
        weights.fill(swapped.gate_up)
        weights.fill(swapped.down)
        _replace(built, name, swapped)
    torch.manual_seed(0)
    for name, linear in linears.items():
        size = (linear.out_features, linear.in_features)
        matrix = (torch.randn(*size, device=device) * size[1] ** -0.5).to(dtype)
        _replace(built, name, quantized_linear(linear, matrix, quantization.double_quantization, dtype, device))
    for module in built.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = _random_parameter(module, parameter, device)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    built.tie_weights()
    built.to(device)
    built.requires_grad_(False)
    built.is_loaded_in_4bit = True  # PEFT reads this flag to adapt `Linear4bit` layers as 4-bit ones
    built.eval()
    lora = LoraSection(r=model.lora.r, alpha=model.lora.alpha, dropout=model.lora.dropout, targets=list(model.targets))
    built.nf4_names = names  # as a loaded model carries them
    adapted = attach(LoadedModel(built, names), lora, "benchmark")
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.normal_(std=_LORA_B_STD)  # at zero, products with it would be cheaper than in training
    return adapted


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _random_parameter(module: nn.Module, parameter: Tensor, device: torch.device) -> Tensor:
    """Ones for a norm, rows of a fixed size for embeddings, and matrices that keep the size of what they multiply."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    std = _EMBEDDING_STD if isinstance(module, nn.Embedding) else parameter.shape[-1] ** -0.5
    value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return value.normal_(std=std)


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of all 4-bit weights, scales included."""
    experts = sum(
        module.gate_up.nbytes + module.down.nbytes for module in model.modules() if isinstance(module, Nf4Experts)
    )
    linears = [module for module in model.modules() if type(module).__name__ == "Nf4Linear"]
    return experts + sum(buffer.nbytes for linear in linears for buffer in linear.nf4_bytes())


@dataclass
class Training:
    """A model in training: the parts of transformers' loop that a step is made of.

    Attributes:
        model: the adapted model.
        trainer: whose `training_step` takes the loss in chunks, checkpoints, and refuses a loss that is not finite.
        optimizer: paged 8-bit AdamW on a GPU, AdamW on a CPU.
        notes: what could not be as on a GPU.
    """

    model: ExpertPeftModel
    trainer: ExpertTrainer
    optimizer: torch.optim.Optimizer
    notes: list[str]

    def forward_backward(self, batches: Sequence[dict[str, Any]]) -> float:
        """Forward and backward of all micro-batches of a step; returns the loss."""
        self.model.train()
        count = torch.stack([(batch["labels"][..., 1:] != -100).sum() for batch in batches]).sum()
        total = 0.0
        for batch in batches:
            inputs = batch | {"example_ids": [0]}
            total += float(self.trainer.training_step(self.model, inputs, num_items_in_batch=count))
        return total

    def update(self) -> None:
        """Clip, step, forget the gradients."""
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], _MOST_GRADIENT_NORM)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def step(self, batches: Sequence[dict[str, Any]]) -> float:
        """A whole optimizer step."""
        loss = self.forward_backward(batches)
        self.update()
        return loss


def begin(model: ExpertPeftModel, folder: Path, device: torch.device) -> Training:
    """Make a model ready to train, with checkpointing, the loss in chunks and the recipe's optimizer."""
    values = {
        "learning_rate": _LEARNING_RATE,
        "optim": "paged_adamw_8bit",
        "gradient_checkpointing": True,
        "max_steps": 1,
        "disable_tqdm": True,
    }
    arguments, notes = training_arguments(values, str(folder), device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = SupervisedFineTuning(model, arguments, notify=notes.append)
    trainer = ExpertTrainer(model, arguments, [], lambda examples: dict(examples[0]), objective, Promised())
    return Training(model, trainer, trainer.create_optimizer(), notes)


def build(out: Record, folder: Path, model: Model) -> Training | None:
    """A model ready to train by the routes that passed their checks, as the group's item `model`.

    Args:
        out: of the group.
        folder: where the campaign's JSON is.
        model: which.

    Raises:
        CorrectnessError: no route passed its check.
    """
    settings, out.values["routes"] = passed_settings(folder, out.device.type)
    built: list[Training] = []

    def make() -> Item:
        started = time.monotonic()
        measure.reset_peak(out.device)
        adapted = random_model(model, torch.bfloat16, out.device)
        use_settings(adapted, settings)
        seconds = time.monotonic() - started
        built.append(begin(adapted, Path(tempfile.mkdtemp(prefix="campaign-")), out.device))
        return {
            "config": model.config,
            "lora": vars(model.lora) | {"targets": model.targets},
            "seconds": seconds,
            "quantized_bytes": quantized_bytes(adapted),
            "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
            "optimizer": type(built[0].optimizer).__name__,
            "memory": measure.memory(out.device),
            "notes": built[0].notes,
        }

    out.item("model", make, needs_s=5, again=True)
    return built[0] if built else None


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch's tensors where the model is; what is no tensor stays."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
