"""Which matrices the adapter changes, and with what rank: `lora.targets` resolved against one model.

Names are the checkpoint's own (`w1` in some families, `gate_proj` in most), matched as PEFT matches
`target_modules`: a target fits a module whose dotted name ends in it. A name that fits routed experts and shared
experts alike means both.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from expertune.config import LoraSection
from expertune.errors import ConfigError, nearest
from expertune.experts.spec import ExpertsSpec

if TYPE_CHECKING:
    from torch import nn

    from expertune.checkpoint.names import NameMap


class Rank(NamedTuple):
    """Size and numerator of the scale of one adapter pair (A is [rank, in], B is [out, rank])."""

    rank: int
    alpha: float


class Group(NamedTuple):
    """Experts of a layer that share a rank: the part of the projection's own that is theirs."""

    experts: tuple[int, ...]
    factor: float = 1.0


@dataclass
class ResolvedTargets:
    """What an adapter attaches to. All module names are the live model's.

    Attributes:
        linears: name of an `nn.Linear` -> its rank; the output head is among them where it is a target.
        experts: name of an experts module -> canonical projection (`gate`, `up`, `down`) -> its rank, which all
            experts of the module share.
        router: name of the module that owns a router's [num_experts, hidden] weight -> its rank.
        use_dora: whether each output feature has a magnitude too.
        groups: name of an experts module -> its experts that have an adapter, by rank; none where all have the same.
    """

    linears: dict[str, Rank] = field(default_factory=dict)
    experts: dict[str, dict[str, Rank]] = field(default_factory=dict)
    router: dict[str, Rank] = field(default_factory=dict)
    use_dora: bool = False
    groups: dict[str, list[Group]] = field(default_factory=dict)


def resolve_targets(
    model: "nn.Module", names: "NameMap", lora: LoraSection, reached: Collection[str] | None = None
) -> ResolvedTargets:
    """Resolve targets and rank patterns of a run file against a model; see `resolve`.

    Args:
        model: the causal language model, before an adapter is attached; the meta device is enough, and experts and
            linears may already be the 4-bit ones.
        names: its name map.
        lora: the adapter section of the run file.
        reached: the linears and experts modules that a loss can reach, where that has been tried.

    Raises:
        ConfigError: see `resolve`.
    """
    return resolve(Candidates.of(model, names), lora, reached)


def resolve(candidates: "Candidates", lora: LoraSection, reached: Collection[str] | None = None) -> ResolvedTargets:
    """Resolve targets and rank patterns of a run file against what a model has.

    `rank_pattern` and `alpha_pattern` follow PEFT: a key is a projection's name or a regular expression that has to
    match the end of the dotted name on disk from a dot on; the first key that matches wins.

    Args:
        candidates: what an adapter can attach to.
        lora: the adapter section of the run file.
        reached: the linears and experts modules that a loss can reach, where that has been tried; aliases mean these.

    Raises:
        ConfigError: a target or a pattern fits nothing (the message names the nearest names that exist), a pattern is
            no regular expression, or patterns ask for different ranks among the experts of one module.
    """
    ranks = _Ranks(lora, candidates.top_k if lora.expert_rank == "scaled" else 1)
    resolved = ResolvedTargets(use_dora=lora.use_dora)
    for target in lora.targets:
        if not candidates.take(target, ranks, resolved, reached):
            raise ConfigError(f"lora.targets: no module is called {target!r}{_nearest(target, candidates.known())}")
    ranks.require_all_used(candidates.known())
    if lora.use_dora and resolved.router:
        raise ConfigError(
            f"lora.use_dora: PEFT has no DoRA on routers, and lora.targets names {next(iter(resolved.router))}; leave "
            "it out"
        )
    resolved.groups = groups_of(candidates.specs, lora, resolved)
    return resolved


def most_selected(num_experts: int, share: float) -> int:
    """The most experts of a layer that are needed for a share of what all of them have."""
    return max(1, math.ceil(share * num_experts - 1e-9))


