"""Linear layers beside the experts: which there are.

bitsandbytes is not imported for it: what only reads shapes, such as a plan, has no 4-bit linear yet.
"""

from collections.abc import Iterator, Mapping
from typing import TypeGuard

from torch import nn

from expertune.experts.contract import ExpertsSpec

NF4_STATE = "quant_state.bitsandbytes__nf4"
"""The part of a saved 4-bit weight that is JSON, by bitsandbytes' name."""


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes x @ W.T + b and nothing else: a subclass may group, clip or scale."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _is_4bit(module)


def _is_4bit(module: nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)


def decoder_layers(model: nn.Module, specs: Mapping[str, ExpertsSpec]) -> Iterator[tuple[str, nn.Module]]:
    """Every repeated layer with its dotted name, dense ones among sparse ones included.

    A layer is a child of the outermost `ModuleList` that leads to an experts module; the layers of a vision tower or
    an encoder without experts are none.
    """
    seen: set[str] = set()
    for experts in specs:
        path = experts.split(".")
        for depth in range(1, len(path)):
            name = ".".join(path[:depth])
            module = model.get_submodule(name)
            if isinstance(module, nn.ModuleList):
                if name not in seen:
                    seen.add(name)
                    yield from ((f"{name}.{index}", layer) for index, layer in enumerate(module))
                break


def attention_linears(model: nn.Module, specs: Mapping[str, ExpertsSpec]) -> Iterator[str]:
    """Linears of the blocks that mix tokens: attention, and what stands in its place in hybrid models.

    transformers gives such a block its `layer_idx`, the slot it takes in the cache; feed-forward blocks have none.
    """
    for layer_name, layer in decoder_layers(model, specs):
        for child, block in layer.named_children():
            path = f"{layer_name}.{child}"
            if hasattr(block, "layer_idx") and not any(name == path or name.startswith(f"{path}.") for name in specs):
                yield from (name for name, module in block.named_modules(prefix=path) if is_linear(module))
