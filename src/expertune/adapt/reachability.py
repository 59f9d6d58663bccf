"""Gradient reachability: the modules in which an adapter can learn, found on a short text before anything is attached.

A family may have linears that its logits do not depend on smoothly: an index that selects tokens, a weight that a
kernel reads without calling the module, experts for images. An adapter there would never get a gradient.
"""

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.adapt.internals import is_refused
from expertune.experts.module import experts_passed_by

_TOKENS = 16


def reachable_modules(model: PreTrainedModel, candidates: Mapping[str, nn.Module]) -> set[str]:
    """Names of the candidates whose output the logits of a text have a gradient to.

    Args:
        model: a causal language model with its weights and without adapters; nothing of it is changed.
        candidates: modules of the model by name. One that PEFT refuses to adapt in this model is not reached either.
    """
    outputs: list[tuple[str, Tensor]] = []

    def cut(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        return embedded.detach().requires_grad_()

    def note(name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                outputs.append((name, output))

        return keep

    embeddings = model.get_input_embeddings()
    ids = torch.arange(1, _TOKENS + 1, device=embeddings.weight.device) % model.config.get_text_config().vocab_size
    hooks = [embeddings.register_forward_hook(cut)]
    hooks += [module.register_forward_hook(note(name)) for name, module in candidates.items()]
    try:
        with torch.enable_grad(), experts_passed_by(model):
            # The same sequence twice, so that no family needs to know where sequences begin.
            logits = model(input_ids=ids.expand(2, -1), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs or not logits.requires_grad:
        return set()
    gradients = torch.autograd.grad(logits.float().sum(), [output for _, output in outputs], allow_unused=True)
    reached = {name for (name, _), gradient in zip(outputs, gradients, strict=True) if gradient is not None}
    return {name for name in reached if not is_refused(model, name)}


def is_weight_used_alone(model: nn.Module, name: str) -> bool:
    """Whether the block around a module takes its weight as an operand, as `self.x.weight @ y` or a kernel's argument.

    An adapter is a module's own output and has no part in that. Some families call the module where the model is
    quantized and nowhere else, so that a trial in 4 bits would not show it. The block's source is read instead.

    Args:
        model: the model that holds the module.
        name: the module's.
    """
    parent, _, leaf = name.rpartition(".")
    return leaf in _weights_used_alone(type(model.get_submodule(parent)))  # type: ignore[arg-type] # types are hashable


@cache
def _weights_used_alone(kind: type[nn.Module]) -> frozenset[str]:
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):  # made without a file
        return frozenset()
    return frozenset(
        found
        for line in lines
        if not re.search(r"\b(isinstance|getattr|hasattr)\(|\binit\.", line)
        for found in re.findall(r"\bself\.(\w+)\.weight\s*(?:@|,|\))", line)
    )
