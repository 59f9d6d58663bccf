"""What a run file says about memory and time, on one model."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from expertune.adapt.amounts import preflight_tokens
from expertune.checkpoint.targets import ResolvedTargets
from expertune.config import RunConfig
from expertune.config.training_keys import MUON
from expertune.distributed.shares import BUCKET_BYTES
from expertune.errors import ConfigError
from expertune.kernels.amounts import BFLOAT16, FLOAT32, Dtype, default_working_set_bytes
from expertune.objectives.units import aux_coefficient
from expertune.planning.inventory import Inventory, Layer, count_adapter, count_by_adamw, factor_sizes
from expertune.planning.passes import Passes, passes_of
from expertune.train.arguments import (
    ACCUMULATION,
    BATCH_SIZE,
    EVALUATION_BATCH_SIZE,
    training_argument,
    uses_checkpointing,
)
from expertune.train.optimizers import NOTHING_FOR_MUON, default_optimizer, state_bytes, update_bytes

# Of a tensor in the header of a safetensors file, at most: name (as long as models have them), dtype, shape, place.
_HEADER_BYTES = 256


@dataclass(frozen=True)
class Workload:
    """What runs: a model's shapes, what its adapter changes, and the part of the run file that decides memory.

    Attributes:
        inventory: the model's shapes.
        targets: what the adapter changes.
        device: `cpu` or `cuda`.
        compute_dtype: dtype of activations and of all weights that are not 4-bit.
        adapter_dtype: dtype of the adapter's weights and gradients.
        tokens: T, an upper bound: batch size times the longest sequence, of pairs both sides.
        sequence_length: S; of a prompt whose answer is written, with it.
        preflight_tokens: T of the preflight check's batch.
        evaluation_tokens: T of an evaluation batch; 0 without evaluation examples, and where these are answered.
        answered: examples that are answered at once, for the task's metric or for rewards; 0 without either.
        answer_tokens: tokens of the longest answer.
        checkpointing: layers are computed again in backward, and keep only their input meanwhile.
        dropout: the adapter drops inputs.
        working_set_bytes: most bytes of an expert layer's routed tokens between its GEMMs.
        full_logits: the loss is taken over the logits of all tokens at once, not over a chunk of tokens at a time.
        accumulates: gradients of earlier micro-batches are there while a micro-batch runs.
        offload: what forward keeps for backward is offloaded to the host's memory; never on a CPU, whose memory that
            is.
        optimizer: TrainingArguments' `optim`.
        corrects: first factors are computed of each matrix once, before training.
        keeps_first: the adapter's first factors are kept, and taken away from what it gives.
        calibrates: a sample passes through the model once, before training.
        router_losses: coefficients of the routers' load-balancing loss and z-loss.
        passes: what the objective asks of the model besides.
        kept_layers: of the expert layers, how many of the last keep gate and up from forward for backward.
        concatenates: the sequences of a batch follow one another in one, without padding.
    """

    inventory: Inventory
    targets: ResolvedTargets
    device: str
    compute_dtype: Dtype
    adapter_dtype: Dtype
    tokens: int
    sequence_length: int
    preflight_tokens: int
    evaluation_tokens: int
    answered: int
    answer_tokens: int
    checkpointing: bool
    dropout: bool
    working_set_bytes: int
    full_logits: bool
    accumulates: bool
    offload: bool
    optimizer: str
    passes: Passes
    router_losses: tuple[float, float] = (0.0, 0.0)
    corrects: bool = False
    keeps_first: bool = False
    calibrates: bool = False
    kept_layers: int = 0
    concatenates: bool = False

    @cached_property
    def adapter_bytes(self) -> int:
        """The adapter's weights that a process trains; their gradients are as many bytes."""
        return count_adapter(self.inventory, self.targets, self.inventory.experts_here) * self.adapter_dtype.itemsize

    @property
    def matrix_bytes(self) -> int:
        """Where 16-bit matrices are looked at one by one: the largest, what 4 bits hold of it, and their difference.

        Four numbers in float32 for each weight: the source has at most one, and the decomposition of a large matrix
        takes few rows and columns beside it.
        """
        return 16 * max((rows * columns for rows, columns in self.inventory.matrices), default=0)

    @property
    def optimizer_bytes(self) -> int:
        """The optimizer's states, of what a process trains."""
        return self._states(count_adapter(self.inventory, self.targets, self.inventory.experts_here))

    @property
    def given_ranks(self) -> int:
        """How many times its rank the update has that an adapter gives."""
        return 2 if self.keeps_first else 1

    def given_factor_bytes(self, layer: Layer) -> int:
        """Where first factors are taken away: the factors of twice the rank that a layer computes with."""
        if not self.keeps_first:
            return 0
        adapted = self.targets.linears.keys() & layer.linears.keys()
        numbers = sum(self.targets.linears[name].rank * sum(layer.linears[name]) for name in adapted)
        for name, spec in layer.experts.items():
            for projection, rank in self.targets.experts.get(name, {}).items():
                numbers += spec.num_experts * rank.rank * sum(spec.shape(projection))
        return self.given_ranks * numbers * self.adapter_dtype.itemsize

    @property
    def copied_bytes(self) -> int:
        """Where the adapter is written: factors in the layout of the file, and the bytes that are written of them."""
        return 2 * self.given_ranks * self.adapter_bytes

    @property
    def written_bytes(self) -> int:
        """The adapter's files; those of twice the rank have B to the bit beside them, as it is given and trained."""
        if not self.keeps_first:
            return self.adapter_bytes
        # Twice the rank in the file, and B once more as it is trained. Twice more as it is given, where the scale in B
        # rounds; of 16 bits, where it would, the file has B in float32 instead, which is as many bytes.
        numbers_b = self._numbers_of_b()
        return self.adapter_bytes * 2 + 3 * numbers_b * self.adapter_dtype.itemsize + self._header_bytes(4)

    @property
    def first_bytes(self) -> int:
        """The file of the factors that are taken away from what the adapter gives."""
        return self.adapter_bytes + self._header_bytes(2) if self.keeps_first else 0

    def _numbers_of_b(self) -> int:
        """Weights of the adapter's factors B."""
        inventory, targets = self.inventory, self.targets
        linears = (rank.rank * inventory.linears[name][0] for name, rank in targets.linears.items())
        routers = (rank.rank * inventory.routers[name].num_experts for name, rank in targets.router.items())
        experts = (
            inventory.specs[name].num_experts * rank.rank * inventory.specs[name].shape(projection)[0]
            for name, ranks in targets.experts.items()
            for projection, rank in ranks.items()
        )
        return sum(linears) + sum(routers) + sum(experts)

    def _header_bytes(self, tensors: int) -> int:
        """What files say of their tensors, where there are so many for each matrix that the adapter changes."""
        targets, specs = self.targets, self.inventory.specs
        of_experts = sum(specs[name].num_experts * len(ranks) for name, ranks in targets.experts.items())
        return tensors * _HEADER_BYTES * (len(targets.linears) + len(targets.router) + of_experts)

    @property
    def reference_bytes(self) -> int:
        """The adapter that training starts from, where it is kept as the reference."""
        return self.adapter_bytes if self.passes.keeps_start else 0

    @property
    def logit_tokens(self) -> int:
        """Tokens whose logits there are where there are all: of an answer that was written, not of its prompt."""
        if not self.passes.written or not self.inventory.takes_logits_to_keep:
            return self.tokens
        return self.tokens * min(self.passes.written + 1, self.sequence_length) // self.sequence_length

    @property
    def gather_slot_bytes(self) -> int:
        """Where ranks hold slices of the experts: two whole layers, one in use and one being gathered."""
        inventory = self.inventory
        return 2 * max(inventory.layer_bytes) if inventory.distribution.slices > 1 else 0

    @property
    def bucket_bytes(self) -> int:
        """What gradients are copied to while ranks average them: a bucket, or the largest tensor; all if that is less.

        The tensors of an expert layer are stacked, each as large as the rank has experts.
        """
        if self.inventory.distribution.world_size == 1:
            return 0
        largest = max(factor_sizes(self.inventory, self.targets, self.inventory.experts_here), default=0)
        return min(max(BUCKET_BYTES, largest * self.adapter_dtype.itemsize), self.adapter_bytes)

    @property
    def gathered_bytes(self) -> int:
        """Where experts are shared out: what the process that saves has on its host of all experts.

        The adapter, its factors as they are written and as they are compared, and the optimizer's states.
        """
        if self.inventory.distribution.expert_ranks == 1:
            return 0
        count = count_adapter(self.inventory, self.targets)
        return 3 * count * self.adapter_dtype.itemsize + self._states(count)

    @property
    def rows_per_token(self) -> int:
        """Where experts are shared out: rows for each token that reach a process's experts, if all have as many."""
        return self.inventory.top_k if self.inventory.distribution.expert_ranks > 1 else 0

    @property
    def update_bytes(self) -> int:
        """What the optimizer's update takes for the factor that it is at."""
        largest = max(factor_sizes(self.inventory, self.targets, self.inventory.experts_here), default=0)
        return update_bytes(self.optimizer, largest, self.device)

    def _states(self, count: int) -> int:
        by_adamw = count_by_adamw(self.inventory, self.targets) if self.optimizer == MUON else 0
        return state_bytes(self.optimizer, count, self.adapter_dtype.itemsize, self.device, by_adamw)

    def of_batch(self, tokens: int, **changes: Any) -> "Workload":
        """The same for a batch of so many tokens."""
        return replace(self, tokens=tokens, sequence_length=min(self.sequence_length, tokens), **changes)


