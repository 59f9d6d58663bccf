"""Peak memory of a run, by component, at each moment that can be its highest.

The frozen weights, the adapter and its gradients are exact: they follow from shapes and dtypes. The rest is estimated.
Its formulas stand here and nowhere else, and each says what it counts. `benchmarks/plan_accuracy.py` holds them to real
runs; what came of it is in `docs/performance.md`.

Shape suffixes: T tokens of a micro-batch, S tokens of a row, D hidden size, F intermediate size, P parts of the first
product, E experts, K experts per token, R = T * K routed rows, H query heads, r rank, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import TrainingArguments

from expertune.checkpoint.targets import ResolvedTargets
from expertune.config import RunConfig
from expertune.experts.contract import ExpertsSpec
from expertune.kernels import heap
from expertune.kernels.cpu import product_dtype
from expertune.kernels.expert_mlp.plan import bytes_per_row
from expertune.kernels.grouped_linear.decode_then_gemm import TILE_BYTES
from expertune.kernels.linear_cross_entropy import working_set_bytes
from expertune.kernels.routes import default_working_set_bytes
from expertune.plan.inventory import FrozenWeights, Inventory, Layer, count_adapter
from expertune.plan.places import Streaming

_FLOAT32_BYTES = 4

# What a process holds beside the model. On a CPU: resident memory with torch, transformers, peft, bitsandbytes,
# datasets and matplotlib imported and rows and tokenizer read, measured 0.65 GB, and 0.75 GB once products have run
# (torch 2.13, transformers 5.23; freed blocks given back). On CUDA: the context, cuBLAS workspaces and what the caching
# allocator rounds up to; not measured here.
FRAMEWORK_BYTES = {"cpu": 750 * 10**6, "cuda": 1000 * 10**6}

# What the C allocator keeps of freed blocks: nothing after it was made to give them back, all of the slack before.
ALLOCATOR_BYTES = {"cpu": heap.SLACK_BYTES // 2, "cuda": 0}

# Tokens of the proof after attaching: enough for every expert of a layer to be reached, few enough to cost a second.
PROOF_TOKENS = 512

# Numbers per logit of a loss over all logits at once, beside the logits themselves: transformers takes it in float32,
# so that its log-softmax, the gradient of that and the gradient of its input are alive at once. Measured: 14.0 bytes
# with bfloat16 logits in training, 10.0 in evaluation. Float32 logits are not copied, which is one number less.
_LOSS_NUMBERS, _EVALUATION_NUMBERS = 3, 2

# States of 8-bit optimizers: a byte each, and one float32 scale for each block of 256.
_STATE_8BIT_BYTES = 1 + _FLOAT32_BYTES / 256

# Rows of the largest expert over those of the mean one; routing is never even.
_BUSIEST = 1.5


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
        accumulates: gradients of earlier micro-batches are there while a micro-batch runs.
        offload: what forward keeps for backward waits in the host's memory; never on a CPU, whose memory that is.
        padded: every row is as long as the longest that is allowed.
        optimizer: TrainingArguments' `optim`.
        expert_by_expert: on a CPU, products run expert by expert on weights that are decoded first.
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
    accumulates: bool
    offload: bool
    padded: bool
    expert_by_expert: bool
    optimizer: str
    adapter_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process on its device.

    The moments that can be the highest: `proof` (after attaching), `loss` (forward is over), `layer` (a layer is in
    backward), `update` (the optimizer's), `evaluation`. Only one of them happens at a time.

    Attributes:
        moments: moment -> bytes by component, those that are always held included.
        host_bytes: what waits in the host's memory for a device apart from it.
    """

    moments: Mapping[str, Mapping[str, int]]
    host_bytes: int = 0

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def components(self) -> Mapping[str, int]:
        """Bytes by component at the peak."""
        return self.moments[self.moment]

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return sum(self.components.values())

    @property
    def totals(self) -> dict[str, int]:
        """Bytes at each moment."""
        return {moment: sum(components.values()) for moment, components in self.moments.items()}


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
        accumulates=int(training_argument(training, "gradient_accumulation_steps")) > 1,
        offload=config.offload_activations and device != "cpu",
        padded=config.data.packing == "padded",
        expert_by_expert=device == "cpu" and product_dtype(compute_dtype, torch.device("cpu")) != torch.float32,
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
    inventory: Inventory,
    targets: ResolvedTargets,
    frozen: FrozenWeights,
    settings: Settings,
    streaming: Streaming,
) -> Memory:
    """Peak memory of a run, by component and moment.

    Args:
        inventory: the model's shapes.
        targets: what the adapter changes.
        frozen: bytes of the base model.
        settings: what the run file says.
        streaming: expert bytes that wait elsewhere.
    """
    adapter = count_adapter(inventory, targets)
    adapter_bytes = adapter * settings.adapter_dtype.itemsize
    # The host's memory holds what waits there, and the mapped pages of what waits on a disk.
    always = {
        "weights": frozen.frozen_bytes - streaming.waiting_bytes,
        "slots": streaming.slot_bytes,
        "adapter": adapter_bytes,
        "framework": FRAMEWORK_BYTES[settings.device],
        "allocator": ALLOCATOR_BYTES[settings.device],
    }
    training = {**always, "optimizer": optimizer_bytes(adapter, settings)}
    kept = [_kept(layer, inventory, targets, settings) for layer in inventory.layers]
    activations = max(kept) if settings.offload else sum(kept)
    gradients = adapter_bytes if settings.accumulates else 0
    # The logits of all tokens stay until the step ends: the trainer holds the model's output.
    logits_held = settings.full_logits * settings.tokens * inventory.vocab_size * settings.compute_dtype.itemsize
    moments = {
        "proof": always | _proof(inventory, targets, settings, adapter_bytes),
        "loss": training
        | {
            "gradients": gradients,
            "activations": activations,
            "logits": _loss_bytes(settings.tokens, _LOSS_NUMBERS, inventory, settings),
        },
        "layer": training | _layer_moment(inventory, targets, settings, kept, adapter_bytes) | {"logits": logits_held},
        # What the first update would have to restore if memory ran out in it is kept on the host.
        "update": training | {"gradients": adapter_bytes, "copies": adapter_bytes if settings.device == "cpu" else 0},
        "evaluation": training | {"evaluation": _evaluation_bytes(inventory, targets, settings)},
    }
    if not settings.evaluation_tokens:
        del moments["evaluation"]
    waiting = streaming.waiting_bytes if streaming.place == "host" else 0
    return Memory(moments, waiting + (sum(kept) if settings.offload else 0))


