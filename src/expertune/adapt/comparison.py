"""What the preflight check compares: forwards in evaluation, without gradients, and what experts hold.

Two with the adapter have to agree to the bit, and to differ from the base model's; one with the adapter disabled has to
agree with the base model's from before it was attached. All logits of all positions are compared. Of experts that no
token reaches, checksums from before and after are.

Where experts are offloaded these forwards pass the layers beside the one that gradients are taken of, layer by layer:
together they take one transfer of each layer. There experts compute some of the tokens alone, in all of them alike
(`expertune.adapt.few_tokens`).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from expertune.adapt.amounts import ENOUGH_TOKENS
from expertune.adapt.few_tokens import few_tokens
from expertune.adapt.frozen_bytes import Checksums, expert_checksums, first_changed
from expertune.adapt.interleaved import PausingForward, in_turns
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.linears import decoder_layers
from expertune.errors import PreflightError
from expertune.experts.load import add_tokens
from expertune.experts.module import Nf4Experts, in_lockstep
from expertune.placement.experts import placement_of

Batch = dict[str, Tensor]

# Forwards that are compared with each other and with the base model's.
NUM_FORWARDS = 3


class BaseForward(NamedTuple):
    """A forward of the base model, before an adapter was attached.

    Attributes:
        batch: `input_ids` [B, S] of real sequences, with `position_ids` where they are concatenated.
        logits: `probe_logits` of it, [B, S, V].
        enough: see `probe_logits`.
        experts: `expert_checksums` from before the adapter was attached.
    """

    batch: Batch
    logits: Tensor
    enough: int | None = None
    experts: Checksums = MappingProxyType({})


def base_forward(model: nn.Module, batch: Batch) -> BaseForward:
    """What a check compares with: of a model before an adapter is attached, and where its experts are by now."""
    enough = ENOUGH_TOKENS if _is_offloaded(model) else None
    return BaseForward(batch, probe_logits(model, batch, enough), enough, expert_checksums(model))


def probe_logits(model: nn.Module, batch: Batch, enough: int | None = None) -> Tensor:
    """Logits [B, S, V] of a model in evaluation mode; its mode is restored.

    Args:
        model: with or without an adapter.
        batch: as a `BaseForward` has it.
        enough: each expert computes so many of its tokens, and gives zeros for the others; None means all.
    """
    with torch.no_grad(), _evaluating(model), few_tokens(model, enough):
        return _logits(model, batch)


class Comparison:
    """The forwards of one check, and what they show.

    Args:
        model: the model with its adapter attached, every factor of which is non-zero.
        base: the base model's forward.

    Attributes:
        enough: tokens that an expert computes; see `probe_logits`.
        largest_change: by which the adapter changes a logit; None before its forwards have ended.
        layers: what all forwards pass, in turns.
    """

    def __init__(self, model: ExpertPeftModel, base: BaseForward) -> None:
        self.enough = base.enough
        self.largest_change: float | None = None
        self._model, self._base = model, base
        self._drift: float | None = None
        self._base_change: float | None = None
        self._reached: dict[Nf4Experts, Tensor] = {}
        self._most_tokens = 0
        self.layers = [layer for _, layer in decoder_layers(model.get_base_model(), model.names.specs)]
        forwards = (PausingForward(lambda: _logits(model, base.batch)) for _ in range(NUM_FORWARDS))
        self._first, self._second, self._disabled = self._all = tuple(forwards)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Around the forward that gradients are taken of: where experts are offloaded, all pass each layer in turns.

        It comes last at each layer, and its backward begins where it has ended.
        """
        placement = placement_of(self._model)
        if placement is None or not placement.is_prefetched:
            yield
            return
        with placement.in_turns(), in_turns(self.layers, self._all, partial(self._let_on, PausingForward.advance)):
            yield

    def finish(self) -> None:
        """Compute what has not been computed yet.

        Raises:
            PreflightError: the forwards show that the model is not repeatable, the adapter has no effect, or the base
                model was changed; or checksums of experts show that.
        """
        self._let_on(PausingForward.finish)
        if self._drift is not None:
            since = "" if in_lockstep(self._model) else f", from {_first_to_differ(self._model, self._base)} on"
            raise PreflightError(
                f"two forwards of the same sequences differ by up to {self._drift:.3g}{since}; "
                "the model is not repeatable, so that a resumed run would drift"
            )
        if self.largest_change == 0:
            raise PreflightError(
                "a non-zero adapter does not change the logits: it is attached to nothing that is used"
            )
        if self._base_change is not None:
            raise PreflightError(
                f"with the adapter disabled the logits differ from the base model's by up to "
                f"{self._base_change:.3g}; attaching the adapter has changed the base"
            )
        if name := first_changed(self._model, self._base.experts):
            raise PreflightError(
                f"{name}: some bytes of its experts are not those from before; attaching the adapter has changed the "
                "base, for tokens that were not compared"
            )

    @property
    def experts_reached(self) -> dict[str, int]:
        """Of how many experts, and of how many in all, what the base model computes with them was compared.

        `expert_tokens` is of how many tokens the experts of a layer computed it, at most.
        """
        reached = sum(int(counts.count_nonzero()) for counts in self._reached.values())
        experts = sum(experts.num_experts for experts in self._reached)
        return {"expert_tokens": self._most_tokens, "experts_compared": reached, "experts": experts}

    def _let_on(self, let_on: Callable[[PausingForward[Tensor]], None]) -> None:
        """Each of the forwards once, in one order; the random state and the model's modes are restored."""
        ids = self._base.batch["input_ids"]
        with (
            torch.random.fork_rng(devices=cuda_devices(ids)),
            torch.no_grad(),
            _evaluating(self._model),
            few_tokens(self._model, self.enough),
        ):
            for forward in (self._first, self._second):
                self._run(forward, let_on)
            with _without_adapter(self._model), self._counting():
                self._run(self._disabled, let_on)

    def _run(self, forward: PausingForward[Tensor], let_on: Callable[[PausingForward[Tensor]], None]) -> None:
        """Logits are compared as soon as they are there, and not kept: they are the most memory that a check takes."""
        if forward.has_ended:
            return
        let_on(forward)
        if not forward.has_ended:
            return
        if forward is self._disabled:
            if not torch.equal(logits := forward.take(), self._base.logits):
                self._base_change = _distance(logits, self._base.logits)
        elif forward is self._second:
            first, second = self._first.take(), forward.take()
            if not torch.equal(first, second):
                self._drift = _distance(first, second)
            self.largest_change = _distance(first, self._base.logits)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the tokens of each expert, wherever it is, while the block runs."""

        def count(experts: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(experts, Nf4Experts)
            if experts not in self._reached:
                self._reached[experts] = torch.zeros(experts.num_experts, dtype=torch.int64)
            add_tokens(self._reached[experts], inputs[1].cpu())
            self._most_tokens = max(self._most_tokens, len(inputs[1]))

        experts = (module for module in self._model.modules() if isinstance(module, Nf4Experts))
        handles = [module.register_forward_pre_hook(count) for module in experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_offloaded(model: nn.Module) -> bool:
    """Whether experts are elsewhere than on the device that computes; those that ranks hold in shares are on theirs."""
    placement = placement_of(model)
    return placement is not None and bool(placement.offloaded)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _without_adapter(model: ExpertPeftModel) -> Iterator[None]:
    """PEFT's `disable_adapter`, at whose end all adapters are on and trained: here they are as they were before."""
    layers = [(layer, layer.disable_adapters) for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for layer, is_disabled in layers:
            if layer.disable_adapters != is_disabled:
                layer.enable_adapters(not is_disabled)
        for parameter, is_trained in trained:
            if parameter.requires_grad != is_trained:
                parameter.requires_grad_(is_trained)


def _first_to_differ(model: nn.Module, base: BaseForward) -> str:
    """Name of the first module whose output is another one when the forward is repeated; for a failure's message."""

    def digests() -> list[tuple[str, str]]:
        seen: list[tuple[str, str]] = []

        def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple | list) else [output]
                seen.append((name, digest([value for value in outputs if isinstance(value, Tensor)])))

            return hook

        handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
        try:
            probe_logits(model, base.batch, base.enough)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    pairs = zip(digests(), digests(), strict=False)
    return next((name for (name, one), (_, other) in pairs if one != other), "one call in some")


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the bytes of some tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors [..., V], a few positions at a time."""
    pairs = zip(one.flatten(0, -2).split(32), other.flatten(0, -2).split(32), strict=True)
    return float(torch.stack([(a.float() - b.float()).abs().max() for a, b in pairs]).max())


def cuda_devices(ids: Tensor) -> list[int]:
    """The GPU that a tensor is on, as `torch.random.fork_rng` takes it."""
    device = ids.device
    return [device.index or 0] if device.type == "cuda" else []
