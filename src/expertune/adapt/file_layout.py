"""Which adapter file stock PEFT reads on a model.

PEFT on transformers 5 stacks per-expert factors for the model types that it knows
(`peft.utils.transformers_weight_conversion`), and drops them in silence for the others. So candidates are tried with
PEFT's own functions (see `layout_trial`), in this order:

1. Per-expert names, and the projections among `target_modules`: what every release of PEFT and other engines read.
2. Per-expert names, and stacks and weights that PEFT does not find by themselves among `target_parameters`.
3. PEFT's own names of stacks, every rank filled up to the rank of gate and up together.

Everywhere `lora_alpha` is `r`, so that readers of lora_alpha / r alone have a factor of one; scales are in B. Where
gate and up are one adapter of twice the rank (2.), its alpha is twice `r`, under a name that only PEFT knows.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from expertune.adapt.layout_trial import NotReadError, StockLayout, Twin, adapted_stacks
from expertune.adapt.patterns import by_pattern, first_match, leaves
from expertune.checkpoint.meta import build_twin
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import ResolvedTargets

_NO_DORA = (
    "PEFT has no DoRA on stacked experts, as which it holds this model's; `expertune export RUN_DIR --to merged` "
    "writes base and adapter as one model"
)

Candidate = Callable[[Twin], StockLayout]


def stock_layout(
    model: PreTrainedModel, names: NameMap, targets: ResolvedTargets, r: int, rank_pattern: Mapping[str, int]
) -> StockLayout:
    """The first layout that stock PEFT reads on the 16-bit model of the same class; the per-expert one where none is.

    Args:
        model: the model, in 4 bits or on the meta device; its class and its config count.
        names: its name map.
        targets: what the adapter changes, with ranks.
        r: rank of what `rank_pattern` does not name.
        rank_pattern: the run file's.
    """
    key = _key(model, names, targets, r, rank_pattern)
    if key not in _tried:
        usual = _usual(names, targets, r, rank_pattern)
        if targets.use_dora and targets.experts:
            return replace(usual, refusal=_NO_DORA)
        candidates: list[Candidate] = [lambda twin: usual, lambda twin: _explicit(twin, names, targets, usual.r)]
        if targets.experts:
            candidates.append(lambda twin: _fused(twin, names, targets, usual.r))
        found = _first_read(model, names, targets, usual, candidates)
        while len(_tried) >= _MOST_TRIED:
            del _tried[next(iter(_tried))]
        _tried[key] = found
    return deepcopy(_tried[key])


def fused_layout(
    model: PreTrainedModel, names: NameMap, targets: ResolvedTargets, r: int, rank_pattern: Mapping[str, int]
) -> StockLayout:
    """PEFT's own names of stacks, whatever else it reads; the arguments are those of `stock_layout`."""
    usual = _usual(names, targets, r, rank_pattern)
    return _first_read(model, names, targets, usual, [lambda twin: _fused(twin, names, targets, r)])


SPARSE = (
    "only some of each layer's experts have an adapter, and PEFT on transformers 5 holds all of them as one tensor; "
    "export --to peft gives the others zeros"
)


def sparse_layout(names: NameMap, targets: ResolvedTargets, r: int, rank_pattern: Mapping[str, int]) -> StockLayout:
    """Per-expert names of the experts that have an adapter, where others have none: see `stock_layout`."""
    return replace(_usual(names, targets, r, rank_pattern), refusal=SPARSE)


# A run asks before its model is loaded and again when the adapter is attached; a trial takes seconds.
_tried: dict[tuple[Any, ...], StockLayout] = {}
_MOST_TRIED = 16
# What loading adds to a config; a twin is built without the first, and no module's name or shape depends on the others.
_WITHOUT_EFFECT = ("quantization_config", "dtype", "_name_or_path")


