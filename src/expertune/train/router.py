"""Auxiliary losses of routers in training: over all tokens of an optimizer step that are no padding, exactly.

The load-balancing loss of a micro-batch needs to know how many of the whole step's tokens each expert was sent. Where a
step is one micro-batch in one process, its own forward says so. Otherwise a forward of all of the step's micro-batches
without gradients comes first, with the random numbers of the step, and ranks add up what they have counted. The step is
then the same however its examples are divided: into micro-batches, between ranks, or where memory ran out.

Each loss has a series of its own, and the series of the loss is that of the objective alone.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expertune.config import RunConfig
from expertune.data.split import Batch, split
from expertune.errors import ConfigError
from expertune.experts.balance import RouterLosses, RouterTotals
from expertune.experts.module import in_lockstep
from expertune.objectives.units import aux_coefficient
from expertune.train.callbacks import RandomState
from expertune.train.promises import Promised, Promises


class TrainsRouters(Promises):
    """The mixin, in place of `Promises`; arguments are the same."""

    def __init__(self, *args: Any, promised: Promised | None = None, **kwargs: Any) -> None:
        self.router_losses = promised.router_losses if promised else None
        self._of_step: list[Batch] = []
        self._totals: RouterTotals | None = None
        self._added: dict[str, float] = {}
        super().__init__(*args, promised=promised, **kwargs)
        self._summed = tuple(self.router_losses.coefficients) if self.router_losses else ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; the step's batches are kept until they have been counted."""
        found = super().get_batch_samples(*args, **kwargs)
        self._of_step, self._totals = found[0] if self.router_losses else [], None
        return found

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """See `Promises.training_step`; of several ranks all count their part of the step first."""
        if self.router_losses and self._totals is None and self.ranks.several:
            self._totals = self._count_on_all_ranks(model, self.why_indivisible(num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss, and this batch's part of the routers' losses."""
        losses = self.router_losses
        if losses is None or self._stands_by or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with losses.watching(inputs.get("attention_mask")) as routed:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not routed.probabilities_E.requires_grad:
            raise ConfigError(
                "router: no trained weight has a gradient from the routers' scores; name router or attention in "
                "lora.targets, and leave use_reentrant out of training.gradient_checkpointing_kwargs"
            )
        found = losses.of(routed, self._totals or routed.totals)
        self._added = {name: value.item() for name, value in found.items()}
        # What is divided by afterwards: ranks average their gradients, and the trainer may the step's micro-batches.
        share = losses.weighted(found) * self.ranks.world_size
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            is_scaled = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        if not is_scaled:
            share = share * self.current_gradient_accumulation_steps
        return loss + share.to(loss.device)

    def _forward_and_backward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        losses = self.router_losses
        if losses is None:
            return super()._forward_and_backward(model, inputs, num_items_in_batch)
        if self._totals is None and num_tokens(inputs) != self._num_tokens:
            self._totals = self._count_here(model)
        self._added = {}
        loss = super()._forward_and_backward(model, inputs, num_items_in_batch)
        for name, value in self._added.items():
            self.history.add(name, value)
            self.history.add("loss", -value * losses.coefficients[name] * self.ranks.world_size)
        return loss

    @property
    def _num_tokens(self) -> int:
        """Of the step, in this process."""
        return sum(num_tokens(batch) for batch in self._of_step)

    def _count_on_all_ranks(self, model: nn.Module, why_whole: str | None) -> RouterTotals:
        assert self.router_losses is not None
        counted = _nothing(self.router_losses)
        if self.router_losses.aux_loss:
            for of_part in self.oom.look_ahead(partial(self._counted, model), self._of_step, why_whole):
                _add(counted, of_part)
        else:
            counted.tokens = self._num_tokens * self.router_losses.num_layers
        *counts, tokens = self.ranks.total([*counted.counts_E.tolist(), counted.tokens])
        return RouterTotals(tokens, counted.counts_E.new_tensor(counts))

    def _count_here(self, model: nn.Module) -> RouterTotals:
        """Of the step in one process; whoever calls this runs it again with smaller parts where memory runs out."""
        assert self.router_losses is not None
        counted = _nothing(self.router_losses)
        if not self.router_losses.aux_loss:
            counted.tokens = self._num_tokens * self.router_losses.num_layers
            return counted
        random_state = RandomState()
        for batch in self._of_step:
            for part in split(batch, self.oom.limits.get("micro_batch_tokens")):
                _add(counted, self._counted(model, part))
        random_state.restore()
        return counted

    @torch.no_grad()
    def _counted(self, model: nn.Module, batch: Batch) -> RouterTotals:
        """What routers do with a batch: a forward as that of the step."""
        assert self.router_losses is not None
        inputs = {name: value for name, value in batch.items() if name != "example_ids"}
        if not inputs["input_ids"].numel():
            if in_lockstep(self.model):
                with self.expert_load.ignoring():
                    self._forward_alone(model, self.data_collator([self.train_dataset[0]]))
            return _nothing(self.router_losses)
        with self.expert_load.ignoring(), self.router_losses.watching(inputs.get("attention_mask")) as routed:
            self._forward_alone(model, inputs)
        return routed.totals

    def _forward_alone(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        model.train()
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != "example_ids"})
        with self.compute_loss_context_manager():
            self.compute_loss(model, inputs)


def take_router_losses(model: Any, config: RunConfig) -> RouterLosses | None:
    """The routers' losses of a run, which the model itself no longer adds to its loss; None where there are none.

    Raises:
        UnsupportedModelError: see `RouterLosses`.
    """
    text_config = model.config.get_text_config()
    coefficient = aux_coefficient(config, text_config)
    if coefficient is not None and getattr(text_config, "output_router_logits", False):
        model.config.output_router_logits = text_config.output_router_logits = False
    losses = coefficient or 0.0, config.router.z_loss
    return RouterLosses(model, *losses) if any(losses) else None


def num_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def _nothing(losses: RouterLosses) -> RouterTotals:
    with losses.watching() as routed:
        return routed.totals


def _add(totals: RouterTotals, more: RouterTotals) -> None:
    totals.tokens += more.tokens
    totals.counts_E += more.counts_E
