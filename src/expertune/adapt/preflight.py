"""Preflight check after attaching: is it 4-bit, does it learn, is it repeatable, and does the adapter matter?

Failures that are silent elsewhere are measured here before the first step: experts left in 16 bits, factors that never
get a gradient, forwards that drift, adapters that change nothing. The check uses a few training sequences, makes every
B factor non-zero so that A can get a gradient, and restores the factors to the byte.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.reachability import reachable_modules
from expertune.checkpoint.linears import is_linear
from expertune.errors import ConfigError, PreflightError
from expertune.experts.balance import RouterLosses
from expertune.experts.contract import is_experts
from expertune.experts.load import add_tokens
from expertune.experts.lora import ExpertsLora, projection_of
from expertune.experts.module import Nf4Experts, in_lockstep, parallel_of

Batch = dict[str, Tensor]

# Forward and backward with gradients, a forward with the adapter, where that does not suffice another, and one without.
_NUM_PASSES = 6


def probe_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, S, V] of a model in evaluation mode; its mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            return model(**inputs, use_cache=False).logits
    finally:
        model.train(was_training)


def preflight(
    model: ExpertPeftModel,
    batch: Batch,
    base_logits: Tensor,
    progress: Callable[[int, int], None] = lambda *_: None,
    router_losses: RouterLosses | None = None,
) -> dict[str, Any]:
    """Run all checks on a model that has its adapter attached.

    Args:
        model: the adapted model.
        batch: `input_ids` [B, S] of real sequences, with `position_ids` where they are concatenated.
        base_logits: `probe_logits` of the same batch before the adapter was attached.
        progress: called with (passes through the model done, in all); a backward counts as two.
        router_losses: what the run adds to its loss; measured too.

    Returns:
        What was measured, ready for the run record.

    Raises:
        PreflightError: a check failed; names the module and what was found.
        ConfigError: a target is a module that no text of this model has a gradient to.
    """
    started = time.monotonic()
    progress(0, _NUM_PASSES)
    bits = _check_four_bits(model)
    with torch.random.fork_rng(devices=_cuda_devices(batch)), _nonzero_factors(model):
        learning, of_router, trained = _check_learning(model, batch, router_losses)
        progress(3, _NUM_PASSES)
        first = probe_logits(model, batch)
        progress(4, _NUM_PASSES)
        _check_repeatable(model, batch, first, trained)
        progress(5, _NUM_PASSES)
        del trained  # logits of all tokens are the most memory that the check takes
        change = _distance(first, base_logits)
        if change == 0:
            raise PreflightError(
                "a non-zero adapter does not change the logits: it is attached to nothing that is used"
            )
        del first
        with model.disable_adapter():
            disabled = probe_logits(model, batch)
        progress(_NUM_PASSES, _NUM_PASSES)
        if not torch.equal(disabled, base_logits):
            raise PreflightError(
                f"with the adapter disabled the logits differ from the base model's by up to "
                f"{_distance(disabled, base_logits):.3g}; attaching the adapter has changed the base"
            )
    return {
        "passed": True,
        "four_bit": bits,
        "learning": learning,
        "repeatable": True,
        "effective": {"largest_logit_change": change, "disabled_equals_base": True},
        **({"router": of_router} if of_router else {}),
        "seconds": round(time.monotonic() - started, 3),
    }


def _check_repeatable(model: ExpertPeftModel, batch: Batch, first: Tensor, trained: Tensor) -> None:
    """Two forwards give the same logits: this one's and the one's that the gradients were taken of.

    In training there may be dropout, the adapter's or the family's. Where the two differ, a second forward like the
    first decides. Ranks that need each other in a forward have to take it alike, and therefore always.
    """
    if first.dtype == trained.dtype and torch.equal(first, trained) and not in_lockstep(model):
        return
    second = probe_logits(model, batch)
    if not torch.equal(first, second):
        since = "" if in_lockstep(model) else f", from {_first_to_differ(model, batch)} on"
        raise PreflightError(
            f"two forwards of the same sequences differ by up to {_distance(first, second):.3g}{since}; "
            "the model is not repeatable, so that a resumed run would drift"
        )


def _check_four_bits(model: nn.Module) -> dict[str, Any]:
    expert_weights = linear_weights = expert_bytes = linear_bytes = 0
    for name, module in model.named_modules():
        if isinstance(module, Nf4Experts):
            for stack in (module.gate_up, module.down):
                if stack.packed.dtype != torch.uint8 or stack.packed.is_meta:
                    raise PreflightError(f"{name}: expert matrices are {stack.packed.dtype}, not packed 4-bit bytes")
                expert_weights += stack.num_matrices * stack.out_features * stack.in_features
                expert_bytes += sum(tensor.nbytes for tensor in stack.whole)
        elif isinstance(module, bnb.nn.Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if module.weight.dtype != torch.uint8 or state is None:
                raise PreflightError(f"{name}: the weight is {module.weight.dtype}, not packed 4-bit bytes")
            linear_weights += state.shape.numel()
            linear_bytes += module.weight.nbytes + _state_bytes(state)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if is_experts(module) and parameter.is_floating_point() and parameter.ndim == 3:
                raise PreflightError(f"{name}.{parameter_name}: experts are held as {parameter.dtype}, not in 4 bits")
    expert_weights, expert_bytes = _of_all_experts(model, expert_weights, expert_bytes)
    if not expert_weights:
        raise PreflightError("no 4-bit experts in the model")
    return {
        "expert_weights": expert_weights,
        "expert_bytes": expert_bytes,
        "bits_per_expert_weight": round(8 * expert_bytes / expert_weights, 4),
        "linear_weights": linear_weights,
        "linear_bytes": linear_bytes,
    }


def _check_learning(
    model: ExpertPeftModel, batch: Batch, losses: RouterLosses | None
) -> tuple[dict[str, Any], dict[str, float], Tensor]:
    """Every factor that can receive a gradient gets a finite, non-zero one; the routers' losses; the forward's logits.

    As in a step, with the adapter's dropout: the kernels compute it in ways of their own.
    """
    was_training = model.training
    model.train()
    try:
        watched = losses.watching(batch.get("attention_mask")) if losses else nullcontext()
        with _tokens_per_expert(model, batch) as tokens, watched as routed:
            # Every token is a target here, so that a masked prompt does not starve the experts that serve it.
            output = model(**{**batch, "labels": _all_labels(batch)}, use_cache=False)
        loss, logits = output.loss, output.logits.detach()
        del output
        of_router = losses.of(routed, routed.totals) if losses and routed else {}
        if losses and routed:
            loss = loss + losses.weighted(of_router)
        if not loss.requires_grad:
            raise PreflightError("no factor of the adapter takes part in the loss, so that none can learn")
        loss.backward()
        learning, of_experts, idle = 0, 0, 0
        for what, gradient, is_of_expert in _factor_gradients(model, tokens):
            if gradient is _NO_TOKENS:
                idle += 1
                continue
            if gradient is None:
                _require_reached(model, what.partition(":")[0].removesuffix(".lora_A").removesuffix(".lora_B"))
                raise PreflightError(f"{what}: the gradient is missing")
            if not torch.isfinite(gradient).all():
                raise PreflightError(f"{what}: the gradient is not finite")
            if not gradient.any():
                raise PreflightError(
                    f"{what}: the gradient is zero everywhere, so that it would not learn; {_WHY_ZERO}"
                )
            if is_of_expert:
                of_experts += 1
            else:
                learning += 1
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    of_experts, idle = _of_all_experts(model, of_experts, idle)
    figures = {name: value.item() for name, value in of_router.items()}
    return {"factors_learning": learning + of_experts, "factors_without_tokens": idle}, figures, logits


def _of_all_experts(model: nn.Module, *figures: int) -> Sequence[int]:
    """Sums of figures of the experts that are here, over the ranks that share the experts out."""
    parallel = parallel_of(model)
    return figures if parallel is None else parallel.sums(figures)


_WHY_ZERO = (
    "for a router it can be that the scores of all tokens are saturated, or that one expert is chosen with a weight of "
    "1, by these sequences and this seed: leave router out of lora.targets, or give another training.seed. For any "
    "other module its part of the model gives nothing for these sequences: leave it out of lora.targets"
)

# Stands for the gradient of an expert that no token of the check reached.
_NO_TOKENS = torch.empty(0)


def _require_reached(model: ExpertPeftModel, name: str) -> None:
    """Refuse a target whose own output no text has a gradient to: not the adapter is at fault, but where it is.

    It takes one more forward, which one of several ranks cannot take alone where they need each other in it.
    """
    base = model.get_submodule(name).get_base_layer()
    if in_lockstep(model) or (not is_linear(base) and not isinstance(base, Nf4Experts)):
        return
    model.eval()  # without activation checkpointing, whose second forward would be counted too
    if not reachable_modules(model.get_base_model(), {name: base}):
        name = name.removeprefix("base_model.model.")
        raise ConfigError(
            f"lora.targets: no adapter can learn in {name}: a text's loss has no gradient to what it computes (the "
            "model takes its weight without calling it, only picks by it, or does not use it for text). Leave "
            f"{name.rpartition('.')[2]} out of lora.targets; the aliases attention and experts leave such modules out"
        )


def _factor_gradients(model: ExpertPeftModel, tokens: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | None, bool]]:
    """What each factor is called, its gradient, and whether it is a single expert's."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter not in module.lora_A:
                continue
            for factor in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if adapter not in getattr(module, factor):
                    continue
                held = getattr(module, factor)[adapter]
                if not isinstance(module, ExpertsLora):
                    yield f"{name}.{factor}", held.weight.grad, False
                    continue
                if name not in tokens:
                    _require_reached(model, name)
                    raise PreflightError(
                        f"{name}: the forward never passes through these experts, so that none can learn"
                    )
                for stack, stacked in held.items():
                    for index, expert in enumerate(module.experts_of(adapter, stack)):
                        gradient = None if stacked.grad is None else stacked.grad[index]
                        what = f"{name}: expert {expert}, {projection_of(stack)}, {factor}"
                        yield what, gradient if tokens[name][expert] else _NO_TOKENS, True


