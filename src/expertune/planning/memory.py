"""Peak memory of a run, by component, at each moment that can be its highest.

The frozen weights, the adapter and its gradients are exact: they follow from shapes and dtypes. The rest is estimated.
Its formulas stand here, in `layers.py` and `generation.py`, and each says what it counts. `benchmarks/plan_accuracy.py`
holds them to real runs; what came of it is in `docs/performance.md`.

Shape suffixes: T tokens of a micro-batch, D hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from expertune.checkpoint.targets import ResolvedTargets
from expertune.kernels import trim
from expertune.kernels.linear_cross_entropy import working_set_bytes
from expertune.planning.generation import cache_bytes, prefill_bytes
from expertune.planning.inventory import FrozenWeights, Inventory, count_adapter
from expertune.planning.layers import extra_in_backward, kept_by_layer, kept_bytes, layer_adapter
from expertune.planning.places import Streaming
from expertune.planning.settings import Settings

_FLOAT32_BYTES = 4

# What a process holds beside the model. On a CPU: resident memory with torch, transformers, peft, bitsandbytes,
# datasets and matplotlib imported and rows and tokenizer read, measured 0.65 GB, and 0.75 GB once products have run
# (torch 2.13, transformers 5.23; freed blocks given back). On CUDA: the context, cuBLAS workspaces and what the caching
# allocator rounds up to; not measured here.
FRAMEWORK_BYTES = {"cpu": 750 * 10**6, "cuda": 1000 * 10**6}

# What the C allocator may keep of freed blocks before it is made to give them back.
ALLOCATOR_BYTES = {"cpu": trim.SLACK_BYTES, "cuda": 0}

# Tokens of the proof after attaching: enough for every expert of a layer to be reached, few enough to cost a second.
PROOF_TOKENS = 512

# Numbers per logit of a loss over all logits at once, beside the logits themselves: transformers takes it in float32,
# so that its log-softmax, the gradient of that and the gradient of its input are alive at once. Measured: 14.0 bytes
# with bfloat16 logits in training, 10.0 in evaluation. Float32 logits are not copied, which is one number less.
_LOSS_NUMBERS, _EVALUATION_NUMBERS = 3, 2

# States of 8-bit optimizers: a byte each, and one float32 scale for each block of 256.
_STATE_8BIT_BYTES = 1 + _FLOAT32_BYTES / 256


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process on its device.

    The moments that can be the highest: `proof` (after attaching), `loss` (forward is over), `layer` (a layer is in
    backward), `update` (the optimizer's), `evaluation`, `generation` (answers for the task's metric). Only one of them
    happens at a time.

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
    updated = {**always, "optimizer": optimizer_bytes(adapter, settings)}
    training = always if settings.one_step else updated
    # While no layer computes, the way through them turns.
    turn = {"slots": streaming.turn_bytes}
    kept = [kept_bytes(layer, inventory, targets, settings) for layer in inventory.layers]
    activations = max(kept) if settings.offload else sum(kept)
    gradients = adapter_bytes if settings.accumulates else 0
    # The logits of all tokens stay until the step ends: the trainer holds the model's output.
    logits_held = settings.full_logits * settings.tokens * inventory.vocab_size * settings.compute_dtype.itemsize
    evaluation = dataclasses.replace(settings, tokens=settings.evaluation_tokens, dropout=False)
    moments = {
        "proof": _proof(inventory, targets, settings, adapter_bytes, always, turn),
        "loss": training
        | turn
        | {
            "gradients": gradients,
            "activations": activations,
            "logits": _loss_bytes(settings.tokens, _LOSS_NUMBERS, inventory, settings),
        },
        "layer": training | _layer_moment(inventory, targets, settings, kept, adapter_bytes) | {"logits": logits_held},
        # What the first update would have to restore if memory ran out in it is kept on the host.
        "update": updated
        | turn
        | {"gradients": adapter_bytes, "copies": adapter_bytes if settings.device == "cpu" else 0},
        "evaluation": _highest(
            updated | turn | {"evaluation": _loss_bytes(evaluation.tokens, _EVALUATION_NUMBERS, inventory, evaluation)},
            updated | {"evaluation": _forward_bytes(inventory, evaluation)},
        ),
        "generation": updated | _generation(inventory, settings),
    }
    if not settings.evaluation_tokens:
        del moments["evaluation"]
    if not settings.answered_rows:
        del moments["generation"]
    waiting = streaming.waiting_bytes if streaming.place == "host" else 0
    return Memory(moments, waiting + (sum(kept) if settings.offload else 0))


def _highest(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda components: sum(components.values()))


def _layer_moment(
    inventory: Inventory, targets: ResolvedTargets, settings: Settings, kept: list[int], adapter_bytes: int
) -> dict[str, int]:
    """The layer whose backward holds most: its own memory, what the layers before it keep, the gradients of the others.

    Backward begins at the last layer. It frees what a layer kept as it leaves it, and adds its adapter's gradients.
    """
    before = [max(kept)] * len(kept) if settings.offload else list(accumulate(kept))
    itemsize = settings.adapter_dtype.itemsize
    own = [layer_adapter(layer, inventory, targets) * itemsize for layer in inventory.layers]
    outside = adapter_bytes - sum(own)  # of the output head; routers are few, and counted with it
    moments = []
    for index, layer in enumerate(inventory.layers):
        again = kept_by_layer(layer, inventory, targets, settings) if settings.checkpointing else 0
        gradients = adapter_bytes if settings.accumulates else outside + sum(own[index:])
        extra = again + extra_in_backward(layer, inventory, settings)
        moments.append({"gradients": gradients, "activations": before[index], "working_set": extra})
    return _highest(*moments)


def _proof(
    inventory: Inventory,
    targets: ResolvedTargets,
    settings: Settings,
    adapter_bytes: int,
    always: dict[str, int],
    turn: dict[str, int],
) -> dict[str, int]:
    """The proof's forward and backward, of few tokens: when it takes the loss over all logits, or a layer's backward.

    Beside it are the B factors as they were, about half of the adapter, and the base model's logits. Its other forwards
    keep no activations, and hold less.
    """
    length = settings.row_length if settings.padded else min(settings.row_length, PROOF_TOKENS)
    rows = max(PROOF_TOKENS // length, 1)
    proof = dataclasses.replace(
        settings, tokens=rows * length, row_length=length, full_logits=True, offload=False, accumulates=False
    )
    kept = [kept_bytes(layer, inventory, targets, proof) for layer in inventory.layers]
    base_logits = proof.tokens * inventory.vocab_size * settings.compute_dtype.itemsize
    loss = {
        "activations": sum(kept),
        "logits": base_logits + _loss_bytes(proof.tokens, _LOSS_NUMBERS, inventory, proof),
    }
    layer = _layer_moment(inventory, targets, proof, kept, adapter_bytes) | {"logits": base_logits}
    held = always | {"copies": adapter_bytes // 2}
    return _highest(held | turn | loss, held | layer)


def _generation(inventory: Inventory, settings: Settings) -> dict[str, int]:
    """Answering rows whose prompts are as long as rows may be: while they are read, or at the last token."""
    rows, itemsize = settings.answered_rows, settings.compute_dtype.itemsize
    # Of the last position, and as generation takes them to float32.
    logits = rows * inventory.vocab_size * (itemsize + _FLOAT32_BYTES)
    if not inventory.takes_logits_to_keep:
        logits += rows * settings.row_length * inventory.vocab_size * itemsize
    prompts = dataclasses.replace(settings, tokens=rows * settings.row_length, dropout=False)
    # Attention, or the linears and experts around it: what one holds is gone when the other runs.
    reading = max(
        _forward_bytes(inventory, prompts), _hidden_bytes(inventory, prompts) + prefill_bytes(inventory, prompts)
    )
    read = cache_bytes(inventory, rows, settings.row_length, itemsize)
    whole = cache_bytes(inventory, rows, settings.row_length + settings.answer_tokens, itemsize)
    # A token is added by a copy of a layer's keys and values.
    grown = whole // len(inventory.layers)
    return _highest({"cache": read, "generation": max(reading, logits)}, {"cache": whole, "generation": logits + grown})


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


def _forward_bytes(inventory: Inventory, settings: Settings) -> int:
    """Bytes of a layer's forward without gradients, whose rows are as many and as wide as their gradients."""
    extra = max(extra_in_backward(layer, inventory, settings) for layer in inventory.layers)
    return _hidden_bytes(inventory, settings) + extra


def _hidden_bytes(inventory: Inventory, settings: Settings) -> int:
    """Bytes of a layer's input, and of what its norm makes of it, both counted in float32."""
    return 2 * _FLOAT32_BYTES * settings.tokens * inventory.hidden_size


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
