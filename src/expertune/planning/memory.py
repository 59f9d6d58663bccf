"""Peak memory of a run: which components each phase of the run holds, and those of the whole model.

Frozen weights, adapter, gradients and optimizer states follow from shapes and dtypes. Everything else is an upper bound
from shapes, and each function says what it counts, in bytes; those of one layer are in `layer_memory.py`.
`benchmarks/plan_accuracy.py` checks the peak against real runs: none may take more than its plan, and the plan may be a
third above what the run takes.

Shape suffixes: T tokens of a micro-batch, S tokens of a sequence, D hidden size, F intermediate size, V vocabulary,
E experts, R routed tokens, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from expertune.experts.spec import ExpertsSpec
from expertune.kernels.amounts import loss_working_set_bytes
from expertune.planning.layer_memory import (
    FLOAT32_BYTES,
    computing,
    experts_compute_in,
    gate_up,
    kept_by_experts,
    kept_by_layer,
    linears_compute_in,
    scores,
)
from expertune.planning.placement import PlannedPlacement
from expertune.planning.settings import Workload

# What a process holds beside the model. On a CPU: resident memory with every library imported, examples and tokenizer
# read, and GEMMs run once (0.68 to 0.78 GB measured). On CUDA: the context and the libraries' own (1.07 GB on an H100).
FRAMEWORK_BYTES = {"cpu": 780 * 10**6, "cuda": 1100 * 10**6}

# What the allocator keeps of freed memory, as a share of what a run allocates and frees again, and at most. On a CPU
# freed blocks below 32 MiB stay on the C allocator's heap, between others that are in use; every expert has its own
# number of tokens, so that few of them fit the next request. With experts on disk the heap is trimmed between layers.
# On CUDA it is what the caching allocator had reserved and not in use, 18 % of all but the model on an H100.
_KEPT_SHARE = {"cpu": 1.4, "trimmed": 0.5, "cuda": 0.2}
_MOST_KEPT_BYTES = 1050 * 10**6
_MODEL = ("weights", "slots", "workspace", "framework")
_THROUGHOUT = ("adapter", "first", "reference", "optimizer")  # allocated once

# Blocks from this size on the C allocator maps one by one, and no share of its heap counts them.
_MAPPED_BYTES = 32 * 2**20

# Bytes for each logit of a loss over all logits at once: the logits in 16 bits, and in float32 the logits, their
# log-softmax's gradient and the gradient of its input; without gradients one number less.
_TRAINING_BYTES_PER_LOGIT, _EVALUATION_BYTES_PER_LOGIT = 14, 10
# TRL's loss of answers that a run writes scales the logits by the temperature, and takes log-probabilities and
# entropies answer by answer; by the peaks of runs.
_WRITTEN_BYTES_PER_LOGIT = 32


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process on its device.

    The phases that can be the highest are `calibration` and `initialization` (of what 4 bits lost, where the run file
    asks for it), `preflight` (the check after attaching), `reference` (the objective's reference computes, beside what
    forward has kept), `loss` (forward is over), `layer` (a layer is in backward), `average` (ranks average gradients),
    `update` (the optimizer's), `save` (a checkpoint or the adapter is written), `evaluation`, `writing` (answers that
    are trained on) and `generation` (answers to evaluation examples). Only one of them happens at a time.

    Attributes:
        phases: phase -> bytes by component, those that are always held included.
        host_bytes: what is offloaded to a host's memory that is not the device's.
    """

    phases: Mapping[str, Mapping[str, int]]
    host_bytes: int = 0

    @property
    def totals(self) -> dict[str, int]:
        """Bytes in each phase."""
        return {phase: sum(components.values()) for phase, components in self.phases.items()}

    @property
    def phase(self) -> str:
        """When the peak is reached."""
        return max(self.totals, key=self.totals.__getitem__)

    @property
    def components(self) -> Mapping[str, int]:
        """Bytes by component at the peak."""
        return self.phases[self.phase]

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return sum(self.components.values())


