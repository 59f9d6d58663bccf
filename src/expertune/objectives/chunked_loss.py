"""The loss of a causal language model without its logits, for any family, through two places that transformers owns.

A causal language model of transformers calls its output embeddings on the last hidden states, may scale or cap what
comes back, and hands it to `self.loss_function`. While a `LanguageModelLoss` is open, the output embeddings hand a
single column on in place of the vocabulary, and the loss function is the one of `kernels.linear_cross_entropy`, over
the hidden states and the head's weight and adapters. All else is the model's own code: what it adds to the loss (a
router's auxiliary loss) and how it counts labels (`num_items_in_batch`) stay as they are.

What lies between head and loss is not known by a model's name but looked at: the first batch's first tokens go through
the model once as it is and once so, values at the head's place show the scale and the cap, and the two losses have to
agree. Where they do not, or the head is no plain linear, the model's own path is taken, and that is logged once.

Shape suffixes: B sequences of a batch, T tokens, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from expertune.distributed.output import is_of_a_connection
from expertune.experts.module import experts_passed_by, sharing_of
from expertune.generation.decoding import evaluation_mode
from expertune.kernels.linear_cross_entropy import IGNORE_INDEX, HeadUpdate, linear_cross_entropy
from expertune.kernels.linear_cross_entropy.per_token import linear_log_probs
from expertune.layers.dense_linear import is_dense_linear
from expertune.placement.out_of_memory import is_out_of_memory

# Tokens of the comparison on the first batch: each carries one value at the head's place.
_PROBE_TOKENS = 32

# Two losses of one model agree within this, times the larger of the loss and one nat. Half-precision logits are rounded
# on the model's own path, and not on the other.
_AGREEMENT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

_LossFunction = Callable[..., Tensor]


class _Transform(NamedTuple):
    """What a model does to its logits before the loss: softcap * tanh(scale * z / softcap), or scale * z."""

    scale: float
    softcap: float | None


class _NotInChunksError(Exception):
    """The model's loss cannot be taken in chunks; says why."""