def _layer_moment(
    inventory: Inventory, targets: ResolvedTargets, settings: Settings, kept: list[int], adapter_bytes: int
) -> dict[str, int]:
    """The layer whose backward holds most: its own memory, what the layers before it keep, the gradients of the others.

    Backward begins at the last layer. It frees what a layer kept as it leaves it, and adds its adapter's gradients.
    """
    before = [max(kept)] * len(kept) if settings.offload else list(accumulate(kept))
    itemsize = settings.adapter_dtype.itemsize
    own = [_layer_adapter(layer, inventory, targets) * itemsize for layer in inventory.layers]
    outside = adapter_bytes - sum(own)  # of the output head; routers are few, and counted with it
    moments = []
    for index, layer in enumerate(inventory.layers):
        again = _kept_by_layer(layer, inventory, targets, settings) if settings.checkpointing else 0
        gradients = adapter_bytes if settings.accumulates else outside + sum(own[index:])
        extra = again + _extra_in_backward(layer, inventory, settings)
        moments.append({"gradients": gradients, "activations": before[index], "working_set": extra})
    return max(moments, key=lambda moment: sum(moment.values()))


def _layer_adapter(layer: Layer, inventory: Inventory, targets: ResolvedTargets) -> int:
    """Weights of the adapter on a layer's linears and experts."""
    adapted = {name: shape for name, shape in layer.linears.items() if name in targets.linears}
    count = sum(targets.linears[name][0] * sum(shape) for name, shape in adapted.items())
    for name, spec in layer.experts.items():
        ranks = targets.experts.get(name, {})
        count += spec.num_experts * sum(rank * sum(spec.shape(part)) for part, (rank, _) in ranks.items())
    return count


