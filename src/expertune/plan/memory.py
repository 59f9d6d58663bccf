"""Peak memory of a run, by component.

The frozen weights, the adapter and its gradients are exact: they follow from shapes and dtypes. The rest is estimated.
Its formulas stand here and nowhere else, and each says what it counts. Against nine measured training steps on a CPU
(hidden 1024; 8 experts top-2 and 32 experts top-8; 2 to 8 layers; 1024 and 2048 tokens; with and without dropout and
checkpointing) what the plan says of a step lies 7-14% above what it took, provided that the host gives memory back
(`expertune.placement.device.bound_host_memory`). These steps took the loss over all logits at once (`loss: full`); what
the loss in chunks takes is counted from its buffers. A model whose loss has to be taken at once all the same, which is
known only when it runs, needs what `loss: full` plans for.

Shape suffixes: T tokens of a micro-batch, S tokens of a row, D hidden size, F intermediate size, E experts, K experts
per token, R = T * K routed rows, r rank, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from expertune.checkpoint.targets import ResolvedTargets
from expertune.config import RunConfig
from expertune.experts.contract import ExpertsSpec
from expertune.kernels.expert_mlp.plan import bytes_per_row
from expertune.kernels.grouped_linear.decode_then_gemm import TILE_BYTES
from expertune.kernels.linear_cross_entropy import working_set_bytes
from expertune.kernels.routes import default_working_set_bytes
from expertune.plan.inventory import FrozenWeights, Inventory, Layer, count_adapter

_FLOAT32_BYTES = 4

# What a process holds before a model is loaded. On a CPU: resident memory after importing torch, transformers, peft,
# bitsandbytes and datasets and one product, measured 0.52 GB (torch 2.13, transformers 5.23), rounded up. On CUDA: the
# context, cuBLAS workspaces and what the caching allocator rounds up to; not measured here.
FRAMEWORK_BYTES = {"cpu": 600 * 10**6, "cuda": 1000 * 10**6}

# Tokens of the proof after attaching: enough for every expert of a layer to be reached, few enough to cost a second.
PROOF_TOKENS = 512

# Bytes per logit of a loss over all logits at once, beside the logits themselves: transformers takes it in float32, so
# that its log-softmax, the gradient of that and the gradient of its input are alive at once. Measured: 14.0 with
# bfloat16 logits in training, 10.0 in evaluation.
_LOSS_BYTES_PER_LOGIT = 3 * _FLOAT32_BYTES
_EVALUATION_BYTES_PER_LOGIT = 2 * _FLOAT32_BYTES

# States of 8-bit optimizers: a byte each, and one float32 scale for each block of 256.
_STATE_8BIT_BYTES = 1 + _FLOAT32_BYTES / 256


@dataclass(frozen=True)
class Settings:
    """The part of a run file that decides memory.

    Attributes:
        tokens: T, an upper bound: batch size times the longest row.
        row_length: S.
        evaluation_tokens: T of an evaluation batch; 0 without evaluation rows.
        checkpointing: layers are computed again in backward, and keep only their input meanwhile.
        dropout: the adapter drops inputs, and so keeps copies of them.
        working_set_bytes: most bytes of an expert layer's rows between its products.
        full_logits: the loss is taken over the logits of all tokens at once, not a chunk of rows at a time.
        optimizer: TrainingArguments' `optim`.
        adapter_dtype: dtype of the adapter's weights and gradients.
        compute_dtype: dtype of activations and of all weights that are not 4-bit.
        device: `cpu` or `cuda`.
    """

    tokens: int
    row_length: int
    evaluation_tokens: int
    checkpointing: bool
    dropout: bool
    working_set_bytes: int
    full_logits: bool
    optimizer: str
    adapter_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: str


# Components that are held at one moment and not at the others; what is missing here is always held.
_HELD_AT = {
    "loss": ("gradients", "activations", "logits"),
    "layer": ("gradients", "activations", "working_set"),
    "evaluation": ("evaluation",),
}
_MOMENTARY = frozenset(name for names in _HELD_AT.values() for name in names)


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process.

    A step has its peak either while the loss is taken or while a layer is in backward; an evaluation has its own. Only
    one of the three happens at a time, so that the peak is what is always held plus the largest of them.

    Attributes:
        components: bytes by component.
        moment: when the peak is reached: `loss`, `layer` or `evaluation`.
    """

    components: Mapping[str, int]
    moment: str

    @classmethod
    def of(cls, components: Mapping[str, int]) -> "Memory":
        """The memory of these components, with the moment of its peak."""
        return cls(components, max(_HELD_AT, key=lambda moment: sum(components[name] for name in _HELD_AT[moment])))

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return sum(bytes_ for name, bytes_ in self.components.items() if self.at_peak(name))

    def at_peak(self, component: str) -> bool:
        """Whether the component is held at the moment of the peak."""
        return component not in _MOMENTARY or component in _HELD_AT[self.moment]


