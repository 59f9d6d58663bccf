"""What a run file says about memory."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from expertune.config import RunConfig
from expertune.kernels.routes import default_working_set_bytes
from expertune.train.optim import default_optimizer, state_bytes

# Tokens of the preflight check after attaching: enough for every expert of a layer to be reached, few enough to cost a
# second.
PREFLIGHT_TOKENS = 512


@dataclass(frozen=True)
class Settings:
    """The part of a run file that decides memory.

    Attributes:
        tokens: T, an upper bound: batch size times the longest sequence.
        sequence_length: S.
        preflight_tokens: T of the preflight check's batch.
        evaluation_tokens: T of an evaluation batch; 0 without evaluation examples.
        answered: examples that are answered at once for the task's metric; 0 without one.
        answer_tokens: tokens of the longest answer.
        checkpointing: layers are computed again in backward, and keep only their input meanwhile.
        dropout: the adapter drops inputs.
        working_set_bytes: most bytes of an expert layer's routed tokens between its GEMMs.
        full_logits: the loss is taken over the logits of all tokens at once, not over a chunk of tokens at a time.
        accumulates: gradients of earlier micro-batches are there while a micro-batch runs.
        offload: what forward keeps for backward is offloaded to the host's memory; never on a CPU, whose memory that
            is.
        optimizer: TrainingArguments' `optim`.
        adapter_dtype: dtype of the adapter's weights and gradients.
        compute_dtype: dtype of activations and of all weights that are not 4-bit.
        device: `cpu` or `cuda`.
    """

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
    adapter_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: str

    def optimizer_bytes(self, num_trainable: int) -> int:
        """Bytes of the optimizer's states."""
        return state_bytes(self.optimizer, num_trainable, self.adapter_dtype.itemsize, self.device)


def read_settings(config: RunConfig, device: str, compute_dtype: torch.dtype) -> Settings:
    """The settings of a run file, with TrainingArguments' defaults for what it leaves out."""
    length, training = config.data.max_length, config.training
    batch = int(training_argument(training, "per_device_train_batch_size"))
    evaluation_batch = int(training_argument(training, "per_device_eval_batch_size")) if config.data.eval else 0
    return Settings(
        tokens=batch * length,
        sequence_length=length,
        preflight_tokens=max(PREFLIGHT_TOKENS, length) if config.data.packing == "padded" else PREFLIGHT_TOKENS,
        evaluation_tokens=evaluation_batch * length,
        answered=answered_at_once(config) if writes_answers(config) else 0,
        answer_tokens=config.task.max_new_tokens,
        checkpointing=uses_checkpointing(training),
        dropout=config.lora.dropout > 0,
        working_set_bytes=config.kernels.working_set_bytes or default_working_set_bytes(device),
        full_logits=config.loss == "full"
        or any(training.get(key) for key in ("label_smoothing_factor", "torch_compile")),
        accumulates=int(training_argument(training, "gradient_accumulation_steps")) > 1,
        offload=config.offload_activations and device != "cpu",
        optimizer=str(training.get("optim", default_optimizer(device))),
        adapter_dtype=torch.float32 if config.lora.dtype == "float32" else torch.bfloat16,
        compute_dtype=compute_dtype,
        device=device,
    )


def writes_answers(config: RunConfig) -> bool:
    """Whether the run writes answers to evaluation examples, and scores them."""
    return bool(config.task.metric and config.data.eval)


def answered_at_once(config: RunConfig) -> int:
    """Examples of the largest batch of answers."""
    return min(config.task.batch_size, config.task.rows or config.task.batch_size)


def training_argument(training: Mapping[str, Any], name: str) -> Any:
    """A key under `training:`, or TrainingArguments' own default."""
    if name in training:
        return training[name]
    return next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == name)


def uses_checkpointing(training: Mapping[str, Any]) -> bool:
    """Whether layers are recomputed; TrainingArguments has two names for it, the older one deprecated."""
    return bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))
