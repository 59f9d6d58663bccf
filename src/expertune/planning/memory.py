"""Peak memory of a run: one formula for each component, and which components each phase of the run holds.

Frozen weights, adapter, gradients and optimizer states follow from shapes and dtypes. Everything else is an upper bound
from shapes, and each formula says what it counts. `benchmarks/plan_accuracy.py` checks the peak against real runs: none
may take more than its plan, and the plan may be a third above what the run takes.

Shape suffixes: T tokens of a micro-batch, S tokens of a sequence, D hidden size, F intermediate size, V vocabulary,
E experts, R routed tokens, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from expertune.checkpoint.targets import ResolvedTargets
from expertune.experts.contract import ExpertsSpec
from expertune.kernels.dequant_gemm import TILE_BYTES
from expertune.kernels.expert_mlp.plan import bytes_per_routed_token
from expertune.kernels.linear_cross_entropy import working_set_bytes
from expertune.planning.inventory import FrozenWeights, Inventory, Layer, count_adapter
from expertune.planning.placement import Offloading
from expertune.planning.settings import Settings

_FLOAT32_BYTES = 4

# What a process holds beside the model. On a CPU: resident memory with every library imported, examples and tokenizer
# read, and GEMMs run once (0.70 GB measured). On CUDA: the context and the libraries' own memory (1.07 GB on an H100).
FRAMEWORK_BYTES = {"cpu": 750 * 10**6, "cuda": 1100 * 10**6}

# What the allocator keeps of freed memory, as a share of what a run allocates beside the model, and at most. On a CPU
# freed blocks below 32 MiB stay on the C allocator's heap, between others that are in use; every expert has its own
# number of tokens, so that few of them fit the next request. With experts on disk the heap is trimmed between layers.
# On CUDA it is what the caching allocator had reserved and not in use, 18 % on an H100.
_KEPT_SHARE = {"cpu": 1.35, "trimmed": 0.5, "cuda": 0.2}
_MOST_KEPT_BYTES = {"cpu": 1050 * 10**6}
_MODEL = ("weights", "slots", "framework")

# Bytes for each logit of a loss over all logits at once: the logits in 16 bits, and in float32 the logits, their
# log-softmax's gradient and the gradient of its input; without gradients one number less.
_TRAINING_BYTES_PER_LOGIT, _EVALUATION_BYTES_PER_LOGIT = 14, 10


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process on its device.

    The phases that can be the highest are `preflight` (the check after attaching), `loss` (forward is over),
    `layer` (a layer is in backward), `update` (the optimizer's), `save` (a checkpoint or the adapter is written),
    `evaluation`, and `generation` (answers for the task's metric). Only one of them happens at a time.

    Attributes:
        phases: phase -> bytes by component, those that are always held included.
        host_bytes: what is offloaded to a host's memory that is not the device's.
    """

    phases: Mapping[str, Mapping[str, int]]
    host_bytes: int = 0

    @property
    def phase(self) -> str:
        """When the peak is reached."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def components(self) -> Mapping[str, int]:
        """Bytes by component at the peak."""
        return self.phases[self.phase]

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return sum(self.components.values())

    @property
    def totals(self) -> dict[str, int]:
        """Bytes in each phase."""
        return {phase: sum(components.values()) for phase, components in self.phases.items()}


def estimate_memory(
    inventory: Inventory,
    targets: ResolvedTargets,
    weights: FrozenWeights,
    settings: Settings,
    offloading: Offloading,
) -> Memory:
    """Peak memory of a run, by component and phase.

    Args:
        inventory: the model's shapes.
        targets: what the adapter changes.
        weights: bytes of the base model.
        settings: what the run file says.
        offloading: expert bytes that are held elsewhere than on the device.
    """
    step = _Components(inventory, targets, settings)
    adapter = step.adapter
    always = {
        "weights": weights.frozen_bytes - offloading.offloaded_bytes,
        "slots": offloading.slot_bytes,
        "adapter": adapter,
        "framework": FRAMEWORK_BYTES[settings.device],
    }
    training = always | {"optimizer": settings.optimizer_bytes(count_adapter(inventory, targets))}
    phases = {
        # Beside it are the B factors as they were, about half of the adapter, and the base model's logits.
        "preflight": always | {"copies": adapter // 2} | _preflight(step),
        "loss": training | step.loss_phase(),
        "layer": training | step.layer_phase(),
        "update": training | {"gradients": adapter},
        # Factors in the layout of the file, and the bytes that are written of them.
        "save": training | {"copies": 2 * adapter},
    }
    if settings.evaluation_tokens:
        phases["evaluation"] = training | step.of_batch(settings.evaluation_tokens).evaluation_phase()
    if settings.answered:
        phases["generation"] = training | step.of_batch(settings.answered * settings.sequence_length).generation_phase()
    trimmed = settings.device == "cpu" and offloading.location == "disk"
    allocator = "trimmed" if trimmed else settings.device
    for components in phases.values():
        allocated = sum(num_bytes for name, num_bytes in components.items() if name not in _MODEL)
        kept = _KEPT_SHARE[allocator] * allocated
        components["allocator"] = int(min(kept, _MOST_KEPT_BYTES.get(settings.device, kept)))
    on_host = offloading.offloaded_bytes if offloading.location == "host" else 0
    return Memory(phases, on_host + (sum(step.kept_by_layers()) if settings.offload else 0))


def _preflight(step: "_Components") -> dict[str, int]:
    """The preflight check's own forward and backward, with all logits, beside the base model's logits."""
    settings = step.settings
    check = step.of_batch(settings.preflight_tokens, full_logits=True, offload=False, accumulates=False)
    phases = check.loss_phase(), check.layer_phase()
    highest = max(phases, key=lambda components: sum(components.values()))
    return highest | {"logits": highest["logits"] + check.logits}


@dataclass(frozen=True)
class _Components:
    """One formula for each component, for one kind of batch."""

    inventory: Inventory
    targets: ResolvedTargets
    settings: Settings

    def of_batch(self, tokens: int, **changes: Any) -> "_Components":
        """The same for another batch."""
        length = min(self.settings.sequence_length, tokens)
        return replace(self, settings=replace(self.settings, tokens=tokens, sequence_length=length, **changes))

    # --- phases -----------------------------------------------------------------------------------------------------

    def loss_phase(self) -> dict[str, int]:
        """Forward is over, and the loss is taken."""
        s = self.settings
        return {
            "gradients": self.adapter if s.accumulates else 0,
            "activations": self.activations,
            "logits": self.loss(_TRAINING_BYTES_PER_LOGIT),
        }

    def layer_phase(self) -> dict[str, int]:
        """A layer is in backward; the logits of all tokens stay, because the trainer holds the model's output."""
        return {
            "gradients": self.adapter,
            "activations": self.activations,
            "working_set": max(self.backward(layer) for layer in self.inventory.layers),
            "logits": self.logits if self.settings.full_logits else 0,
        }

    def evaluation_phase(self) -> dict[str, int]:
        """A forward without gradients: its loss, or one of its layers."""
        return {"evaluation": max(self.loss(_EVALUATION_BYTES_PER_LOGIT), self.forward)}

    def generation_phase(self) -> dict[str, int]:
        """Answers: attention or another part of a layer reads the prompts, or the last token is written.

        That token's keys and values are added by a copy of a layer's; its logits are also in float32.
        """
        s, inventory = self.settings, self.inventory
        numbers = s.answered * (s.sequence_length + s.answer_tokens) * inventory.cached_numbers
        cache = numbers * s.compute_dtype.itemsize
        logits = s.answered * inventory.vocab_size * (s.compute_dtype.itemsize + _FLOAT32_BYTES)
        if not inventory.takes_logits_to_keep:
            logits += self.logits
        grown = cache // len(inventory.layers)
        return {"cache": cache, "generation": max(self.forward, self.hidden + self.prefill, logits + grown)}

    # --- of the whole model -----------------------------------------------------------------------------------------

    @property
    def adapter(self) -> int:
        """The adapter's weights; its gradients are as many bytes."""
        return count_adapter(self.inventory, self.targets) * self.settings.adapter_dtype.itemsize

    @property
    def activations(self) -> int:
        """What forward keeps for backward, in all layers; with offloading in one."""
        kept = self.kept_by_layers()
        return max(kept) if self.settings.offload else sum(kept)

    def kept_by_layers(self) -> list[int]:
        """What forward keeps of each layer: with checkpointing [T, D], its input, and what its experts keep."""
        s = self.settings
        if not s.checkpointing:
            return [self.kept(layer) for layer in self.inventory.layers]
        hidden_states = s.tokens * self.inventory.hidden_size * s.compute_dtype.itemsize
        return [hidden_states + self.kept_by_experts(layer) for layer in self.inventory.layers]

    @property
    def logits(self) -> int:
        """Logits [T, V] of all tokens."""
        return self.settings.tokens * self.inventory.vocab_size * self.settings.compute_dtype.itemsize

    def loss(self, bytes_per_logit: int) -> int:
        """The loss over all logits, or over a chunk of them beside the hidden states and their gradient.

        With dropout the head's adapter has an input of its own, and that a gradient.
        """
        s, D = self.settings, self.inventory.hidden_size
        if s.full_logits:
            return s.tokens * self.inventory.vocab_size * bytes_per_logit
        chunk = working_set_bytes(s.tokens, self.inventory.vocab_size, D, s.compute_dtype, s.device)
        dropped = s.adapter_dtype.itemsize if s.dropout else 0
        return 2 * s.tokens * D * (s.compute_dtype.itemsize + dropped) + chunk

    @property
    def hidden(self) -> int:
        """A layer's input, and what its norm makes of it, in float32."""
        return 2 * _FLOAT32_BYTES * self.settings.tokens * self.inventory.hidden_size

    @property
    def forward(self) -> int:
        """A layer's forward without gradients; what it computes with is as much as in backward."""
        return self.hidden + max(self.computing(layer) for layer in self.inventory.layers)

    @property
    def prefill(self) -> int:
        """Attention over prompts of different length: mask, queries, keys, values and output, each twice."""
        s, attention = self.settings, self.inventory.attention
        pairs, itemsize = s.tokens * s.sequence_length, s.compute_dtype.itemsize
        return pairs * (1 + itemsize) + 2 * s.tokens * attention.widths * itemsize + self.scores(2 * s.tokens)

    # --- of one layer -----------------------------------------------------------------------------------------------

    def kept(self, layer: Layer) -> int:
        """What a layer's forward keeps for its backward.

        A norm keeps its input in float32. PEFT keeps the input of each adapted linear in the adapter's dtype (a GPU's
        dropout a copy beside it), and x @ A. A linear outside attention keeps its output, and what an activation makes
        of it.
        """
        s, attention = self.settings, self.inventory.attention
        adapter, itemsize = s.adapter_dtype.itemsize, s.compute_dtype.itemsize
        # On a CPU attention of short sequences computes in float32.
        attended = _FLOAT32_BYTES if s.device == "cpu" else itemsize
        per_token = _FLOAT32_BYTES * sum(layer.norms) + attended * attention.widths + _FLOAT32_BYTES * attention.heads
        copies = 2 if s.dropout and s.device != "cpu" else 1
        for name, (out_features, in_features) in layer.linears.items():
            if name in self.targets.linears:
                per_token += (copies * in_features + self.targets.linears[name].rank) * adapter
            if "att" not in name.split(".")[-2]:
                per_token += 2 * out_features * itemsize
        # The router's logits, and indices and weights of the chosen experts.
        per_token += sum(
            spec.num_experts * _FLOAT32_BYTES + 16 * self.inventory.top_k for spec in layer.experts.values()
        )
        return s.tokens * per_token + self.scores(s.tokens) + self.kept_by_experts(layer)

    def kept_by_experts(self, layer: Layer) -> int:
        """What a layer's experts keep: [T, D], their input or what they return, and x @ A of each projection [R, r]."""
        s, per_token = self.settings, 0
        for name, spec in layer.experts.items():
            ranks = sum(rank for rank, _ in self.targets.experts.get(name, {}).values())
            per_token += spec.hidden_size * s.compute_dtype.itemsize
            per_token += self.inventory.top_k * ranks * s.adapter_dtype.itemsize
        return s.tokens * per_token

    def backward(self, layer: Layer) -> int:
        """A layer's backward: what it computes with, and with checkpointing what its recomputed forward keeps."""
        return self.computing(layer) + (self.kept(layer) if self.settings.checkpointing else 0)

    def computing(self, layer: Layer) -> int:
        """What a layer computes with: routed tokens or a linear's output and update, or scores; dequantized weights."""
        s = self.settings
        # A linear's output and its update in float32, and their gradients.
        widest = max((out_features for out_features, _ in layer.linears.values()), default=0)
        around_linears = 4 * s.tokens * widest * _FLOAT32_BYTES
        routed = sum(self.between_gemms(spec) for spec in layer.experts.values())
        dequantized = [rows * columns * s.compute_dtype.itemsize for rows, columns in layer.linears.values()]
        # On a GPU dequantized experts are in the working set.
        tile = TILE_BYTES["cpu"] if s.device == "cpu" else 0
        return max(routed, around_linears, self.scores(3 * s.sequence_length)) + max(tile, *dequantized, 0)

    def between_gemms(self, spec: ExpertsSpec) -> int:
        """Routed tokens between an expert layer's GEMMs, and its input, output and their gradients [T, D] in float32.

        On a GPU half of the working set is for routed tokens and half for dequantized weights, of one expert at least.
        """
        s, D, F, num_parts = self.settings, spec.hidden_size, spec.intermediate_size, len(spec.projections) - 1
        row = bytes_per_routed_token(D, F, num_parts, spec.has_gate, s.dropout, s.device)
        routed, around = s.tokens * self.inventory.top_k * row, 4 * s.tokens * D * _FLOAT32_BYTES
        if s.device == "cpu":
            return min(routed, s.working_set_bytes) + around
        half, one_expert = s.working_set_bytes // 2, (num_parts + 1) * D * F * s.compute_dtype.itemsize
        return min(routed, half) + min(spec.num_experts * one_expert, max(half, one_expert)) + around

    def scores(self, num_tokens: int) -> int:
        """Attention scores [heads, T, S] in float32, where torch computes all of them at once.

        It does on a CPU where values are not as wide as keys.
        """
        attention = self.inventory.attention
        if self.settings.device != "cpu" or attention.query == attention.output:
            return 0
        return _FLOAT32_BYTES * attention.heads * num_tokens * self.settings.sequence_length
