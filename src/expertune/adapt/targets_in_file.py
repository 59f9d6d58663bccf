"""The modules that an adapter's config names, held to those of its tensors.

PEFT makes the modules that the config names, and leaves out in silence what else the file has tensors of; read by the
tensors' names, as here, the same files would be another adapter.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from expertune.adapt.ranks_in_file import stack_names
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import short
from expertune.errors import CheckpointError
from expertune.experts.layout import fused_projections
from expertune.text import counted

# Of a module's name; that of a damaged file may have any number.
_MOST_PARTS = 64


def require_named(
    config: Mapping[str, Any], modules: Collection[str], names: NameMap, where: str, is_plain: bool
) -> None:
    """Refuse tensors of modules that an `adapter_config.json` does not name.

    Args:
        config: the file's, which has been validated.
        modules: names on disk of all that has a factor; those that the model does not have are not looked at.
        names: the base model's name map.
        where: the adapter.
        is_plain: no stack of experts is one tensor in the file. PEFT names a stack by one of its projections too.

    Raises:
        CheckpointError: names the first module, and how many there are.
    """
    targets = {*(config.get("target_modules") or ()), *(config.get("target_parameters") or ())}
    unnamed = [
        each
        for held, called in _called(modules, names, is_plain)
        if targets.isdisjoint(_ends_of_each(called))
        for each in held
    ]
    if not unnamed:
        return
    first = unnamed[0]
    more = f" and {counted(len(unnamed) - 1, 'more module')}" if len(unnamed) > 1 else ""
    raise CheckpointError(
        f"{where}: the tensors have factors of {short(first)}{more}, which target_modules of adapter_config.json does "
        "not name, so that PEFT would leave them out: these are files of two adapters, or one was changed; copy the "
        f"adapter again, or add {short(first.rpartition('.')[2])} to target_modules"
    )


def _called(modules: Collection[str], names: NameMap, is_plain: bool) -> Iterator[tuple[list[str], list[str]]]:
    """Modules that a config names by the same, with all that it may call them: of a stack's also names of the stack."""
    rest = dict.fromkeys(modules)
    for module, spec in names.specs.items():
        for weight in spec.weight_names:
            experts = [name for each in fused_projections(spec, weight) for name in names.experts_on_disk(module, each)]
            held, of_stack = [name for name in experts if name in rest], stack_names(names, module, weight)
            if is_plain:
                yield from (([name], [name, *of_stack]) for name in held)
            else:
                yield held, [*experts, *of_stack]
            for name in held:
                del rest[name]
    live = {names.on_disk(name): name for name in names.live_modules()}
    for name in rest:
        if name in live:
            yield [name], [name, live[name], f"{name}.weight", f"{live[name]}.weight"]


def _ends_of_each(called: list[str]) -> Iterator[str]:
    """Names, and what is left of each after each of its dots: a target is a name or the end of one."""
    for name in called:
        parts = name.rsplit(".", _MOST_PARTS)
        yield from (".".join(parts[first:]) for first in range(len(parts)))