def read_workload(
    config: RunConfig, inventory: Inventory, targets: ResolvedTargets, device: str, compute_dtype: Dtype
) -> Workload:
    """What a run file asks for, with TrainingArguments' defaults for what it leaves out."""
    training, passes = config.training, passes_of(config)
    length = config.data.max_length + passes.written
    optimizer = str(training.get("optim", default_optimizer(device)))
    if optimizer == MUON and count_by_adamw(inventory, targets) == count_adapter(inventory, targets):
        raise ConfigError(NOTHING_FOR_MUON)
    checked = preflight_tokens(inventory.specs)
    evaluated = 0 if not config.data.eval or passes.written else int(training_argument(training, EVALUATION_BATCH_SIZE))
    return Workload(
        inventory=inventory,
        targets=targets,
        device=device,
        compute_dtype=compute_dtype,
        adapter_dtype=FLOAT32 if config.lora.dtype == "float32" else BFLOAT16,
        tokens=int(training_argument(training, BATCH_SIZE)) * passes.sequences * length,
        sequence_length=length,
        preflight_tokens=max(checked, length) if config.data.packing == "padded" else checked,
        evaluation_tokens=evaluated * passes.sequences * length,
        answered=answered_at_once(config),
        answer_tokens=longest_answer(config),
        checkpointing=uses_checkpointing(training),
        dropout=config.lora.dropout > 0,
        working_set_bytes=config.kernels.working_set_bytes or default_working_set_bytes(device),
        full_logits=config.loss == "full"
        or passes.written > 0  # TRL's own loss
        or (targets.use_dora and inventory.head in targets.linears)
        or any(training.get(key) for key in ("label_smoothing_factor", "torch_compile")),
        accumulates=int(training_argument(training, ACCUMULATION)) > 1,
        offload=config.offload_activations and device != "cpu",
        optimizer=optimizer,
        corrects=config.lora.init != "default",
        keeps_first=config.lora.init == "pissa",
        calibrates=config.is_calibrated,
        router_losses=(
            aux_coefficient(config, inventory.traits) or 0.0,
            config.router.z_loss,
        ),
        passes=passes,
        concatenates=config.data.packing != "padded" and not passes.written,  # TRL pads what it has written
    )


def answered_at_once(config: RunConfig) -> int:
    """Evaluation examples in the largest batch of answers; 0 for a run that answers none."""
    task = config.task
    if config.data.eval and passes_of(config).written:  # an evaluation rewards an answer to each
        return task.batch_size
    return min(task.batch_size, task.rows or task.batch_size) if task.metric else 0


def longest_answer(config: RunConfig) -> int:
    """Tokens of the longest answer to an evaluation example."""
    written = passes_of(config).written if config.data.eval else 0
    return max(written, config.task.max_new_tokens) if config.task.metric else written
