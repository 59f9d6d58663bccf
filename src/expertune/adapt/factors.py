"""What the tensors of an adapter file are, whichever layout they lie in: A, B and scale of every projection.

Two layouts hold experts. Per expert, under the checkpoint's own names: `...experts.3.w1.lora_A.weight`. Fused, as PEFT
on transformers 5 holds a stack of experts: `...experts.base_layer.lora_A.weight` [E * r, in] and `.lora_B.weight`
[out, E * r] for the first stack, `...experts.lora_A.weight` and `.lora_B.weight` for the second; see `adapt/stacks.py`.

Shape suffixes: E experts, r rank.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertune.adapt.patterns import expert_pattern, settings
from expertune.adapt.ranks_in_file import require_rank_of_stack, require_ranks_of_config, stack_names
from expertune.adapt.scales import scale_in_file
from expertune.adapt.stacks import separate, unfuse
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank
from expertune.errors import CheckpointError
from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec
from expertune.kernels.lora import beyond

PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
MAGNITUDE = ".lora_magnitude_vector"


class Factors(NamedTuple):
    """One pair of factors: its update is scale * B @ A, and with DoRA the sum with W is scaled to the magnitudes.

    Attributes:
        a: [r, in], or [E, r, in] where experts of a module are stacked.
        b: [out, r], or [E, out, r].
        scale: what a reader of the file multiplies by.
        magnitude: DoRA's, [out] or [E, out]; None without.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass
class AdapterFactors:
    """The factors of an adapter on one model.

    Attributes:
        experts: live experts module -> canonical projection (`gate`, `up`, `down`) -> the factors of each expert, which
            agree in shape and scale.
        linears: live name of a linear or a router -> its factors.
    """

    experts: dict[str, dict[str, list[Factors]]] = field(default_factory=dict)
    linears: dict[str, Factors] = field(default_factory=dict)


def stacked(experts: Sequence[Factors]) -> Factors:
    """The factors of experts as one: a copy."""
    magnitudes = [each.magnitude for each in experts if each.magnitude is not None]
    return Factors(
        torch.stack([each.a for each in experts]),
        torch.stack([each.b for each in experts]),
        experts[0].scale,
        torch.stack(magnitudes) if magnitudes else None,
    )


def difference(now: AdapterFactors, began: AdapterFactors) -> AdapterFactors:
    """What an adapter has learned beyond where it began: factors of twice the rank, of the scale that it has.

    PEFT writes as much for `path_initial_model_for_weight_conversion`, by other factors (see `beyond`).

    Args:
        now: the trained factors.
        began: the first ones, of the same modules and ranks.
    """

    def of(pair: Factors, first: Factors) -> Factors:
        a, b = beyond(pair.a, pair.b, first.a, first.b * (first.scale / pair.scale))
        return pair._replace(a=a, b=b)

    experts = {
        module: {
            each: [of(*pairs) for pairs in zip(held, began.experts[module][each], strict=True)]
            for each, held in projections.items()
        }
        for module, projections in now.experts.items()
    }
    return AdapterFactors(experts, {name: of(pair, began.linears[name]) for name, pair in now.linears.items()})


def read_factors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    names: NameMap,
    where: str,
    selected: Mapping[str, Sequence[int]] | None = None,
    is_own_config: bool = True,
) -> AdapterFactors:
    """The factors of an adapter from the content of its two files; zeros for experts that were not selected.

    Args:
        config: `adapter_config.json`, or a `LoraConfig` as a mapping.
        tensors: tensors by name on disk; views of these are returned.
        names: the base model's name map.
        where: what to call the adapter in errors.
        selected: by experts module, the experts that have an adapter; nothing where all have one, None where only the
            tensors are known.
        is_own_config: see `PerExpert`.

    Raises:
        CheckpointError: a tensor belongs to no module of this model, has no partner, or an expert has none.
    """
    return factors_of(PerExpert(config, tensors, names, where, is_own_config), names, selected)


