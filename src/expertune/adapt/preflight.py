"""Preflight check after attaching: is it 4-bit, does it learn, is it repeatable, and does the adapter matter?

Failures that are silent elsewhere are measured here before the first step: experts left in 16 bits, factors that never
get a gradient, forwards that drift, adapters that change nothing. The check uses a few training sequences, makes every
B factor non-zero so that A can get a gradient, and restores the factors to the byte.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from expertune.adapt.comparison import NUM_FORWARDS, BaseForward, Batch, Comparison, cuda_devices, digest, probe_logits
from expertune.adapt.few_tokens import choose_tokens, few_tokens
from expertune.adapt.first_factors import first_factors
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.reachability import reachable_modules
from expertune.checkpoint.linears import is_linear
from expertune.errors import ConfigError, PreflightError
from expertune.experts.balance import RouterLosses
from expertune.experts.contract import is_experts
from expertune.experts.load import add_tokens
from expertune.experts.lora import ExpertsLora, projection_of
from expertune.experts.module import Nf4Experts, in_lockstep, parallel_of

# Over the layers: the forwards that are compared, the one that gradients are taken of, and its backward.
_NUM_PASSES = NUM_FORWARDS + 2


def preflight(
    model: ExpertPeftModel,
    batch: Batch,
    base: BaseForward,
    progress: Callable[[int, int], None] = lambda *_: None,
    router_losses: RouterLosses | None = None,
) -> dict[str, Any]:
    """Run all checks on a model that has its adapter attached.

    What passes the layers, what it shows, and what it costs, with `base` taken before:

    1. A forward of the base model, in evaluation. One transfer of each layer.
    2. A forward with gradients, in training mode with the adapter's dropout, and the loss; beside it two forwards in
       evaluation with the adapter (the model repeats itself to the bit, and the adapter changes its logits) and one
       with the adapter disabled (equal to the first to the bit: attaching has changed nothing that these tokens reach,
       nor what is computed with it; what experts hold in memory is compared by checksums). Together one transfer of
       each layer, as they pass it in turns where experts are offloaded.
    3. The backward: every factor has a finite gradient that is not zero. One transfer of each layer but the last.

    Where an adapter's first factors are taken away from what it gives, another forward, with the factors as they are,
    equals the first to the bit.

    Where experts are offloaded each computes `base.enough` of its tokens in all of these. A step of training takes the
    second and the third transfer on the run's tokens.

    Args:
        model: the adapted model.
        batch: `input_ids` [B, S] of real sequences, with `position_ids` where they are concatenated.
        base: a forward of the base model before the adapter was attached, of the same batch or of another.
        progress: called with (layers passed, in all), where every pass over the model counts its layers.
        router_losses: what the run adds to its loss; measured too.

    Returns:
        What was measured, ready for the run record.

    Raises:
        PreflightError: a check failed; names the module and what was found.
        ConfigError: a target is a module that no text of this model has a gradient to.
    """
    started = time.monotonic()
    comparison = Comparison(model, base)
    bits = _check_four_bits(model)
    with (
        torch.random.fork_rng(devices=cuda_devices(batch["input_ids"])),
        _nonzero_factors(model),
        _told(comparison.layers, progress),
    ):
        learning, of_router = _check_learning(model, batch, router_losses, comparison)
        comparison.finish()
    if any(True for _ in first_factors(model.get_base_model())):
        _check_beginning(model, base)
    return {
        "passed": True,
        "four_bit": bits,
        "learning": {**learning, "tokens": batch["input_ids"].numel()},
        "repeatable": True,
        "effective": {
            "largest_logit_change": comparison.largest_change,
            "disabled_equals_base": True,
            "tokens": base.batch["input_ids"].numel(),
            **comparison.experts_reached,
        },
        **({"router": of_router} if of_router else {}),
        "seconds": round(time.monotonic() - started, 3),
    }


@contextmanager
def _told(layers: Sequence[nn.Module], progress: Callable[[int, int], None]) -> Iterator[None]:
    """Call `progress` while layers are passed; a backward passes them where activation checkpointing computes again."""
    num_passed, total, here = 0, _NUM_PASSES * len(layers), threading.current_thread()

    def passed(*_: Any) -> None:
        nonlocal num_passed
        num_passed += 1
        if threading.current_thread() is here:  # terminals and notebooks are not written to by several
            progress(min(num_passed, total), total)

    progress(0, total)
    handles = [layer.register_forward_hook(passed) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    progress(total, total)


def _check_beginning(model: ExpertPeftModel, base: BaseForward) -> None:
    """An adapter whose first factors are taken away begins as the base model, to the bit."""
    logits = probe_logits(model, base.batch, base.enough)
    if not torch.equal(logits, base.logits):
        largest = float((logits.float() - base.logits.float()).abs().max())
        raise PreflightError(
            f"the adapter does not begin as the base model: logits differ by up to {largest:.3g}, as if its first "
            "factors were not those that are taken away from what it gives"
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
    model: ExpertPeftModel, batch: Batch, losses: RouterLosses | None, comparison: Comparison
) -> tuple[dict[str, Any], dict[str, float]]:
    """Every factor that can receive a gradient gets a finite, non-zero one; the routers' losses.

    As in a step, with the adapter's dropout: the kernels compute it in ways of their own.
    """
    was_training = model.training
    model.train()
    try:
        tokens, of_router = _take_gradients(model, batch, losses, comparison)
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
    return {"factors_learning": learning + of_experts, "factors_without_tokens": idle}, figures


def _take_gradients(
    model: ExpertPeftModel, batch: Batch, losses: RouterLosses | None, comparison: Comparison
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A forward in training mode and its backward; the tokens of each expert by module, and the routers' losses."""
    labels, enough = _all_labels(batch), comparison.enough
    # The last token of a sequence predicts nothing and nothing attends to it.
    matters_T = labels.roll(-1, dims=-1).reshape(-1) != -100
    # Open in backward too, where activation checkpointing computes the layers again.
    with few_tokens(model, enough, training=True, matters_T=matters_T):
        watched = losses.watching(batch.get("attention_mask")) if losses else nullcontext()
        with _tokens_per_expert(model, enough, matters_T) as tokens, watched as routed, comparison.beside():
            # Every token is a target here, so that a masked prompt does not starve the experts that serve it.
            output = model(**{**batch, "labels": labels}, use_cache=False)
        loss = output.loss
        del output
        of_router = losses.of(routed, routed.totals) if losses and routed else {}
        if losses and routed:
            loss = loss + losses.weighted(of_router)
        if not loss.requires_grad:
            raise PreflightError("no factor of the adapter takes part in the loss, so that none can learn")
        loss.backward()
    return tokens, of_router


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
def _tokens_per_expert(model: nn.Module, enough: int | None, matters_T: Tensor) -> Iterator[dict[str, Tensor]]:
    """Count, while the block runs, the tokens that each expert computes and that can influence the loss.

    An expert that serves only others gets no gradient, and that is correct.
    """
    counts: dict[str, Tensor] = {}
    handles = []
    matters_T = matters_T.cpu()

    def count(name: str, num_experts: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not module.training:  # of a comparison
                return
            index_TK = inputs[1].cpu()
            counted_T = matters_T
            if enough is not None:
                computed_T = torch.zeros_like(matters_T)
                computed_T[choose_tokens(index_TK, enough, matters_T)] = True
                counted_T = matters_T & computed_T
            counts[name] = torch.zeros(num_experts, dtype=torch.int64)
            add_tokens(counts[name], index_TK[counted_T])

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
    bytes_before = digest(before)
    try:
        with torch.no_grad():
            for factor, layer in layers:
                _fill(factor, layer)
        yield
    finally:
        with torch.no_grad():
            for factor, old in zip(factors, before, strict=True):
                factor.copy_(old)
    if digest(factors) != bytes_before:
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


def _state_bytes(state: Any) -> int:
    nested = state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0
    return state.absmax.nbytes + nested
