"""Memory that runs out on purpose: the expert layer's operator fails where a batch is too large for it."""

import inspect
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from expertune import finetune
from expertune.config import parse_config
from expertune.experts import module
from expertune.generation import decoding
from expertune.run import training as run_training
from expertune.run.record import RunRecord

# Any sequence of the fixture fits, two of them do not.
ONE_SEQUENCE = 24
NO_SEQUENCE = 4

SMALL = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}

Reference = Callable[..., tuple[RunRecord, bytes]]


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def run(
    values: dict[str, Any], out: Path, resume: bool = False, said: io.StringIO | None = None, **changes: Any
) -> RunRecord:
    """A whole run, with some of its training arguments changed; `said` gets what it shows."""
    training = values["training"] | changes.pop("training", {})
    console = Console(file=io.StringIO() if said is None else said)
    return finetune(
        parse_config(values | {"output_dir": str(out), "training": training} | changes), resume=resume, console=console
    ).record


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def training(scarce: "Scarce") -> bool:
    return scarce.trainer is not None and torch.is_grad_enabled()


def evaluating(scarce: "Scarce") -> bool:
    """In the evaluations of training."""
    return scarce.trainer is not None and not torch.is_grad_enabled()


def generating(scarce: "Scarce") -> bool:
    return scarce.generating


def outside_training(scarce: "Scarce") -> bool:
    """Without gradients, before or after training, and not generating."""
    return scarce.trainer is None and not scarce.generating and not torch.is_grad_enabled()


def before_training(scarce: "Scarce") -> bool:
    """In the preflight check."""
    return scarce.trainer is None and not scarce.generating


class Scarce:
    """Fails in the expert layer, as an allocator would.

    Args:
        most_tokens: more tokens than these at once do not fit.
        backward: fail in backward instead of forward.
        first_layer: number of the expert layer's forward, counted over the run, from which memory is scarce; there are
            two in each micro-batch.
        when: whether memory is scarce now.
        error: makes what is raised.
    """

    def __init__(
        self,
        most_tokens: int,
        backward: bool = False,
        first_layer: int = 1,
        when: "Callable[[Scarce], bool]" = training,
        error: Callable[[], Exception] = out_of_memory,
    ) -> None:
        self.most_tokens, self.backward, self.first_layer = most_tokens, backward, first_layer
        self.when, self.error = when, error
        self.num_layers = self.num_failures = 0
        self.most_seen = 0
        self.trainer: Any = None
        self.generating = False

    def too_large(self, tokens: int) -> bool:
        return tokens > self.most_tokens

    def fail(self, *_: object) -> None:
        self.num_failures += 1
        raise self.error()

    def install(self, patch: pytest.MonkeyPatch) -> "Scarce":
        """Make memory scarce."""
        real, decode = module.expert_mlp, decoding.decode
        scarce = self

        def expert_mlp(hidden: Tensor, *arguments: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Tensor]]:
            output, low_rank = real(hidden, *arguments, **kwargs)
            replayed = inspect.signature(real).bind(hidden, *arguments, **kwargs).arguments.get("replay")
            if replayed or not scarce.when(scarce):
                return output, low_rank
            scarce.num_layers += 1
            if scarce.num_layers >= scarce.first_layer and scarce.too_large(hidden.shape[0]):
                if scarce.backward:
                    output.register_hook(scarce.fail)
                else:
                    scarce.fail()
            else:
                scarce.most_seen = max(scarce.most_seen, hidden.shape[0])
            return output, low_rank

        def marked(*arguments: Any, **kwargs: Any) -> Any:
            scarce.generating = True
            try:
                return decode(*arguments, **kwargs)
            finally:
                scarce.generating = False

        class Trainer(run_training.ExpertTrainer):
            def train(self, *args: Any, **kwargs: Any) -> Any:
                scarce.trainer = self
                try:
                    return super().train(*args, **kwargs)
                finally:
                    scarce.trainer = None

        # Few tokens of an answer take the same way as others.
        patch.setattr(module, "of_answer", lambda *_: None)
        patch.setattr(module, "expert_mlp", expert_mlp)
        patch.setattr(decoding, "decode", marked)
        patch.setattr(run_training, "ExpertTrainer", Trainer)
        return self