def factors_of(
    plain: "PerExpert", names: NameMap, selected: Mapping[str, Sequence[int]] | None = None
) -> AdapterFactors:
    """What `read_factors` does with tensors that are under per-expert names; the arguments are that one's."""
    where, found = plain.where, AdapterFactors()
    rest = dict.fromkeys(plain.modules)
    for module, spec in names.specs.items():
        for projection in spec.projections:
            each = names.experts_on_disk(module, projection)
            held = [name for name in each if name in rest]
            if not held:
                continue
            chosen = set((selected or {}).get(module, range(len(each))))
            for expert, name in enumerate(each):
                if (name in rest) == (expert in chosen):
                    continue
                if expert in chosen:
                    # PEFT's own calls know nothing of a selection, which the weights' file has beside its tensors.
                    hint = "; an adapter on selected experts (lora.experts) is loaded by expertune.load_adapter"
                    hint = hint if selected is None else ""
                    raise CheckpointError(f"{where}: {name} has no adapter, though others of its layer have{hint}")
                raise CheckpointError(f"{where}: {name} has an adapter, and was not selected to have one")
            some = plain.pair(held[0])
            nothing = Factors(torch.zeros_like(some.a), torch.zeros_like(some.b), some.scale)
            pairs = [plain.pair(name) if name in rest else nothing for name in each]
            if len({(pair.a.shape, pair.b.shape, pair.scale) for pair in pairs}) > 1:
                raise CheckpointError(f"{where}: the adapters of {module}, {projection}, differ in shape or scale")
            found.experts.setdefault(module, {})[projection] = pairs
            for name in held:
                del rest[name]
    live = {names.on_disk(name): name for name in names.live_modules()}
    for name in rest:
        if name not in live:
            raise CheckpointError(f"{where}: {name} has an adapter, and this model has no such module")
        found.linears[live[name]] = plain.pair(name)
    return found