def _key(
    model: PreTrainedModel, names: NameMap, targets: ResolvedTargets, r: int, rank_pattern: Mapping[str, int]
) -> tuple[Any, ...]:
    """Everything that a trial's outcome follows from: the twin's class and config, the targets, and their names."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _WITHOUT_EFFECT}
    on_disk = by_pattern(names, targets.linears | targets.router, targets.experts)
    return type(model), repr(config), repr(targets), tuple(on_disk), r, tuple(rank_pattern.items())


def _first_read(
    model: PreTrainedModel,
    names: NameMap,
    targets: ResolvedTargets,
    usual: StockLayout,
    candidates: Iterable[Candidate],
) -> StockLayout:
    """The first candidate that PEFT reads; where it reads none, the usual layout, and why the last was not read."""
    refusal = ""
    with torch.random.fork_rng(devices=[]):  # nothing that a run draws may depend on when this is asked
        for make in candidates:
            try:
                twin = Twin(build_twin(model))
            except Exception as error:  # code that comes with a model may raise anything
                return replace(usual, refusal=f"the model cannot be built without weights: {error}")
            try:
                return twin.try_on(make(twin), names, targets)
            except NotReadError as error:
                refusal = str(error)
    return replace(usual, refusal=refusal)


def _usual(names: NameMap, targets: ResolvedTargets, r: int, rank_pattern: Mapping[str, int]) -> StockLayout:
    """Per-expert names, and targets by the last part of names on disk: what PEFT wrote when experts were linears."""
    found = StockLayout(r, expert_ranks=_expert_ranks(targets), use_dora=targets.use_dora)
    found.ranks = {name: rank.rank for name, rank in (*targets.linears.items(), *targets.router.items())}
    on_disk = by_pattern(names, found.ranks, found.expert_ranks)
    stacks = {f"{module}.{weight}": sum(held) for module, weight, _, held in adapted_stacks(names, found.expert_ranks)}
    # PEFT gives gate and up together twice `r`, whatever the experts' patterns are.
    is_default = all(rank == r for ranks in found.expert_ranks.values() for rank in ranks.values())
    first = {} if is_default else stacks
    known = {**first, **rank_pattern}
    changed = {pattern: rank for pattern, (name, rank) in on_disk.items() if first_match(known, [name], r) != rank}
    found.rank_pattern = {**first, **changed, **rank_pattern}
    found.target_modules = leaves(name for name, _ in on_disk.values())
    return found


def _explicit(twin: Twin, names: NameMap, targets: ResolvedTargets, r: int) -> StockLayout:
    """Per-expert names, with targets by live name, and stacks and weights that PEFT does not find among parameters."""
    found = StockLayout(r, expert_ranks=_expert_ranks(targets), use_dora=targets.use_dora)
    found.ranks = {name: rank.rank for name, rank in (*targets.linears.items(), *targets.router.items())}
    _target_linears(found, twin, names, targets)
    stacks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, weight, projections, held in adapted_stacks(names, found.expert_ranks):
        if len(held) < len(projections):
            raise NotReadError(f"PEFT has one adapter for {' and '.join(projections)} together")
        stacks[f"{module}.{weight}"] = sum(held)
        # The scale of each projection by itself is r / rank; of both together it has to be the same.
        alphas[f"{module}.{weight}"] = r * len(projections)
    _target_stacks(found, twin, stacks)
    found.alpha_pattern = _patterns({name: alpha for name, alpha in alphas.items() if alpha != r}, stacks)
    experts = [
        name
        for module, ranks in found.expert_ranks.items()
        for projection in ranks
        for name in names.experts_on_disk(module, projection)
    ]
    if found.target_modules:
        # Of no use to PEFT on transformers 5, which would warn of them if they were all; where experts are linears,
        # these find them.
        found.target_modules = sorted({*found.target_modules, *_suffixes(experts, twin.modules).values()})
    return found


def _fused(twin: Twin, names: NameMap, targets: ResolvedTargets, r: int) -> StockLayout:
    """PEFT's own names of stacks; one rank for all that have no larger one."""
    whole_rank = r * max(len(projections) for _, _, projections, _ in adapted_stacks(names, targets.experts))
    found = StockLayout(whole_rank, use_dora=targets.use_dora)
    found.ranks = {name: max(rank.rank, found.r) for name, rank in (*targets.linears.items(), *targets.router.items())}
    _target_linears(found, twin, names, targets)
    stacks: dict[str, int] = {}
    for module, weight, projections, held in adapted_stacks(names, targets.experts):
        whole = max(found.r, max(rank.rank for rank in held) * len(projections))
        whole += -whole % len(projections)  # each projection has an equal share
        stacks[f"{module}.{weight}"] = whole
        adapted = [each for each in projections if each in targets.experts[module]]
        found.expert_ranks.setdefault(module, {}).update(dict.fromkeys(adapted, whole))
        found.stacks.setdefault(module, {})[weight] = ""
    _target_stacks(found, twin, stacks)
    return found


def _expert_ranks(targets: ResolvedTargets) -> dict[str, dict[str, int]]:
    """Ranks of each projection in the file, those of gate and up made equal: PEFT has one scale for the two."""
    found = {}
    for module, ranks in targets.experts.items():
        together = max((rank.rank for projection, rank in ranks.items() if projection != "down"), default=0)
        found[module] = {
            projection: rank.rank if projection == "down" else together for projection, rank in ranks.items()
        }
    return found


def _target_linears(found: StockLayout, twin: Twin, names: NameMap, targets: ResolvedTargets) -> None:
    """Linears by the shortest ends of their live names that fit no other module; as parameters where PEFT rewrites."""
    suffixes = _suffixes(targets.linears, twin.modules)
    parameters = {name: f"{name}.weight" for name in targets.router}
    for name, suffix in suffixes.items():
        if twin.is_kept(suffix):
            found.target_modules.append(suffix)
        else:
            parameters[name] = f"{name}.weight"
    found.target_modules = sorted(set(found.target_modules))
    found.target_parameters = sorted(set(_suffixes(parameters.values(), twin.parameters, at_least=3).values()))
    ranks = {parameters.get(name, name): rank for name, rank in found.ranks.items()}
    found.rank_pattern = _patterns({name: rank for name, rank in ranks.items() if rank != found.r}, ranks)


def _target_stacks(found: StockLayout, twin: Twin, stacks: dict[str, int]) -> None:
    suffixes = _suffixes(stacks, twin.parameters, at_least=2)
    found.target_parameters = sorted({*found.target_parameters, *suffixes.values()})
    found.rank_pattern |= _patterns({name: rank for name, rank in stacks.items() if rank != found.r}, stacks)


def _patterns(values: Mapping[str, Any], among: Iterable[str]) -> dict[str, Any]:
    """Patterns by the ends of names where all names of that end have the value, else by whole names."""
    found: dict[str, Any] = {}
    everything = list(among)
    for name, value in values.items():
        end = ".".join(name.rsplit(".", 2)[-2:])
        alike = [other for other in everything if other == end or other.endswith(f".{end}")]
        is_common = all(values.get(other) == value for other in alike)
        found[re.escape(end if is_common else name)] = value
    return found


def _suffixes(wanted: Iterable[str], among: Iterable[str], at_least: int = 1) -> dict[str, str]:
    """For each wanted name the shortest end, in whole parts, that no other name among these has."""
    wanted = list(wanted)
    kept = set(wanted)
    taken = {end for name in among if name not in kept for end in _ends(name)}
    found = {}
    for name in wanted:
        ends = [end for end in _ends(name) if end.count(".") + 1 >= at_least]
        found[name] = next((end for end in ends if end not in taken), name)
    return found


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