class LanguageModelLoss:
    """Takes a model's loss in chunks, or leaves it to the model.

    Args:
        model: a causal language model of transformers, or a PeftModel on one.
        mode: `auto` takes the loss in chunks where that gives the model's own loss; `full` never does.
        notify: called once, with a sentence, if `auto` leaves the loss to the model.
    """

    def __init__(
        self, model: nn.Module, mode: Literal["auto", "full"] = "auto", notify: Callable[[str], None] = lambda _: None
    ) -> None:
        self._model = model
        self._base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        self._notify = notify
        self._transform: _Transform | None = None
        self._given_up = mode == "full"

    def give_up(self, reason: str) -> None:
        """Leave the loss to the model from now on, and say why."""
        if not self._given_up:
            self._given_up = True
            self._notify(f"the loss takes all logits at once, which needs more memory and time: {reason}")

    @contextmanager
    def in_chunks(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While open, the model's loss on a batch is taken in chunks; `logits` of its output are then of no use.

        Args:
            inputs: what the model is called with, on the model's device; compared on at the first call.
        """
        transform = self._usable_transform(inputs["input_ids"]) if {"input_ids", "labels"} <= inputs.keys() else None
        if transform is None:
            yield
            return
        with self._stand_ins(partial(self._mean, transform), _one_column):
            yield

    def summed(self, inputs: Mapping[str, Any], labels_BT: Tensor) -> tuple[float, int] | None:
        """Sum of the language-model loss alone over a batch, and how many labels it sums over.

        Args:
            inputs: what the model is called with, without labels, on the model's device.
            labels_BT: int64 [B, T], not shifted, -100 for none.

        Returns:
            None where the loss is left to the model.
        """
        transform = self._usable_transform(inputs["input_ids"])
        if transform is None:
            return None
        with self._stand_ins(partial(self._mean, transform), _one_column) as hidden:
            self._model(**inputs, use_cache=False)
        targets_BT = _shifted(labels_BT)
        return self._sum(transform, _taken(hidden), targets_BT).item(), int((targets_BT != IGNORE_INDEX).sum())

    def log_probs(self, inputs: Mapping[str, Any], labels_BT: Tensor) -> tuple[Tensor, Any]:
        """The log-probability of each label by itself, with its gradient; of all logits at once where it must be.

        Args:
            inputs: what the model is called with, without labels, on the model's device.
            labels_BT: int64 [B, T], not shifted, -100 for none.

        Returns:
            float32 [B, T], where token t has that of the label after it, and 0 where there is none; and the model's
            output, whose logits are of no use.
        """
        targets_BT = _shifted(labels_BT)
        if (transform := self._usable_transform(inputs["input_ids"])) is None:
            outputs = self._model(**inputs, use_cache=False)
            labeled = targets_BT != IGNORE_INDEX
            losses_N = F.cross_entropy(outputs.logits[labeled].float(), targets_BT[labeled], reduction="none")
            return losses_N.new_zeros(targets_BT.shape).masked_scatter(labeled, -losses_N), outputs
        with self._stand_ins(partial(self._mean, transform), _one_column) as hidden:
            outputs = self._model(**inputs, use_cache=False)
        found_T = self._through_head(linear_log_probs, transform, _taken(hidden), targets_BT)
        return found_T.reshape(targets_BT.shape), outputs

    def _usable_transform(self, input_ids_BT: Tensor) -> _Transform | None:
        """What lies between head and loss; None where the loss is left to the model."""
        if self._given_up:
            return None
        try:
            self._check_head()
            if self._transform is None:
                self._transform = self._compare(input_ids_BT)
        except _NotInChunksError as reason:
            self.give_up(str(reason))
            return None
        return self._transform

    @property
    def _head(self) -> Any:
        return getattr(self._base, "get_output_embeddings", lambda: None)()

    def _check_head(self) -> None:
        """Refuse a head that is more than a frozen linear with plain LoRA."""
        head = self._head
        linear = head.base_layer if type(head) is LoraLinear else head
        # A subclass of nn.Linear may compute anything.
        if head is None or type(linear) is not nn.Linear:
            raise _NotInChunksError(f"the model's output head is {type(linear).__name__}, not a plain linear")
        if type(head) is LoraLinear and (head.merged or head.lora_variant or any(head.lora_bias.values())):
            raise _NotInChunksError("the adapter of the output head is merged, or of a kind beyond plain LoRA")
        if linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad):
            raise _NotInChunksError("the output head itself is trained")
        replaced = any("forward" in vars(module) and not is_dense_linear(module) for module in (head, linear))
        if linear.weight.is_meta or replaced:
            raise _NotInChunksError("something else has taken the place of the output head's forward")
        if self._base.loss_function is not ForCausalLMLoss:
            raise _NotInChunksError("the model's loss function is not the one of causal language models")

    @torch.no_grad()
    def _compare(self, input_ids_BT: Tensor) -> _Transform:
        """The transform that makes the loss in chunks the model's own; takes both on a few tokens of the batch."""
        ids = input_ids_BT.reshape(-1)[:_PROBE_TOKENS]
        ids = ids.repeat(-(-_PROBE_TOKENS // ids.shape[0]))[:_PROBE_TOKENS].unsqueeze(0)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        found: list[_Transform] = []

        def transform_and_mean(hidden: list[Tensor], logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
            found.append(_find_transform(_probe_column(logits), logits))
            return self._mean(found[-1], hidden, logits, labels, **kwargs)

        def both_losses() -> tuple[float, float, float]:
            found.clear()
            own, tolerance = self._own_loss(inputs)
            with self._stand_ins(transform_and_mean, _probe_column):
                return own, self._model(**inputs).loss.item(), tolerance

        try:
            with evaluation_mode(self._model):
                # What comes to the head may be anything, as long as it is finite: it is the same for both.
                with experts_passed_by(self._model):
                    own, chunked, tolerance = both_losses()
                # Ranks that need each other in the experts would have to repeat it alike.
                if not (math.isfinite(own) or math.isfinite(chunked)) and sharing_of(self._model) is None:
                    own, chunked, tolerance = both_losses()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error) or is_of_a_connection(error):
                raise
            # Code that ships with a model may do anything between its head and its loss.
            raise _NotInChunksError(f"the model does not run without its logits ({error})") from error
        if sharing := sharing_of(self._model):
            # A rank that has run out of memory here compares once more: then all have to, or none.
            sharing.proceed()
        if len(found) != 1:
            raise _NotInChunksError("the model takes its loss otherwise than once by its loss function")
        if not abs(own - chunked) <= tolerance * max(1.0, abs(own)):
            raise _NotInChunksError(f"in chunks it would be {chunked:.6f} on a first sample, and is {own:.6f}")
        return found[0]

    def _own_loss(self, inputs: Mapping[str, Any]) -> tuple[float, float]:
        """The loss as the model takes it, and how near to it another has to come.

        Refuses logits that are not as wide as the head.
        """
        vocabulary = _weight(self._head).shape[0]
        widths: list[int] = []
        dtypes = {self._base.dtype}

        def watched(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            widths.append(logits.shape[-1])
            dtypes.add(logits.dtype)  # under autocast not the model's
            return ForCausalLMLoss(logits, *args, **kwargs)

        with self._loss_function(watched):
            loss: float = self._model(**inputs).loss.item()
        if any(width != vocabulary for width in widths):
            raise _NotInChunksError(f"the loss is over {widths[0]} of the head's {vocabulary} logits")
        return loss, max(_AGREEMENT.get(dtype, _AGREEMENT[torch.bfloat16]) for dtype in dtypes)

    @contextmanager
    def _stand_ins(self, loss: _LossFunction, column: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
        """The head hands on `column(hidden states)`; the loss is `loss([hidden states], logits, labels, ...)`.

        Yields what the head was called with, call by call.
        """
        hidden: list[Tensor] = []
        head = self._head

        def forward(x_BTD: Tensor) -> Tensor:
            hidden.append(x_BTD)
            return column(x_BTD)

        # Set on the instance: hooks and attributes of the head stay.
        own = vars(head).get("forward")
        head.forward = forward
        try:
            with self._loss_function(lambda logits, labels, *_, **kwargs: loss(hidden, logits, labels, **kwargs)):
                yield hidden
        finally:
            if own is None:
                del head.forward
            else:
                head.forward = own

    @contextmanager
    def _loss_function(self, function: _LossFunction) -> Iterator[None]:
        own = vars(self._base).get("_loss_function")
        self._base.loss_function = function
        try:
            yield
        finally:
            if own is None:
                del self._base._loss_function
            else:
                self._base.loss_function = own

    def _mean(
        self,
        transform: _Transform,
        hidden: list[Tensor],
        logits: Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        """`ForCausalLMLoss` of the hidden states; see `transformers.loss.loss_utils`."""
        if shift_labels is None:
            assert labels is not None
            shift_labels = _shifted(labels)
        x_BTD = _taken(hidden)
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != IGNORE_INDEX).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(x_BTD.device)
        return self._sum(transform, x_BTD, shift_labels) / num_items_in_batch

    def _sum(self, transform: _Transform, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        return self._through_head(linear_cross_entropy, transform, x_BTD, targets_BT)

    def _through_head(
        self, take: Callable[..., Tensor], transform: _Transform, x_BTD: Tensor, targets_BT: Tensor
    ) -> Tensor:
        head = self._head
        weight_VD = _weight(head)
        updates = _updates(head, x_BTD)
        kind = x_BTD.device.type
        if torch.is_autocast_enabled(kind):
            x_BTD = x_BTD.to(torch.get_autocast_dtype(kind))
        return take(
            x_BTD.reshape(-1, weight_VD.shape[1]),
            weight_VD,
            targets_BT.reshape(-1).to(x_BTD.device),
            head.bias if isinstance(head, nn.Linear) else head.base_layer.bias,
            updates,
            *transform,
        )


def _weight(head: Any) -> Tensor:
    weight: Tensor = (head if isinstance(head, nn.Linear) else head.base_layer).weight
    return weight


def _updates(head: Any, x_BTD: Tensor) -> list[HeadUpdate]:
    """The head's active adapters, as PEFT's layer applies them."""
    if not isinstance(head, LoraLinear) or head.disable_adapters:
        return []
    updates = []
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        a_rD, b_Vr = head.lora_A[name].weight, head.lora_B[name].weight
        dropout, own_x = head.lora_dropout[name], None
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            # On all tokens, although few have a label: the random numbers are then those of the model's own path.
            own_x = dropout(x_BTD.to(a_rD.dtype)).reshape(-1, a_rD.shape[1])
        updates.append(HeadUpdate(a_rD, b_Vr, head.scaling[name], own_x))
    return updates


def _shifted(labels_BT: Tensor) -> Tensor:
    """The label of each token: the token after it; the last of a sequence has none."""
    return F.pad(labels_BT, (0, 1), value=IGNORE_INDEX)[..., 1:]


def _taken(hidden: list[Tensor]) -> Tensor:
    """What the head was called with, once; the list is then ready for the next forward."""
    if len(hidden) != 1:
        raise RuntimeError(f"the model called its output head {len(hidden)} times in one forward")
    return hidden.pop()


def _one_column(x_BTD: Tensor) -> Tensor:
    return x_BTD.new_zeros(*x_BTD.shape[:-1], 1)


def _probe_column(x_BTD: Tensor) -> Tensor:
    """Values from 2**-6 to 2**13 of both signs, one for each token; float32, so that a scale shows in full."""
    magnitudes = 2.0 ** torch.linspace(-6, 13, _PROBE_TOKENS // 2, dtype=torch.float64)
    return torch.stack([magnitudes, -magnitudes]).to(x_BTD.device, torch.float32).reshape(1, _PROBE_TOKENS, 1)


def _find_transform(z: Tensor, y: Tensor) -> _Transform:
    """Scale and cap from values z that were put in the head's place, and y that arrived at the loss."""
    if y.shape != z.shape:
        raise _NotInChunksError(f"logits of shape {tuple(z.shape)} arrive at the loss as {tuple(y.shape)}")
    z, y = z.flatten().double().cpu(), y.flatten().double().cpu()
    smallest, largest = 0, _PROBE_TOKENS // 2 - 1  # of the positive ones
    scale, softcap = float(y[smallest] / z[smallest]), None
    if not math.isclose(float(y[largest]), scale * float(z[largest]), rel_tol=1e-3):
        softcap = float(y[largest])  # tanh is 1 there
        scale = math.atanh(float(y[smallest]) / softcap) * softcap / float(z[smallest])
    if math.isclose(scale, 1.0, rel_tol=1e-6):
        scale = 1.0
    expected = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
    if not torch.allclose(y, expected, rtol=1e-5, atol=1e-7):
        raise _NotInChunksError("between head and loss the model does more to its logits than scale and cap them")
    return _Transform(scale, softcap)
