"""The ranks that an adapter's config gives its modules, held to those of its tensors.

A folder that has files of two adapters would be applied at a scale that neither had: alpha is divided by the rank of
the tensors. PEFT's own loader stops at such a folder; tensors that are read by name would not.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from expertune.adapt.patterns import first_match
from expertune.checkpoint.names import NameMap
from expertune.errors import CheckpointError
from expertune.experts.layout import fused_projections


def require_ranks_of_config(
    config: Mapping[str, Any], factors: Mapping[str, Tensor], names: NameMap, where: str
) -> None:
    """Refuse tensors of other ranks than the config says; those of stacks are `require_rank_of_stack`'s.

    Args:
        config: `adapter_config.json`.
        factors: A [r, in] of each module, by its name on disk.
        names: the base model's name map.
        where: what to call the adapter in errors.

    Raises:
        CheckpointError: names the key of the config, the module and both ranks.
    """
    for name, keys, stack, adapted in _named(factors, names):
        found = _by_pattern(config, keys)
        together = _by_pattern(config, stack)
        if stack and config.get("target_parameters"):  # by which PEFT gives a stack `r` where no pattern names it
            together = together or {config["r"]}
        # What a stack has is shared by its adapted projections.
        allowed = (found or {config["r"]}) | {rank // adapted for rank in together}
        _require(name, factors[name].shape[0], allowed, bool(found), where)


def require_rank_of_stack(config: Mapping[str, Any], rank: int, keys: Sequence[str], count: int, where: str) -> None:
    """Refuse the factors of a stack where their rank for an expert is not the config's.

    Args:
        config: `adapter_config.json`.
        rank: of the tensors.
        keys: the stack's names.
        count: its projections. PEFT gives it as many times `r` where the config names these.
        where: what to call the adapter in errors.

    Raises:
        CheckpointError: names the key of the config, the stack and both ranks.
    """
    found = _by_pattern(config, keys)
    allowed = found or {config["r"]}
    _require(keys[0], rank, allowed | {count * each for each in allowed}, bool(found), where)


def _require(name: str, rank: int, allowed: set[int], is_pattern: bool, where: str) -> None:
    if rank not in allowed:
        said, key = " or ".join(map(str, sorted(allowed))), "rank_pattern" if is_pattern else "r"
        raise CheckpointError(
            f"{where}: adapter_config.json has {key} {said} for {name}, and its tensors have rank {rank}: these are "
            "files of two adapters, or one was changed; copy the adapter again"
        )


def _by_pattern(config: Mapping[str, Any], keys: Sequence[str]) -> set[int]:
    """What patterns give a module, by each of its names; nothing where `r` holds."""
    patterns = config.get("rank_pattern") or {}
    return {rank for key in keys if (rank := first_match(patterns, [key], None)) is not None}


def _named(factors: Mapping[str, Tensor], names: NameMap) -> Iterator[tuple[str, list[str], list[str], int]]:
    """Each module that has a factor, with names that a pattern may have for it.

    Of a projection the first expert stands for all, which are compared with each other elsewhere; with it come the
    names of its stack, and how many projections of that are adapted.
    """
    rest = dict.fromkeys(factors)
    for module, spec in names.specs.items():
        for weight in spec.weight_names:
            projections = [names.experts_on_disk(module, each) for each in fused_projections(spec, weight)]
            adapted = [held for experts in projections if (held := [name for name in experts if name in rest])]
            for held in adapted:
                yield held[0], held[:1], stack_names(names, module, weight), len(adapted)
                for name in held:
                    del rest[name]
    live = {names.on_disk(name): name for name in names.live_modules()}
    for name in rest:
        own = live.get(name, name)
        yield name, [name, own, f"{own}.weight"], [], 1


def stack_names(names: NameMap, module: str, weight: str) -> list[str]:
    """What patterns may call a stack: its live name, and by the module's name on disk."""
    return [f"{module}.{weight}", f"{names.on_disk(module)}.{weight}"]
