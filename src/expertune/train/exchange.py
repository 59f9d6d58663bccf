"""What the ranks of a run exchange in training: first weights, gradients and their norm, random states, the adapter.

Of one process nothing is exchanged. Where ranks share the experts out, each has factors that no other has.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.distributed.mesh import Ranks
from expertune.errors import ConfigError
from expertune.experts.lora import factors_of_all, own_factors
from expertune.experts.module import parallel_of
from expertune.train.finite import gradients_among
from expertune.train.own_states import require_states_by_expert


class Exchange:
    """A rank's part of what is exchanged; all ranks call each method, in the same order.

    Args:
        model: what is trained.
        ranks: the processes of the run.

    Attributes:
        parallel: the ranks that share the experts out; None where all have all experts.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.parallel = ranks, parallel_of(model)
        self._model = model

    def require_same_step(self, args: TrainingArguments) -> None:
        """Refuse what would not be the same step as that of one process.

        Raises:
            ConfigError: names the setting, and what to set.
        """
        if args.world_size != self.ranks.world_size:
            raise ConfigError(
                f"this is one of {args.world_size} processes, and the trainer was made for {self.ranks.world_size}; "
                "give it promised=Promised(ranks=ranks) with the ranks of expertune.distributed.mesh.open_ranks()"
            )
        if self.parallel is None:
            return
        if args.fp16:
            raise ConfigError(
                "training.fp16 scales the loss of each process by itself, and processes that share the experts out "
                "(distributed.experts: parallel) need one scale; set training.bf16"
            )
        require_states_by_expert(self._model, str(getattr(args.optim, "value", args.optim)))

    def copy_weights(self) -> None:
        """Have all ranks begin with the same trained weights."""
        own, shared = self._trained()
        self.ranks.copy(shared)
        if self.parallel:
            self.parallel.copy(own)

    def average_gradients(self) -> None:
        """When all ranks have computed their part of a step: its gradients are those of all."""
        own, shared = self._trained()
        trained = [*shared, *own]
        # What no rank has used keeps no gradient, as in one process; what some have is zero on the others.
        used = self.ranks.total([each.grad is not None for each in trained])
        for parameter, count in zip(trained, used, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.average(gradients_among(shared))
        if self.parallel:
            self.parallel.average(gradients_among(own))

    def clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """accelerate's `clip_grad_norm_`, by the norm of the whole model's gradients, of which each rank has a part."""
        assert self.parallel is not None
        own, shared = self._trained()
        norm = self.parallel.norm(gradients_among(shared), gradients_among(own))
        torch.nn.utils.clip_grads_with_norm_([*own, *shared], max_norm, norm)
        return norm

    def _trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that are trained: factors of a rank's own experts, and all others."""
        factors = [factor for of_layer in own_factors(self._model).values() for factor in of_layer]
        ids = {id(factor) for factor in factors}
        others = [each for each in self._model.parameters() if each.requires_grad and id(each) not in ids]
        return [factor for factor in factors if factor.requires_grad], others


def gather_files(write: Callable[[str], None], folder: Path, ranks: Ranks) -> None:
    """Have rank 0 write to a folder the files that `write(folder)` makes on each rank, small and of different names."""
    with TemporaryDirectory() as own:
        write(own)
        files = {path.name: path.read_bytes() for path in Path(own).iterdir()}
    for of_rank in ranks.gather(files):
        for name, content in of_rank.items() if ranks.writes else ():
            (folder / name).write_bytes(content)


def write_adapter(model: Any, folder: Path, ranks: Ranks) -> None:
    """Write a model's adapter so that it comes back to the bit: stock PEFT's files, and live factors beside them.

    All ranks call this, and one of them writes.
    """
    with factors_of_all(model, here=ranks.writes):
        if ranks.writes:
            model.save_pretrained(str(folder))
            if isinstance(model, ExpertPeftModel):
                model.save_live_factors(folder)