@contextmanager
def _tokens_per_expert(model: nn.Module, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Count, while the block runs, the tokens of each expert that can influence the loss.

    The last token of a sequence predicts nothing and nothing attends to it: an expert that serves only such tokens gets
    no gradient, and that is correct.
    """
    matters = _all_labels(batch).roll(-1, dims=-1).reshape(-1) != -100
    counts: dict[str, Tensor] = {}
    handles = []

    def count(name: str, num_experts: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] = torch.zeros(num_experts, dtype=torch.int64)
            add_tokens(counts[name], inputs[1].cpu()[matters.cpu()])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, ExpertsLora):
            num_experts = module.base_layer.num_experts
            handles.append(module.register_forward_pre_hook(count(name, num_experts)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _nonzero_factors(model: nn.Module) -> Iterator[None]:
    """Fill every B factor with small random values, and put the old bytes back."""
    layers = [
        (parameter, module)
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for adapter in module.active_adapters
        if adapter in module.lora_B
        for parameter in module.lora_B[adapter].parameters()
    ]
    factors = [factor for factor, _ in layers]
    before = [factor.detach().clone() for factor in factors]
    digest = _digest(before)
    try:
        with torch.no_grad():
            for factor, layer in layers:
                _fill(factor, layer)
        yield
    finally:
        with torch.no_grad():
            for factor, old in zip(factors, before, strict=True):
                factor.copy_(old)
    if _digest(factors) != digest:
        raise PreflightError("the adapter's factors could not be restored after the probe")


def _fill(factor: Tensor, layer: LoraLayer) -> None:
    """Draw a factor's values: for all experts, wherever they are, so that ranks draw alike what they all have."""
    if not isinstance(layer, ExpertsLora) or layer.base_layer.parallel is None:
        factor.normal_(std=0.02)
        return
    experts = layer.base_layer
    of_all = factor.new_empty(experts.num_experts, *factor.shape[1:]).normal_(std=0.02)
    factor.copy_(of_all[experts.owned.start : experts.owned.stop])


def _all_labels(batch: Batch) -> Tensor:
    """Labels that make every token a target, except the first of each concatenated sequence."""
    labels = batch["input_ids"].clone()
    starts = batch["position_ids"] == 0 if "position_ids" in batch else torch.zeros_like(labels, dtype=torch.bool)
    labels[starts] = -100
    labels[..., 0] = -100
    if "attention_mask" in batch:
        labels[batch["attention_mask"] == 0] = -100
    return labels


def _first_to_differ(model: nn.Module, batch: Batch) -> str:
    """Name of the first module whose output is another one when the forward is repeated; for a failure's message."""

    def digests() -> list[tuple[str, str]]:
        seen: list[tuple[str, str]] = []

        def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple | list) else [output]
                seen.append((name, _digest([value for value in outputs if isinstance(value, Tensor)])))

            return hook

        handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
        try:
            probe_logits(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    pairs = zip(digests(), digests(), strict=False)
    return next((name for (name, one), (_, other) in pairs if one != other), "one call in some")


def _digest(tensors: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _state_bytes(state: Any) -> int:
    nested = state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0
    return state.absmax.nbytes + nested


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors [..., V], a few positions at a time."""
    pairs = zip(one.flatten(0, -2).split(32), other.flatten(0, -2).split(32), strict=True)
    return float(torch.stack([(a.float() - b.float()).abs().max() for a, b in pairs]).max())


def _cuda_devices(batch: Batch) -> list[int]:
    device = batch["input_ids"].device
    return [device.index or 0] if device.type == "cuda" else []
