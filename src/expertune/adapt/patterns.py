"""How an adapter's config speaks of many modules at once: patterns of their names on disk, and what fits them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank

_T = TypeVar("_T")


def first_match(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that fits one of a module's names, as PEFT fits them (`get_pattern_key`)."""
    fitting = (value for name in names for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(fitting, default)


def by_pattern(
    names: NameMap, modules: Mapping[str, _T], experts: Mapping[str, Mapping[str, _T]]
) -> dict[str, tuple[str, _T]]:
    """What there is for each module, and for each projection of experts, by a pattern of the names on disk.

    Args:
        names: the base model's name map.
        modules: by live name of a linear or a router.
        experts: by experts module and projection.

    Returns:
        A pattern -> one of the names that it fits, and what there is for them.
    """
    found = {re.escape(names.on_disk(live)): (names.on_disk(live), each) for live, each in modules.items()}
    for module, projections in experts.items():
        for projection, each in projections.items():
            found[expert_pattern(names, module, projection)] = (names.expert_on_disk(module, 0, projection), each)
    return found


def expert_pattern(names: NameMap, module: str, projection: str) -> str:
    """A pattern of the names on disk that one projection of all experts of a module has."""
    return rf"{re.escape(names.on_disk(module))}\.\d+\.{names.projection_names[projection]}"


def settings(default: Rank, rslora: bool, ranks: Mapping[str, Rank]) -> dict[str, Any]:
    """Keys of a run file's `lora:` section: the default rank and alpha, and what differs from them by pattern."""
    return {
        "r": default.rank,
        "alpha": default.alpha,
        "rslora": rslora,
        "rank_pattern": {name: rank.rank for name, rank in ranks.items() if rank.rank != default.rank},
        "alpha_pattern": {name: rank.alpha for name, rank in ranks.items() if rank.alpha != default.alpha},
    }


def leaves(modules: Iterable[str]) -> list[str]:
    """Last parts of names, sorted: what PEFT's `target_modules` lists."""
    return sorted({name.rpartition(".")[2] for name in modules})
