"""Supervised fine-tuning: the next token of the examples' trained parts.

Columns of a batch: `input_ids` and `labels` (-100 where nothing is trained), with `attention_mask` where sequences are
padded, or `position_ids` and the bounds of sequences where they are concatenated. The indivisible unit is a sequence: a
micro-batch may be split between its sequences. The loss is the cross entropy per label token; an evaluation's metric is
the same loss without a router's auxiliary loss, `LanguageModelLoss.summed`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor
from transformers import TrainingArguments

from expertune.data.split import Batch
from expertune.objectives.chunked_loss import LanguageModelLoss
from expertune.objectives.figures import Figures


class SupervisedFineTuning:
    """The objective of a run.

    Args:
        model: the adapted model.
        args: of the training.
        loss: `auto` computes the loss without all logits where that gives the model's own loss; `full` never does.
        notify: called once, with a sentence, if `auto` needs all logits.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        loss: Literal["auto", "full"] = "auto",
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.figures = Figures()  # none beside the loss
        self._model, self._args = model, args
        self._loss = LanguageModelLoss(model, loss, notify)
        if args.label_smoothing_factor:
            self._loss.give_up("training.label_smoothing_factor smooths over all of them")
        elif args.torch_compile:
            self._loss.give_up("training.torch_compile would compile the model with a stand-in for its head")

    def num_items(self, batches: Sequence[Batch]) -> None:
        """Left to transformers, which counts labels."""

    def loss(
        self, inputs: Mapping[str, Any], num_items_in_batch: Any, own: Callable[[], Any], with_outputs: bool = False
    ) -> Any:
        """The model's own loss of a batch; its logits are of use only `with_outputs`."""
        with nullcontext() if with_outputs else self._loss.in_chunks(inputs):
            return own()

    def why_indivisible(self, num_items_in_batch: Tensor | int | None) -> str | None:
        """Why a micro-batch in parts would be another step, or None; see `expertune.train.promises.Promises`."""
        if num_items_in_batch is None:
            return "the model takes its loss over a micro-batch's label tokens, not over the step's"
        if getattr(self._model.config.get_text_config(), "output_router_logits", False):
            return "the router's auxiliary loss (output_router_logits) is not the sum of its parts"
        return None

    def stand_by(self) -> None:
        """Nothing: ranks exchange no more than gradients."""