def read_settings(config: RunConfig, device: str, compute_dtype: torch.dtype) -> Settings:
    """The settings of a run file, with TrainingArguments' defaults for what it leaves out."""
    length, training = config.data.max_length, config.training
    batch = int(training_argument(training, "per_device_train_batch_size"))
    evaluation_batch = int(training_argument(training, "per_device_eval_batch_size")) if config.data.eval else 0
    return Settings(
        tokens=batch * length,
        row_length=length,
        evaluation_tokens=evaluation_batch * length,
        checkpointing=uses_checkpointing(training),
        dropout=config.lora.dropout > 0,
        working_set_bytes=config.kernels.working_set_bytes or default_working_set_bytes(device),
        full_logits=config.loss == "full"
        or any(training.get(key) for key in ("label_smoothing_factor", "torch_compile")),
        # The trainer's own default on either device.
        optimizer=str(training.get("optim", "paged_adamw_8bit" if device == "cuda" else "adamw_torch")),
        adapter_dtype=torch.float32 if config.lora.dtype == "float32" else torch.bfloat16,
        compute_dtype=compute_dtype,
        device=device,
    )


def training_argument(training: Mapping[str, Any], name: str) -> Any:
    """A key under `training:`, or TrainingArguments' own default."""
    if name in training:
        return training[name]
    return next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == name)


def uses_checkpointing(training: Mapping[str, Any]) -> bool:
    """Whether layers are recomputed; TrainingArguments has two names for it, the older one deprecated."""
    return bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))


def estimate_memory(
    inventory: Inventory, targets: ResolvedTargets, frozen: FrozenWeights, settings: Settings
) -> Memory:
    """Peak memory of training, by component.

    Args:
        inventory: the model's shapes.
        targets: what the adapter changes.
        frozen: bytes of the base model.
        settings: what the run file says.
    """
    adapter = count_adapter(inventory, targets)
    adapter_bytes = adapter * settings.adapter_dtype.itemsize
    per_layer = [_kept_by_layer(layer, inventory, targets, settings) for layer in inventory.layers]
    # A checkpointed layer keeps its input; its experts keep what they returned, so that they are not run again.
    kept_checkpointed = sum(
        settings.tokens * inventory.hidden_size * settings.compute_dtype.itemsize
        + _experts_kept(layer, inventory, targets, settings)
        for layer in inventory.layers
    )
    in_backward = [_extra_in_backward(layer, inventory, settings) for layer in inventory.layers]
    recomputed = per_layer if settings.checkpointing else [0] * len(per_layer)
    # The logits of all tokens stay until the step ends: the trainer holds the model's output.
    logits_held = settings.full_logits * settings.tokens * inventory.vocab_size * settings.compute_dtype.itemsize
    return Memory.of(
        {
            "weights": frozen.frozen_bytes,
            "adapter": adapter_bytes,
            "gradients": adapter_bytes,
            "optimizer": _optimizer_bytes(adapter, settings),
            "activations": kept_checkpointed if settings.checkpointing else sum(per_layer),
            "working_set": max(map(sum, zip(recomputed, in_backward, strict=True))) + logits_held,
            "logits": _loss_bytes(settings.tokens, _LOSS_BYTES_PER_LOGIT, inventory, settings),
            "evaluation": _evaluation_bytes(inventory, settings),
            "framework": FRAMEWORK_BYTES[settings.device],
        }
    )


def _loss_bytes(tokens: int, bytes_per_logit: int, inventory: Inventory, settings: Settings) -> int:
    """Bytes at the moment of the loss, with its gradients where it has any."""
    itemsize, D = settings.compute_dtype.itemsize, inventory.hidden_size
    if settings.full_logits:
        return tokens * inventory.vocab_size * (itemsize + bytes_per_logit)
    # Hidden states and their gradient; with dropout the head's adapter has an input of its own, and that a gradient.
    per_token = 2 * D * itemsize + (2 * D * settings.adapter_dtype.itemsize if settings.dropout else 0)
    working_set = working_set_bytes(tokens, inventory.vocab_size, D, settings.compute_dtype, settings.device)
    return tokens * per_token + working_set


