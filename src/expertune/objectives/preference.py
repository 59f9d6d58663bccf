"""Objectives over answers that are known to be better or worse: DPO, KTO and ORPO.

The loss is TRL's own (`trl_losses.py`), on log-probabilities that are taken without logits and without padding
(`log_probs.py`). Columns of a batch: those of `trl_losses.Collator`. The indivisible unit is a pair, or a labeled
answer; of some losses it is the micro-batch (`units.py`). A step's loss is the mean over its examples, however they are
spread over micro-batches and processes. The reference is the model that training starts from (`log_probs.Reference`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.config import RunConfig
from expertune.data.split import NUM_EXAMPLES, Batch
from expertune.distributed.mesh import Ranks
from expertune.objectives.chunked_loss import LanguageModelLoss
from expertune.objectives.figures import Figures, LossOutput
from expertune.objectives.log_probs import ForwardHook, LogProbs, Reference
from expertune.objectives.trl_losses import LOSSES, Collator, disable_dropout_in_model
from expertune.objectives.units import why_whole


class Preference:
    """The objective of a run over pairs or labeled answers.

    Args:
        config: the run.
        model: the adapted model.
        args: of the training, TRL's.
        reference: the model that training starts from.
        notify: called once, with a sentence, if log-probabilities need all logits.
        ranks: the processes of the training, each with all experts.

    Attributes:
        figures: of the step, by TRL's names.
        collator: makes a batch of examples.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ExpertPeftModel,
        args: Any,
        reference: Reference,
        notify: Callable[[str], None] = lambda _: None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self.figures, self.collator = Figures(self._ranks), Collator(args)
        self._config, self._args, self._model, self._why_whole = config, args, model, why_whole(config)
        self._reference = reference
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self._trained = self._losses(model, notify)
        self._trained.ranks = self._ranks
        # Inside of the adapter's wrapper, which may have transformers' autocast around it.
        self._held_out = self._losses(model.get_base_model())

    def _losses(self, model: nn.Module, notify: Callable[[str], None] = lambda _: None) -> Any:
        loss, padded = LanguageModelLoss(model, self._config.loss, notify), self._config.data.packing == "padded"
        policy = LogProbs(loss, model, padded)
        reference = LogProbs(loss, model, padded, self._reference.in_place)
        return LOSSES[self._config.objective](self._args, self._model.get_base_model(), policy, reference)

    def num_items(self, batches: Sequence[Batch]) -> int | None:
        """How many examples the loss of a step is the mean over, on all ranks."""
        return int(self._ranks.total([sum(batch[NUM_EXAMPLES] for batch in batches)])[0])

    def loss(
        self, inputs: Mapping[str, Any], num_items_in_batch: Any, own: Callable[[], Any], with_outputs: bool = False
    ) -> Tensor:
        """A micro-batch's share of the step's loss; its figures are added to the step's."""
        taken: LossOutput = self._trained.taken(inputs)
        for name, (figure, count) in taken.figures.items():
            self.figures.add(name, figure, count)
        # Ranks average their losses and gradients.
        return taken.loss * (taken.num_examples * self._ranks.world_size / num_items_in_batch)

    def stand_by(self) -> None:
        """See `expertune.objectives.objective.Objective`."""
        self._trained.stand_by()

    def evaluated(self, inputs: Mapping[str, Any], watched: ForwardHook) -> LossOutput:
        """The loss and figures of a batch that is not trained on.

        Args:
            inputs: the batch, on the model's device.
            watched: given what the model is called with; open while the trained model computes.
        """
        with torch.no_grad(), self._held_out.policy.watching(inputs["input_ids"], watched):
            taken: LossOutput = self._held_out.taken(inputs)
        return taken

    def why_indivisible(self, num_items_in_batch: Any) -> str | None:
        """Why a micro-batch in parts would be another step, or None; see `expertune.train.promises.Promises`."""
        if self._why_whole is None and self._trained.aux_loss_enabled:
            return "the router's auxiliary loss (output_router_logits) is not the sum of its parts"
        return self._why_whole
