"""The trainer of a run: transformers' Trainer with the promises, on the run's objective."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

from expertune.distributed.batches import take_parts
from expertune.objectives.objective import Objective
from expertune.train.promises import Promised
from expertune.train.router import TrainsRouters


class _OnObjective(Trainer):
    """transformers' Trainer with another loss: behind the promises, which put activations on the host around it."""

    objective: Objective

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss on a micro-batch, without the logits unless the model's outputs are asked for."""
        own = partial(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)
        return self.objective.loss(inputs, num_items_in_batch, own, return_outputs)


class ExpertTrainer(TrainsRouters, _OnObjective):
    """Trainer for adapted models.

    Args:
        model: the adapted model.
        args: from `expertune.train.arguments.training_arguments`.
        train_dataset: examples with the objective's columns and `example_ids`.
        collator: makes a micro-batch of examples; must pass `example_ids` through.
        objective: what is minimized.
        promised: what the promises are kept with.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Sequence[Mapping[str, Any]],
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        objective: Objective,
        promised: Promised,
    ) -> None:
        self.objective = objective
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=promised.evaluation.dataset if promised.evaluation else None,
            data_collator=collator,
            promised=promised,
        )
        for default in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # in a notebook transformers' default is another
            self.remove_callback(default)

    def get_train_dataloader(self) -> Any:
        """Batches of the training examples; of several processes, this rank's part of each."""
        loader = super().get_train_dataloader()
        if self.ranks.several and self.args.train_sampling_strategy != "batch_rebalance":  # which deals to ranks itself
            take_parts(loader, self.ranks)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and what its loss is the mean over."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if (counted := self.objective.num_items(batches)) is None:
            return batches, num_items
        self.loss_is_scaled_for_ga = True
        return batches, counted

    def why_indivisible(self, num_items_in_batch: Tensor | int | None) -> str | None:
        """The objective's answer."""
        return self.objective.why_indivisible(num_items_in_batch)

    def _stand_by(self, model: nn.Module, num_items_in_batch: Tensor | int | None) -> Tensor:
        self.objective.stand_by()
        return super()._stand_by(model, num_items_in_batch)
