"""Which linear layers, beside the experts, are held in 4 bits.

The loader replaces exactly these by bitsandbytes' `Linear4bit`; the plan counts exactly these. What stays 16-bit is
small or decides much: routers, embeddings, the output head, norms.
"""

from collections.abc import Iterator, Mapping

from bitsandbytes.nn import Linear4bit
from torch import nn

from expertune.experts.contract import BLOCK_SIZE, ExpertsSpec, require_experts
from expertune.experts.router import router_blocks


def linears_to_quantize(model: nn.Module, specs: Mapping[str, ExpertsSpec] | None = None) -> dict[str, nn.Linear]:
    """Linear layers of the decoder layers that become 4-bit, by dotted name in model order.

    A linear stays as it is when it belongs to a router, is the output head, or has an input width that is no multiple
    of the quantization block: one scale would then cover the end of one row and the start of the next.

    Args:
        model: a causal language model; the meta device is enough.
        specs: its experts modules; needed where they have already been swapped, read from the model otherwise.

    Raises:
        UnsupportedModelError: `specs` was not given and the model has no experts that can be packed.
    """
    specs = require_experts(model) if specs is None else specs
    routers = router_blocks(model, specs)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for layer_name, layer in decoder_layers(model, specs)
        for name, module in layer.named_modules(prefix=layer_name)
        if is_linear(module)
        and module is not head
        and module.in_features % BLOCK_SIZE == 0
        and not any(name == router or name.startswith(f"{router}.") for router in routers)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b and nothing else: a subclass may group, clip or scale."""
    if isinstance(module, Linear4bit):
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


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