def groups_of(specs: Mapping[str, ExpertsSpec], lora: LoraSection, resolved: ResolvedTargets) -> dict[str, list[Group]]:
    """Which experts of each layer have an adapter, and with which part of the rank.

    Before experts have been selected, the first ones stand for as many as can be: a plan needs their number alone.

    Raises:
        ConfigError: no expert is a target, or the layers that the section names are not this model's.
    """
    if not lora.selects:
        return {}
    if not resolved.experts:
        raise ConfigError(
            f"{'lora.experts' if lora.experts else 'lora.expert_rank: load'}: chooses among routed experts, and "
            f"lora.targets names none of them ({', '.join(lora.targets)}); add experts to lora.targets"
        )
    layers = lora.experts.layers if lora.experts else {}
    if layers and (odd := (layers.keys() - specs.keys()) | (resolved.experts.keys() - layers.keys())):
        first = min(odd)
        raise ConfigError(
            f"lora.experts.layers: {first} is {'no layer of experts of this model' if first in layers else 'missing'}; "
            "remove layers to have experts selected"
        )
    found = {}
    for module in resolved.experts:
        count = specs[module].num_experts
        share = lora.experts.share if lora.experts else None
        chosen = layers.get(module, list(range(most_selected(count, share or 1.0))))
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= each < count for each in chosen):
            raise ConfigError(
                f"lora.experts.layers: {module} has experts 0 to {count - 1}; {chosen[:8]} are not some of these"
            )
        groups = _by_load(chosen) if lora.expert_rank == "load" else [Group(tuple(sorted(chosen)))]
        if len(groups) > 1 or len(chosen) < count:
            found[module] = groups
    return found


def _by_load(chosen: Sequence[int]) -> list[Group]:
    """Experts, the busiest first, in three groups: twice the rank, the rank, half of it; as much as with one rank."""
    quarter = len(chosen) // 4
    if not quarter:
        return [Group(tuple(sorted(chosen)))]
    busy, middle, idle = chosen[:quarter], chosen[quarter : -2 * quarter], chosen[-2 * quarter :]
    parts = ((middle, 1.0), (busy, 2.0), (idle, 0.5))
    return [Group(tuple(sorted(part)), factor) for part, factor in parts if part]


@dataclass(frozen=True)
class Candidates:
    """Everything in a model that an adapter can attach to: live name -> name on disk.

    Attributes:
        specs: its experts modules.
        linears: `nn.Linear`s that are no part of a router.
        attention: which of them belong to the blocks that mix tokens.
        routers: owners of routers' [num_experts, hidden] weights.
        head: live name of the output head.
        projections: canonical projection of an expert -> its name on disk.
        modules: the experts modules.
        top_k: experts for each token.
    """

    specs: Mapping[str, ExpertsSpec]
    linears: Mapping[str, str]
    attention: frozenset[str]
    routers: Mapping[str, str]
    head: str | None
    projections: Mapping[str, str]
    modules: Mapping[str, str]
    top_k: int

    @classmethod
    def of(cls, model: "nn.Module", names: "NameMap") -> "Candidates":
        """Those of a model; see `resolve_targets`."""
        # What only looks these up in a model that has been read needs no torch.
        from expertune.checkpoint.linears import attention_linears, is_linear
        from expertune.experts.contract import experts_per_token
        from expertune.experts.router import find_router, router_blocks

        head = getattr(model, "get_output_embeddings", lambda: None)()
        blocks = router_blocks(model, names.specs)
        routers = [find_router(name, model, spec) for name, spec in names.specs.items()]
        linears = {
            name: names.on_disk(name)
            for name, module in model.named_modules()
            if is_linear(module) and not any(name == block or name.startswith(f"{block}.") for block in blocks)
        }
        return cls(
            specs=names.specs,
            linears=linears,
            attention=frozenset(attention_linears(model, names.specs)) & set(linears),
            routers={name: names.on_disk(name) for name in routers if name is not None},
            head=next((name for name, module in model.named_modules() if module is head), None) if head else None,
            projections=names.projection_names,
            modules={name: names.on_disk(name) for name in names.specs},
            top_k=experts_per_token(model.config.get_text_config(), names.specs),  # type: ignore[operator, union-attr]
        )

    def take(
        self,
        target: str,
        ranks: "_Ranks",
        into: ResolvedTargets,
        reached: Collection[str] | None = None,
    ) -> bool:
        """Add everything that a target names; False if that is nothing."""

        def can_learn(name: str) -> bool:
            return reached is None or name in reached

        linears = [
            name
            for name, on_disk in self.linears.items()
            if _ends_in(on_disk, target)
            or (target == "attention" and name in self.attention and can_learn(name))
            or (target == "lm_head" and name == self.head)
        ]
        routers = [name for name, on_disk in self.routers.items() if target == "router" or _ends_in(on_disk, target)]
        experts = [
            (module, projection)
            for module in self.specs
            for projection, leaf in self.projections.items()
            if target == leaf or (target == "experts" and can_learn(module))
        ]
        for name in linears:
            into.linears[name] = ranks.of([self.linears[name]])
        for name in routers:
            into.router[name] = ranks.of([self.routers[name]])
        for module, projection in experts:
            on_disk = (
                f"{self.modules[module]}.{expert}.{self.projections[projection]}"
                for expert in range(self.specs[module].num_experts)
            )
            into.experts.setdefault(module, {})[projection] = ranks.of(on_disk, of_experts=True)
        return bool(linears or routers or experts)

    def known(self) -> list[str]:
        """Aliases and projection names that would be accepted, for messages."""
        leaves = {name.rpartition(".")[2] for name in (*self.linears.values(), *self.routers.values())}
        aliases = {
            "attention": bool(self.attention),
            "experts": True,
            "router": bool(self.routers),
            "lm_head": self.head is not None,
        }
        return sorted(leaves | set(self.projections.values()) | {alias for alias, there in aliases.items() if there})


