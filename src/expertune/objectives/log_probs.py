"""What TRL's losses ask of a model: log-probabilities of answers; and of which model, the trained one or the reference.

TRL hands its losses batches that are padded on the right. Here the padding is never computed on: sequences are
concatenated, attend to themselves alone, and the log-probabilities go back to where TRL looks for them.

Shape suffixes: B sequences of a batch, T tokens with padding, N tokens without.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from expertune.data import IGNORE_INDEX
from expertune.generation.decoding import evaluation_mode
from expertune.layers.varlen_attention import SEQUENCE_BOUNDS
from expertune.objectives.chunked_loss import LanguageModelLoss

ForwardHook = Callable[[Mapping[str, Any]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Output:
    """A model's output by the names that TRL's losses read.

    Attributes:
        log_probs: float32 [B, T - 1], of the token after each; 0 where it has no label.
        aux_loss: the router's auxiliary loss, where it was asked for.
        entropy, mean_logits, is_top1: zeros, for figures of TRL's that a run does not have.
    """

    log_probs: Tensor
    aux_loss: Tensor | None
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


class LogProbs:
    """Stands in the model's place in TRL's losses.

    Where no gradient is wanted, the model computes in evaluation mode: without dropout, noise and checkpointing.

    Args:
        loss: takes log-probabilities of the model.
        model: the same model.
        padded: whether the batch goes to the model as it is, for families that do not keep sequences apart.
        reference: makes the model the reference while it is open.
    """

    def __init__(
        self,
        loss: LanguageModelLoss,
        model: torch.nn.Module,
        padded: bool = False,
        reference: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._loss, self._model, self._padded, self._reference = loss, model, padded, reference
        self._watched: tuple[Tensor | None, ForwardHook] = None, lambda _: nullcontext()

    @contextmanager
    def watching(self, input_ids: Tensor, watched: ForwardHook) -> Iterator[None]:
        """While open, `watched` is open where the model is called on these ids, and not on other ones (KTO's KL)."""
        previous, self._watched = self._watched, (input_ids, watched)
        try:
            yield
        finally:
            self._watched = previous

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **asked: Any) -> Output:
        """What TRL calls.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 on padding.
            labels: int64 [B, T], not shifted, -100 for none.
            **asked: `output_router_logits`, and what goes without saying here (`use_cache`, `fused_lm_head`).
        """
        routed = {"output_router_logits": True} if asked.get("output_router_logits") else {}
        computing = nullcontext() if torch.is_grad_enabled() else evaluation_mode(self._model)
        mask_BT = attention_mask.bool()
        inputs, own_labels = (_positioned if self._padded else concatenated)(input_ids, mask_BT, labels)
        of_ids, watched = self._watched
        with self._reference(), computing, watched(inputs) if input_ids is of_ids else nullcontext():
            found, outputs = self._loss.log_probs(inputs | routed, own_labels)
        if not self._padded:
            found = found.new_zeros(mask_BT.shape).masked_scatter(mask_BT, found)
        log_probs = found[:, :-1]
        zeros = torch.zeros_like(log_probs)
        return Output(log_probs, getattr(outputs, "aux_loss", None), zeros, zeros, zeros.bool())


def concatenated(ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A padded batch as one of concatenated sequences: what the model is called with, and its labels [1, N]."""
    lengths = mask_BT.sum(1)
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    longest = int(lengths.max())
    position_ids = (mask_BT.long().cumsum(1) - 1)[mask_BT][None]
    labels = labels_BT[mask_BT][None].masked_fill(position_ids == 0, IGNORE_INDEX)  # no sequence predicts the next one
    sequences = dict(zip(SEQUENCE_BOUNDS, (bounds.int(), bounds.int(), longest, longest), strict=True))
    return {"input_ids": ids_BT[mask_BT][None], "position_ids": position_ids, **sequences}, labels


def _positioned(ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> tuple[dict[str, Any], Tensor]:
    # 0 on padding, as `LeftPaddingCollator` has it: padding is no part of a sequence.
    position_ids = (mask_BT.long().cumsum(1) - 1).masked_fill(~mask_BT, 0)
    return {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "position_ids": position_ids}, labels_BT


class Reference:
    """The model that training starts from, by the one that is trained.

    That is the base model where the adapter starts at zero. Else the factors that it starts with are kept, once more
    in memory, and put in the place of the trained ones.

    Args:
        model: the adapted model, before its first step.
        keeps_start: whether the adapter changes the model from the start.
    """

    def __init__(self, model: PeftModel, keeps_start: bool) -> None:
        self._model = model
        trained = [each for each in model.parameters() if each.requires_grad] if keeps_start else []
        self._start = [(parameter, parameter.detach().clone()) for parameter in trained]

    @classmethod
    def of_adapter(cls, model: PeftModel, folder: str) -> "Reference":
        """The reference of a model that has been trained: the adapter that it started from.

        Raises:
            CheckpointError: the folder is no such adapter, or is gone.
        """
        now = cls(model, keeps_start=True)
        model.load_adapter(folder, "default")
        found = cls(model, keeps_start=True)
        for parameter, trained in now._start:
            parameter.data = trained
        return found

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model is the reference, also where its adapter is disabled."""
        if not self._start:
            with self._model.disable_adapter():
                yield
            return
        is_disabled = self._model.get_model_status().enabled is False
        if is_disabled:
            self._model.base_model.enable_adapter_layers()
        now = [parameter.data for parameter, _ in self._start]
        try:
            for parameter, start in self._start:
                parameter.data = start
            yield
        finally:
            for (parameter, _), data in zip(self._start, now, strict=True):
                parameter.data = data
            if is_disabled:
                self._model.base_model.disable_adapter_layers()