def _evaluation_bytes(inventory: Inventory, settings: Settings) -> int:
    """Bytes of an evaluation: its loss, or a layer's forward, whose rows are as many and as wide as their gradients."""
    evaluation = dataclasses.replace(settings, tokens=settings.evaluation_tokens, dropout=False)
    if not evaluation.tokens:
        return 0
    hidden_states = 2 * _FLOAT32_BYTES * evaluation.tokens * inventory.hidden_size
    layers = [hidden_states + _extra_in_backward(layer, inventory, evaluation) for layer in inventory.layers]
    return max(_loss_bytes(evaluation.tokens, _EVALUATION_BYTES_PER_LOGIT, inventory, evaluation), *layers)


def _kept_by_layer(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that a layer's forward keeps for its backward."""
    itemsize = settings.compute_dtype.itemsize
    # Dropout keeps a mask beside its result on a GPU; on a CPU it counts instead.
    copies = 2 if settings.dropout and settings.device != "cpu" else 1
    # Two norms compute in float32 and keep their input so.
    per_token = 2 * _FLOAT32_BYTES * inventory.hidden_size
    for name, (rows, columns) in layer.linears.items():
        # Each output, and what is computed from it (rotation, activation, product).
        per_token += 2 * rows * itemsize
        if name in targets.linears:
            # PEFT keeps the adapter's input in the adapter's dtype; dropout adds its mask.
            per_token += copies * columns * settings.adapter_dtype.itemsize
    return settings.tokens * per_token + _experts_kept(layer, inventory, targets, settings)


def _experts_kept(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that a layer's experts keep: what they return [T, D], and x @ A of each update [R, r]."""
    ranks = max((sum(rank.rank for rank in each.values()) for each in targets.experts.values()), default=0)
    outputs = sum(spec.hidden_size for spec in layer.experts) * settings.compute_dtype.itemsize
    return settings.tokens * (outputs + (inventory.top_k * ranks * settings.adapter_dtype.itemsize if outputs else 0))


def _extra_in_backward(layer: Layer, inventory: Inventory, settings: Settings) -> int:
    """Bytes alive in a layer's backward beside what its forward kept: experts' rows, a decoded tile, a mask."""
    itemsize = settings.compute_dtype.itemsize
    rows = [_between_products(spec, inventory, settings) for spec in layer.experts]
    decoded_linears = [rows * columns * itemsize for rows, columns in layer.linears.values()]
    # On a CPU a tile is at most the whole matrix, gate and up side by side; elsewhere it is in the working set.
    tiles = [
        min(TILE_BYTES["cpu"], 2 * spec.hidden_size * spec.intermediate_size * itemsize)
        for spec in layer.experts
        if settings.device == "cpu"
    ]
    mask = settings.tokens * settings.row_length  # a byte for each pair of tokens of a row
    return sum(rows) + max([0, *decoded_linears, *tiles]) + mask


def _between_products(spec: ExpertsSpec, inventory: Inventory, settings: Settings) -> int:
    """Bytes of an expert layer's rows between its products, and of its input, output and their gradients in float32.

    On a GPU half of the working set is for rows and half for decoded weights, of one expert at least.
    """
    parts = len(spec.projections) - 1
    row = bytes_per_row(
        spec.hidden_size, spec.intermediate_size, parts, spec.has_gate, settings.dropout, settings.device
    )
    whole = settings.tokens * inventory.top_k * row
    around = 4 * settings.tokens * spec.hidden_size * _FLOAT32_BYTES
    if settings.device == "cpu":
        return min(whole, settings.working_set_bytes) + around
    half = settings.working_set_bytes // 2
    one_expert = (parts + 1) * spec.hidden_size * spec.intermediate_size * settings.compute_dtype.itemsize
    return min(whole, half) + min(spec.num_experts * one_expert, max(half, one_expert)) + around


def _optimizer_bytes(adapter: int, settings: Settings) -> int:
    """Bytes of the optimizer's states. 8-bit optimizers need CUDA; on a CPU torch's own takes their place."""
    name = settings.optimizer.lower()
    states = 2
    if "lion" in name or "rmsprop" in name or "adagrad" in name:
        states = 1
    elif name == "sgd" or "adafactor" in name:
        states = 0  # adafactor keeps a row and a column of each matrix: next to nothing
    if "8bit" in name and settings.device == "cuda":
        return int(adapter * states * _STATE_8BIT_BYTES)
    return adapter * states * settings.adapter_dtype.itemsize