class PerExpert:
    """An adapter's tensors under per-expert names on disk, whatever layout and names its file has.

    Args:
        config: `adapter_config.json`.
        tensors: tensors by name in the file.
        names: the base model's name map.
        where: what to call the adapter in errors.
        is_own_config: the config is the tensors' own, so that its ranks are theirs.

    Attributes:
        tensors: tensors by per-expert name on disk (`PREFIX` and `.lora_A.weight` included); views where possible.
        is_plain: every expert was under such a name in the file.

    Raises:
        CheckpointError: a fused tensor has no partner, or is of another shape than the model's experts; or a tensor's
            rank is not the config's.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        names: NameMap,
        where: str,
        is_own_config: bool = True,
    ) -> None:
        self.config, self.where, self._names, self._is_own_config = config, where, names, is_own_config
        fused = {on_disk: module for module in names.specs for on_disk in (module, names.on_disk(module))}
        renamed = {live: disk for live in names.live_modules() if (disk := names.on_disk(live)) != live}
        renamed = {live: disk for live, disk in renamed.items() if live not in renamed.values()}
        self.tensors: dict[str, Tensor] = {}
        self._fused_scales: dict[str, float] = {}
        stacks: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            stem, factor = split_key(key)
            if factor in ("A", "B") and stem.removesuffix(".base_layer") in fused:
                stacks.setdefault(stem, {})[factor] = tensor
            else:
                # PEFT on transformers 5 writes live names; the names on disk are what this one reads by.
                self.tensors[key.replace(stem, renamed[stem], 1) if stem in renamed else key] = tensor
        self.is_plain = not stacks
        if is_own_config:
            found = ((*split_key(key), tensor) for key, tensor in self.tensors.items())
            require_ranks_of_config(config, {stem: a for stem, factor, a in found if factor == "A"}, names, where)
        for stem, pair in stacks.items():
            self._take_stack(stem, fused[stem.removesuffix(".base_layer")], pair)

    @cached_property
    def modules(self) -> list[str]:
        """Names on disk of everything that has a factor."""
        return list(dict.fromkeys(stem for stem, factor in map(split_key, self.tensors) if factor))

    def pair(self, module: str) -> Factors:
        """The factors of a module by its name on disk.

        Raises:
            CheckpointError: one of the two is missing, or their ranks differ.
        """
        keys = [f"{PREFIX}{module}{ending}" for ending in _FACTORS]
        for key in keys:
            if key not in self.tensors:
                raise CheckpointError(f"{self.where}: {key} is missing")
        a, b = (self.tensors[key] for key in keys)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(f"{self.where}: {keys[0]} {tuple(a.shape)} and {keys[1]} {tuple(b.shape)} do not fit")
        return Factors(a, b, self.scale(module, a.shape[0]), self._magnitude(module, b.shape[0]))

    def _magnitude(self, module: str, out_features: int) -> Tensor | None:
        key = f"{PREFIX}{module}{MAGNITUDE}"
        found, wanted = self.tensors.get(key), bool(self.config.get("use_dora"))
        if (found is not None) != wanted:
            raise CheckpointError(
                f"{self.where}: {key} is {'missing' if wanted else 'there'}, and use_dora is {str(wanted).lower()}"
            )
        if found is not None and tuple(found.shape) != (out_features,):
            raise CheckpointError(f"{self.where}: {key} has shape {tuple(found.shape)}, expected ({out_features},)")
        return found

    def scale(self, module: str, rank: int) -> float:
        """What the update of a module is multiplied by, as PEFT takes it from the config."""
        return self._fused_scales.get(module) or scale_in_file(self.config, module, rank)

    def settings(self) -> dict[str, Any]:
        """Rank and alpha of every module, as in a run file's `lora:` section, without the targets."""
        r = int(self.config["r"])
        alpha = r * scale_in_file({**self.config, "alpha_pattern": {}}, "", r)
        held = set(self.modules)
        found: dict[str, Rank] = {}
        for module in self._names.specs:
            for projection in self._names.projection_names:
                experts = self._names.experts_on_disk(module, projection)
                if experts[0] in held:
                    found[expert_pattern(self._names, module, projection)] = self._rank(experts[0])
                held.difference_update(experts)
        found |= {re.escape(name): self._rank(name) for name in self.modules if name in held}
        return settings(Rank(r, alpha), False, found)

    def _rank(self, module: str) -> Rank:
        pair = self.pair(module)
        rank = pair.a.shape[0]
        return Rank(rank, pair.scale * rank)

    def _take_stack(self, stem: str, module: str, pair: dict[str, Tensor]) -> None:
        spec = self._names.specs[module]
        if len(pair) < 2:
            raise CheckpointError(f"{self.where}: {stem} has one factor of two")
        a, b = pair["A"], pair["B"]
        weight = self._stack_of(stem, module, spec, a, b)
        stack, parts = unfuse(spec, weight, a, b)
        scale = scale_in_file(self.config, f"{module}.{weight}", stack.shape[1])
        projections = layout.fused_projections(spec, weight)
        if self._is_own_config:
            keys = stack_names(self._names, module, weight)
            require_rank_of_stack(self.config, stack.shape[1], keys, len(projections), self.where)
        for projection, (part_a, part_b) in zip(projections, separate(stack, parts), strict=True):
            if not (part_a.any() or part_b.any()):
                continue  # it has no adapter: an A that is one is never zero
            for expert, name in enumerate(self._names.experts_on_disk(module, projection)):
                self.tensors[f"{PREFIX}{name}.lora_A.weight"] = part_a[expert]
                self.tensors[f"{PREFIX}{name}.lora_B.weight"] = part_b[expert]
                self._fused_scales[name] = scale

    def _stack_of(self, stem: str, module: str, spec: ExpertsSpec, a: Tensor, b: Tensor) -> str:
        """Which of the two stacks a fused pair belongs to: by its shape, and where both fit by its name."""
        fitting = []
        for weight in spec.weight_names:
            projections = layout.fused_projections(spec, weight)
            outputs, inputs = spec.shape(projections[0])
            if (
                a.ndim == b.ndim == 2
                and (a.shape[1], b.shape[0]) == (inputs, outputs * len(projections))
                and a.shape[0] == b.shape[1]
                and a.shape[0] % spec.num_experts == 0
            ):
                fitting.append(weight)
        if not fitting:
            raise CheckpointError(
                f"{self.where}: {stem}.lora_A and .lora_B have shapes {tuple(a.shape)} and {tuple(b.shape)}, which fit "
                f"neither {' nor '.join(spec.weight_names)} of the {spec.num_experts} experts of {module}"
            )
        if len(fitting) == 1:
            return fitting[0]
        # PEFT wraps the stack that the family names first; the second is wrapped around it.
        targeted = [
            weight
            for weight in spec.weight_names
            if any(f".{module}.{weight}".endswith(f".{name}") for name in self.config.get("target_parameters") or [])
        ]
        return targeted[0] if len(targeted) == 1 or stem.endswith(".base_layer") else spec.weight_names[1]


def split_key(key: str) -> tuple[str, str]:
    """The module's name in a tensor's name, and which factor it is: A, B, M for a magnitude, or nothing."""
    key = key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE}.weight") else key
    for ending, factor in (_FACTORS | {MAGNITUDE: "M"}).items():
        if key.endswith(ending):
            return key.removesuffix(ending).removeprefix(PREFIX), factor
    return key, ""