class _Ranks:
    """Rank and alpha of a module by its name on disk; remembers which patterns were of use."""

    def __init__(self, lora: LoraSection, active_experts: int) -> None:
        self._default = self._of_experts = Rank(lora.r, lora.alpha)
        if lora.expert_rank == "scaled":
            # Alpha stays, so that the update of an expert is alpha / rank times B A at any rank.
            self._of_experts = Rank(max(1, lora.r // active_experts), lora.alpha)
        self._rank = _compile("rank_pattern", lora.rank_pattern)
        self._alpha = _compile("alpha_pattern", lora.alpha_pattern)
        self._unused = self._rank.keys() | self._alpha.keys()

    def of(self, on_disk: Iterable[str], of_experts: bool = False) -> Rank:
        """The one rank that all these modules share."""
        default = self._of_experts if of_experts else self._default
        if not self._rank and not self._alpha:
            return default
        found: dict[Rank, str] = {}
        for name in on_disk:
            found.setdefault(self._lookup(name, default), name)
        if len(found) > 1:
            (first, one), (second, other) = list(found.items())[:2]
            raise ConfigError(
                "lora.rank_pattern, lora.alpha_pattern: the experts of one layer share a rank and an alpha, but "
                f"{one} would get {first.rank}, {first.alpha:g} and {other} {second.rank}, {second.alpha:g}"
            )
        return next(iter(found))

    def _lookup(self, name: str, default: Rank) -> Rank:
        return Rank(int(self._first(self._rank, name, default.rank)), self._first(self._alpha, name, default.alpha))

    def _first(self, patterns: "_Patterns", name: str, default: float) -> float:
        for key, (pattern, value) in patterns.items():
            if pattern.match(name):
                self._unused.discard(key)
                return value
        return default

    def require_all_used(self, known: list[str]) -> None:
        """A pattern that fits no target is a misspelled one: it must not pass for the default rank."""
        for section, key in sorted(self._unused):
            raise ConfigError(f"lora.{section}: {key!r} fits no module among the targets{_nearest(key, known)}")


# Section and key of the run file -> the compiled pattern, and what it gives.
_Patterns = dict[tuple[str, str], tuple[re.Pattern[str], float]]


def _compile(section: str, patterns: dict[str, int] | dict[str, float]) -> _Patterns:
    compiled = {}
    for key, value in patterns.items():
        try:
            compiled[section, key] = (re.compile(rf"(.*\.)?({key})$"), value)
        except re.error as error:
            raise ConfigError(f"lora.{section}: {key!r} is not a regular expression: {error}") from None
    return compiled


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _nearest(name: str, known: list[str]) -> str:
    meant = nearest(name, known)
    hint = f"; did you mean {meant}?" if meant else ""
    return f"{hint} (this model has {', '.join(known)})"