def _proof(inventory: Inventory, targets: ResolvedTargets, settings: Settings, adapter_bytes: int) -> dict[str, int]:
    """The proof's forward and backward, of few tokens, with the loss over all logits.

    Beside it are the B factors as they were, about half of the adapter, and the base model's logits.
    """
    length = settings.row_length if settings.padded else min(settings.row_length, PROOF_TOKENS)
    rows = max(PROOF_TOKENS // length, 1)
    proof = dataclasses.replace(settings, tokens=rows * length, row_length=length, full_logits=True, offload=False)
    kept = [_kept(layer, inventory, targets, proof) for layer in inventory.layers]
    moment = _layer_moment(inventory, targets, proof, kept, adapter_bytes)
    logits, itemsize = proof.tokens * inventory.vocab_size, settings.compute_dtype.itemsize
    return {
        "copies": adapter_bytes // 2,
        "gradients": adapter_bytes,
        "activations": sum(kept),
        "working_set": moment["working_set"],
        # While gradients are taken: the base model's, the model's own, and the loss's. Its other forwards keep no
        # activations, and hold less.
        "logits": logits * (2 * itemsize + _bytes_per_logit(_LOSS_NUMBERS, settings)),
    }


def _bytes_per_logit(numbers: int, settings: Settings) -> int:
    return _FLOAT32_BYTES * (numbers - (settings.compute_dtype == torch.float32))


def _loss_bytes(tokens: int, numbers: int, inventory: Inventory, settings: Settings) -> int:
    """Bytes at the moment of the loss, with its gradients where it has any."""
    itemsize, D = settings.compute_dtype.itemsize, inventory.hidden_size
    if settings.full_logits:
        return tokens * inventory.vocab_size * (itemsize + _bytes_per_logit(numbers, settings))
    # Hidden states and their gradient; with dropout the head's adapter has an input of its own, and that a gradient.
    per_token = 2 * D * itemsize + (2 * D * settings.adapter_dtype.itemsize if settings.dropout else 0)
    working_set = working_set_bytes(tokens, inventory.vocab_size, D, settings.compute_dtype, settings.device)
    return tokens * per_token + working_set


def _evaluation_bytes(inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes of an evaluation: its loss, or a layer's forward, whose rows are as many and as wide as their gradients."""
    evaluation = dataclasses.replace(settings, tokens=settings.evaluation_tokens, dropout=False)
    hidden_states = 2 * _FLOAT32_BYTES * evaluation.tokens * inventory.hidden_size
    layers = [hidden_states + _extra_in_backward(layer, inventory, evaluation) for layer in inventory.layers]
    return max(_loss_bytes(evaluation.tokens, _EVALUATION_NUMBERS, inventory, evaluation), *layers)


def _kept(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that stay of a layer from its forward to its backward."""
    if not settings.checkpointing:
        return _kept_by_layer(layer, inventory, targets, settings)
    # A checkpointed layer keeps its input; its experts keep what they returned, so that they are not run again.
    hidden_states = settings.tokens * inventory.hidden_size * settings.compute_dtype.itemsize
    return hidden_states + _kept_by_experts(layer, inventory, targets, settings)


def _kept_by_layer(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that a layer's forward keeps for its backward; held to what autograd saves, tensor by tensor."""
    itemsize, attention = settings.compute_dtype.itemsize, inventory.attention
    # A norm computes in float32 and keeps its input so. Rotated queries and keys, values, and what attention gives.
    per_token = _FLOAT32_BYTES * sum(layer.norms) + attention.kept_bytes(itemsize, settings.row_length, settings.device)
    shared = settings.adapter_dtype == settings.compute_dtype and not settings.dropout
    # Dropout keeps a mask beside its result on a GPU; on a CPU it counts instead.
    copies = 2 if settings.dropout and settings.device != "cpu" else 1
    blocks = set()
    for name, (rows, columns) in layer.linears.items():
        block = name.rpartition(".")[0]
        if name in targets.linears:
            # PEFT keeps the adapter's input in the adapter's dtype: a copy for each linear, unless it is the same.
            per_token += 0 if shared else copies * columns * settings.adapter_dtype.itemsize
            per_token += targets.linears[name][0] * settings.adapter_dtype.itemsize
            blocks.add(block)
        if "att" not in block.rpartition(".")[2]:
            # A gated block keeps gate, what the activation makes of it, and up: three halves of what gate and up give.
            per_token += rows * itemsize if rows == inventory.hidden_size else 3 * rows * itemsize // 2
    per_token += len(blocks) * inventory.hidden_size * itemsize if shared else 0
    routed = sum(spec.num_experts * _FLOAT32_BYTES + 2 * inventory.top_k * 8 for spec in layer.experts.values())
    return settings.tokens * (per_token + routed) + _kept_by_experts(layer, inventory, targets, settings)


def _kept_by_experts(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that a layer's experts keep: [T, D], their input or what they return, and x @ A of each update [R, r]."""
    per_token = 0
    for name, spec in layer.experts.items():
        ranks = sum(rank for rank, _ in targets.experts.get(name, {}).values())
        per_token += spec.hidden_size * settings.compute_dtype.itemsize
        per_token += inventory.top_k * ranks * settings.adapter_dtype.itemsize
    return settings.tokens * per_token


def _extra_in_backward(layer: Layer, inventory: Inventory, settings: Settings) -> int:
    """Bytes alive in a layer's backward beside what its forward kept: experts' rows, a decoded tile, gradients."""
    itemsize = settings.compute_dtype.itemsize
    rows = [_between_products(spec, inventory, settings) for spec in layer.experts.values()]
    decoded_linears = [rows * columns * itemsize for rows, columns in layer.linears.values()]
    # On a CPU a tile is at most the whole matrix, gate and up side by side; elsewhere it is in the working set.
    tiles = [
        min(TILE_BYTES["cpu"], 2 * spec.hidden_size * spec.intermediate_size * itemsize)
        for spec in layer.experts.values()
        if settings.device == "cpu"
    ]
    # A linear's output and its update in float32, and their gradients.
    widest = max((rows for rows, _ in layer.linears.values()), default=0)
    around_linears = 4 * settings.tokens * widest * _FLOAT32_BYTES
    scores = inventory.attention.scores_bytes(settings.row_length, settings.device)
    return max([sum(rows), around_linears, scores]) + max([0, *decoded_linears, *tiles])


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
        held = min(whole, settings.working_set_bytes)
        return (_expert_by_expert(spec, parts, held // row, settings) if settings.expert_by_expert else held) + around
    half = settings.working_set_bytes // 2
    one_expert = (parts + 1) * spec.hidden_size * spec.intermediate_size * settings.compute_dtype.itemsize
    return min(whole, half) + min(spec.num_experts * one_expert, max(half, one_expert)) + around


def _expert_by_expert(spec: ExpertsSpec, parts: int, rows: int, settings: Settings) -> int:
    """The route that decodes first takes one expert's rows at a time, and holds the input's gradient of all, float32.

    An expert's: gate and up and their gradients, what the activation makes of them and keeps, some of it in float32 for
    the adapters.
    """
    itemsize = settings.compute_dtype.itemsize
    inner = (3 * parts + 4) * itemsize + 2 * _FLOAT32_BYTES
    outer = 2 * itemsize + 2 * _FLOAT32_BYTES
    busiest = min(int(_BUSIEST * rows / spec.num_experts) + 1, rows)
    one = busiest * (inner * spec.intermediate_size + outer * spec.hidden_size)
    return rows * spec.hidden_size * _FLOAT32_BYTES + one


def optimizer_bytes(adapter: int, settings: Settings) -> int:
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
