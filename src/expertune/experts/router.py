"""Find the router of an experts module by shape and place, not by name.

The experts contract hands over `(hidden_states, top_k_index, top_k_weights)`; who computed the last two is left to the
family. What they share: the router sits beside its experts, under the same parent, and holds a matrix with one row per
expert.

Shape suffixes: E experts, D hidden size.
"""

from collections.abc import Mapping

from torch import nn

from expertune.experts.contract import ExpertsSpec


def find_router(name: str, model: nn.Module, spec: ExpertsSpec) -> str | None:
    """Name of the module that owns the router's [E, D] weight.

    Args:
        name: dotted name of the experts module.
        model: the model that holds it; the meta device is enough, and the experts may already have been swapped.
        spec: shapes of the experts module.

    Returns:
        The dotted name, or None where no module beside the experts holds a matrix of this shape (a family that routes
        in a smaller width, or scores shared experts in the same matrix).
    """
    block = router_block(name, model, spec)
    if block is None:
        return None
    return _owner(model.get_submodule(block), block, (spec.num_experts, spec.hidden_size))


def find_logits(name: str, model: nn.Module, spec: ExpertsSpec) -> str | None:
    """Name of the module that gives a logit for each expert: of the router's [E, D] weight, or [E, any] in a network.

    Arguments as for `find_router`; adapters may be attached.
    """
    block = router_block(name, model, spec)
    if block is None:
        return None
    module, num_experts = model.get_submodule(block), spec.num_experts
    return _owner(module, block, (num_experts, spec.hidden_size)) or _owner(module, block, (num_experts, None))


def router_block(name: str, model: nn.Module, spec: ExpertsSpec) -> str | None:
    """Name of the child beside the experts that routes: the router itself, or a small network around it.

    Its linears stay in 16 bits. Arguments as for `find_router`; None where nothing beside the experts has a matrix
    with one row per expert.
    """
    parent, _, leaf = name.rpartition(".")
    siblings = {
        f"{parent}.{child}".removeprefix("."): module
        for child, module in model.get_submodule(parent).named_children()
        if child != leaf
    }
    for shape in ((spec.num_experts, spec.hidden_size), (spec.num_experts, None)):
        holders = [child for child, module in siblings.items() if _owner(module, child, shape)]
        if holders:
            # A shared expert may be E wide as well (512 and 512 in one published model): the router is far smaller.
            return min(holders, key=lambda child: sum(p.numel() for p in siblings[child].parameters()))
    return None


def router_blocks(model: nn.Module, specs: Mapping[str, ExpertsSpec]) -> set[str]:
    """Names of the `router_block` of every experts module that has one."""
    return {block for name, spec in specs.items() if (block := router_block(name, model, spec)) is not None}


def _owner(block: nn.Module, name: str, shape: tuple[int, int | None]) -> str | None:
    rows, columns = shape
    for path, parameter in block.named_parameters():
        fits = parameter.ndim == 2 and parameter.shape[0] == rows
        if fits and columns in (None, parameter.shape[1]):
            return ".".join(filter(None, (name, path.rpartition(".")[0])))
    return None