def estimate_memory(w: Workload, placement: PlannedPlacement) -> Memory:
    """Peak memory of a run, by component and phase."""
    adapter = w.adapter_bytes
    always = {
        "weights": w.inventory.weights.frozen_bytes - placement.offloaded_bytes,
        "slots": w.gather_slot_bytes or (placement.mapped_bytes if w.device == "cpu" else placement.slot_bytes),
        "adapter": adapter,
        **({"first": adapter} if w.keeps_first else {}),
        "framework": FRAMEWORK_BYTES[w.device],
    }
    training = always | {"optimizer": w.optimizer_bytes}
    if w.reference_bytes:
        training["reference"] = w.reference_bytes
    check = w.of_batch(w.preflight_tokens, full_logits=True, offload=False, accumulates=False, kept_layers=0)
    evaluated = [w.of_batch(w.evaluation_tokens)] if w.evaluation_tokens else []
    prompt, at_once = w.sequence_length - w.passes.written, w.passes.written_at_once
    written = [w.of_batch(at_once * prompt, concatenates=False)] if w.passes.written else []
    answered = [w.of_batch(w.answered * prompt, concatenates=False)] if w.answered else []
    workspace = _workspace(w, check, *evaluated, *written, *answered)
    between_layers = training | workspace
    phases = {
        # Beside it are the B factors as they were, about half of the adapter.
        "preflight": always | {"copies": adapter // 2} | _preflight_phase(check),
        "loss": between_layers | _loss_phase(w),
        "layer": training | _beside_experts(workspace, w) | _layer_phase(w),
        "update": between_layers | {"gradients": adapter} | ({"updating": w.update_bytes} if w.update_bytes else {}),
        **({"average": between_layers | {"gradients": adapter, "bucket": w.bucket_bytes}} if w.bucket_bytes else {}),
        # Factors in the layout of the file, and the bytes that are written of them.
        "save": between_layers | {"copies": w.copied_bytes + (w.gathered_bytes if w.device == "cpu" else 0)},
    }
    if w.corrects:
        phases["initialization"] = always | {"matrix": w.matrix_bytes, "copies": 2 * adapter}
    if w.calibrates:
        phases["calibration"] = always | {"matrix": w.matrix_bytes, "evaluation": _forward(w)}
    for batch in evaluated:
        phases["evaluation"] = between_layers | _evaluation_phase(batch)
    for batch in written:
        phases["writing"] = between_layers | _generation_phase(batch, at_once, w.passes.written)
    if w.passes.silent and not written:
        phases["reference"] = between_layers | _reference_phase(w)
    for batch in answered:
        phases["generation"] = between_layers | _generation_phase(batch, w.answered, w.answer_tokens)
    kept = _kept_by_allocator(w, phases, placement.offloads_to("disk"))
    phases = {phase: {**components, "allocator": kept[phase]} for phase, components in phases.items()}
    on_host = placement.offloaded_bytes if placement.offloads_to("host") else 0
    return Memory(phases, on_host + (sum(_kept_by_layers(w)) if w.offload else 0))


# --- phases: what is held at once beside the model, the adapter and the optimizer's states ----------------------------


def _preflight_phase(check: Workload) -> dict[str, int]:
    """The check's own forward and backward, with all logits, beside the base model's logits.

    The forwards that are compared come to no more: at most two of them have their logits at once, before or after those
    with gradients, whose loss takes more than both.
    """
    workspace = _workspace(check)
    phases = workspace | _loss_phase(check), _beside_experts(workspace, check) | _layer_phase(check)
    highest = max(phases, key=lambda components: sum(components.values()))
    return highest | {"logits": highest["logits"] + _logits(check)}


def _loss_phase(w: Workload) -> dict[str, int]:
    """Forward is over, and the loss is taken."""
    gradients = w.adapter_bytes if w.accumulates else 0
    return {"gradients": gradients} | _activations(w) | {"logits": _loss(w, _TRAINING_BYTES_PER_LOGIT)}


def _layer_phase(w: Workload) -> dict[str, int]:
    """A layer is in backward; the logits of all tokens stay, because the trainer holds the model's output."""
    return {
        "gradients": w.adapter_bytes,
        **_activations(w),
        # What a layer computes with, and with checkpointing what its recomputed forward keeps.
        "working_set": max(
            computing(w, layer) + (kept_by_layer(w, layer) if w.checkpointing else 0) for layer in w.inventory.layers
        ),
        "logits": _logits(w) if w.full_logits else 0,
    }


def _reference_phase(w: Workload) -> dict[str, int]:
    """A forward without gradients, while what forward has kept waits for its loss."""
    gradients = w.adapter_bytes if w.accumulates else 0
    return {"gradients": gradients} | _activations(w) | _evaluation_phase(w)


def _evaluation_phase(w: Workload) -> dict[str, int]:
    """A forward without gradients: its loss, or one of its layers."""
    return {"evaluation": max(_loss(w, _EVALUATION_BYTES_PER_LOGIT), _forward_in_workspace(w))}


def _generation_phase(w: Workload, answered: int, answer_tokens: int) -> dict[str, int]:
    """Answers at once: attention or another part of a layer reads the prompts, or the last token is written.

    That token's keys and values are added by a copy of a layer's; its logits are also in float32. Meanwhile biases of
    experts are there in float32 too.
    """
    inventory, itemsize = w.inventory, w.compute_dtype.itemsize
    cache = (w.tokens + answered * answer_tokens) * inventory.cached_numbers * itemsize
    logits = answered * inventory.vocab_size * (itemsize + FLOAT32_BYTES)
    if not inventory.takes_logits_to_keep:
        logits += _logits(w)
    grown = cache // len(inventory.layers)
    biases = FLOAT32_BYTES * sum(_biases(spec) for layer in inventory.layers for spec in layer.experts.values())
    return {"cache": cache, "generation": max(_forward_in_workspace(w), _prefill(w), logits + grown) + biases}


def _biases(spec: ExpertsSpec) -> int:
    """Numbers of an expert layer's biases."""
    per_expert = (len(spec.projections) - 1) * spec.intermediate_size + spec.hidden_size
    return spec.num_experts * per_expert if spec.has_bias else 0


def _workspace(*batches: Workload) -> dict[str, int]:
    """What layers on a CPU have computed in, of any batch: it is kept (see `expertune.kernels.workspace`).

    Below `_MAPPED_BYTES` it lies on the C allocator's heap, whose share was measured with it.
    """
    kept = max(map(_experts_compute_in, batches)) + max(map(linears_compute_in, batches))
    return {"workspace": kept} if kept >= _MAPPED_BYTES else {}


def _beside_experts(workspace: Mapping[str, int], w: Workload) -> dict[str, int]:
    """What of that is not in the working set of a layer that computes."""
    return {name: rest for name, num_bytes in workspace.items() if (rest := num_bytes - _experts_compute_in(w)) > 0}


def _experts_compute_in(w: Workload) -> int:
    return max(experts_compute_in(w, layer) for layer in w.inventory.layers)


# --- components of the whole model ------------------------------------------------------------------------------------


def _kept_by_allocator(w: Workload, phases: Mapping[str, Mapping[str, int]], trimmed: bool) -> dict[str, int]:
    """Freed memory that the allocator keeps in each phase (see `_KEPT_SHARE`).

    What one phase has freed on the C allocator's heap is still there in the next one, unless the heap is trimmed.
    """
    if w.device != "cpu":
        share = _KEPT_SHARE[w.device]
        return {
            phase: int(share * sum(num_bytes for name, num_bytes in components.items() if name not in _MODEL))
            for phase, components in phases.items()
        }
    on_heap = {phase: _on_heap(w, phase, components) for phase, components in phases.items()}
    if trimmed:
        return {phase: int(min(_KEPT_SHARE["trimmed"] * each, _MOST_KEPT_BYTES)) for phase, each in on_heap.items()}
    return dict.fromkeys(phases, int(min(_KEPT_SHARE["cpu"] * max(on_heap.values()), _MOST_KEPT_BYTES)))


def _on_heap(w: Workload, phase: str, components: Mapping[str, int]) -> int:
    """What a phase allocates and frees again in blocks on the C allocator's heap; gradients as if they were there."""
    tokens = {"preflight": w.preflight_tokens, "evaluation": w.evaluation_tokens, "calibration": 0}.get(phase, w.tokens)
    mapped = {"gate_up"} if min(gate_up(w), default=0) >= _MAPPED_BYTES else set()
    if (w.full_logits or phase == "preflight") and _logits(w.of_batch(tokens)) >= _MAPPED_BYTES:
        mapped |= {"logits", "evaluation"}
    elsewhere = mapped.union(_MODEL, _THROUGHOUT, ["gradients"])
    return w.adapter_bytes + sum(num_bytes for name, num_bytes in components.items() if name not in elsewhere)


def _activations(w: Workload) -> dict[str, int]:
    """What forward keeps for backward, in all layers, with offloading in one; and gate and up where these are."""
    kept = _kept_by_layers(w)
    activations = (max(kept) if w.offload else sum(kept)) + _kept_for_router_losses(w)
    return {"activations": activations} | ({"gate_up": kept_gate_up(w)} if w.kept_layers else {})


def kept_gate_up(w: Workload) -> int:
    """Gate and up of the layers that keep them."""
    return sum(gate_up(w)[: w.kept_layers])


def _kept_for_router_losses(w: Workload) -> int:
    """The logits [T, E] of all layers, in float32 as well, and their softmax."""
    if not any(w.router_losses):
        return 0
    experts = sum(spec.num_experts for layer in w.inventory.layers for spec in layer.experts.values())
    return 3 * FLOAT32_BYTES * w.tokens * experts


def _kept_by_layers(w: Workload) -> list[int]:
    """What forward keeps of each layer: with checkpointing [T, D], its input, and what its experts keep."""
    if not w.checkpointing:
        return [kept_by_layer(w, layer) for layer in w.inventory.layers]
    hidden_states = w.tokens * w.inventory.hidden_size * w.compute_dtype.itemsize
    return [hidden_states + kept_by_experts(w, layer) for layer in w.inventory.layers]


def _logits(w: Workload) -> int:
    """Logits [T, V] of all tokens, or of those of answers."""
    return w.logit_tokens * w.inventory.vocab_size * w.compute_dtype.itemsize


def _loss(w: Workload, bytes_per_logit: int) -> int:
    """The loss over all logits, or over a chunk of them beside the hidden states and their gradient.

    With dropout the head's adapter has an input of its own, and that a gradient.
    """
    V, D = w.inventory.vocab_size, w.inventory.hidden_size
    if w.full_logits:
        return w.logit_tokens * V * (_WRITTEN_BYTES_PER_LOGIT if w.passes.written else bytes_per_logit)
    dropped = w.adapter_dtype.itemsize if w.dropout else 0
    hidden_states = 2 * w.tokens * D * (w.compute_dtype.itemsize + dropped)
    return hidden_states + loss_working_set_bytes(w.tokens, V, D, w.compute_dtype, w.device, _rank_of_head(w))


def _rank_of_head(w: Workload) -> int:
    """The rank of the output head's update; 0 where it has none."""
    return sum(rank for name, (rank, _) in w.targets.linears.items() if name == w.inventory.head)


def _forward(w: Workload) -> int:
    """A layer's forward without gradients; what it computes with is as much as in backward."""
    return _input(w) + max(computing(w, layer) for layer in w.inventory.layers)


def _forward_in_workspace(w: Workload) -> int:
    """What that takes beside the workspace."""
    return _forward(w) - (_experts_compute_in(w) if _workspace(w) else 0)


def _prefill(w: Workload) -> int:
    """Attention over prompts of different length: mask, queries, keys, values and output, each twice."""
    itemsize = w.compute_dtype.itemsize
    mask = w.tokens * w.sequence_length * (1 + itemsize)
    return _input(w) + mask + 2 * w.tokens * w.inventory.attention.widths * itemsize + scores(w, 2 * w.tokens)


def _input(w: Workload) -> int:
    """A layer's input [T, D], and what its norm makes of it, in float32."""
    return 2 * FLOAT32_BYTES * w.tokens * w.inventory.hidden_size
