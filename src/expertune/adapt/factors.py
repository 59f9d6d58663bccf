"""What the tensors of an adapter file are, whichever layout they lie in: A, B and scale of every projection.

Two layouts hold experts. Per expert, under the checkpoint's own names: `...experts.3.w1.lora_A.weight`. Fused, as PEFT
on transformers 5 holds a stack of experts: `...experts.base_layer.lora_A.weight` [E * r, in] and `.lora_B.weight`
[out, E * r] for the first stack, `...experts.lora_A.weight` and `.lora_B.weight` for the second. A is expert-major
and B rank-major (`ParamWrapper.get_delta_weight` of PEFT 0.21): [E, r, in] and [out, r, E]. Separate gate and up are
exact there at twice the rank, with a B that is block-diagonal.

Shape suffixes: E experts, r rank.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank
from expertune.errors import CheckpointError
from expertune.experts import layout
from expertune.experts.contract import ExpertsSpec

_T = TypeVar("_T")

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

    PEFT does the same for `path_initial_model_for_weight_conversion`.

    Args:
        now: the trained factors.
        began: the first ones, of the same modules and ranks.
    """

    def of(pair: Factors, first: Factors) -> Factors:
        b = torch.cat([pair.b, first.b * (-first.scale / pair.scale)], dim=1)
        return pair._replace(a=torch.cat([pair.a, first.a]), b=b)

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
) -> AdapterFactors:
    """The factors of an adapter from the content of its two files; zeros for experts that were not selected.

    Args:
        config: `adapter_config.json`, or a `LoraConfig` as a mapping.
        tensors: tensors by name on disk; views of these are returned.
        names: the base model's name map.
        where: what to call the adapter in errors.
        selected: by experts module, the experts that have an adapter; nothing where all have one, None where only the
            tensors are known.

    Raises:
        CheckpointError: a tensor belongs to no module of this model, has no partner, or an expert has none.
    """
    plain = PerExpert(config, tensors, names, where)
    found = AdapterFactors()
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

    Attributes:
        tensors: tensors by per-expert name on disk (`PREFIX` and `.lora_A.weight` included); views where possible.
        is_plain: every expert was under such a name in the file.

    Raises:
        CheckpointError: a fused tensor has no partner, or is of another shape than the model's experts.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: NameMap, where: str) -> None:
        self.config, self.where, self._names = config, where, names
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


def settings(default: Rank, rslora: bool, ranks: Mapping[str, Rank]) -> dict[str, Any]:
    """Keys of a run file's `lora:` section: the default rank and alpha, and what differs from them by pattern."""
    return {
        "r": default.rank,
        "alpha": default.alpha,
        "rslora": rslora,
        "rank_pattern": {name: rank.rank for name, rank in ranks.items() if rank.rank != default.rank},
        "alpha_pattern": {name: rank.alpha for name, rank in ranks.items() if rank.alpha != default.alpha},
    }


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


def split_key(key: str) -> tuple[str, str]:
    """The module's name in a tensor's name, and which factor it is: A, B, M for a magnitude, or nothing."""
    key = key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE}.weight") else key
    for ending, factor in (_FACTORS | {MAGNITUDE: "M"}).items():
        if key.endswith(ending):
            return key.removesuffix(ending).removeprefix(PREFIX), factor
    return key, ""


def scale_in_file(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies an update by: alpha / r, or alpha / sqrt(r) with rsLoRA; the first fitting pattern wins."""
    alpha = first_match(config.get("alpha_pattern") or {}, [name], config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def first_match(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that fits one of a module's names, as PEFT fits them (`get_pattern_key`)."""
    fitting = (value for name in names for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(fitting, default)


def fuse(spec: ExpertsSpec, weight: str, pairs: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a stack as PEFT holds them, from the factors of its projections.

    Args:
        spec: of the experts module.
        weight: which of `spec.weight_names`.
        pairs: for each of its projections A [E, r, in] and B [E, out, r]; ranks may differ.
        rank: of the result; each projection has an equal share of it, filled up with zeros.

    Returns:
        A [E * rank, in] and B [out of all projections, E * rank].
    """
    share = rank // len(pairs)
    a = torch.cat([pad(part, share, dim=1) for part, _ in pairs], dim=1)
    columns = [
        torch.nn.functional.pad(part, (index * share, rank - index * share - part.shape[2]))
        for index, (_, part) in enumerate(pairs)
    ]
    # Output features first, [out, E, rank]: the family's order is one of output features.
    wide = max((part.dtype for part in columns), key=lambda dtype: dtype.itemsize)
    b = layout.join_rows(spec, weight, [part.to(wide).transpose(0, 1) for part in columns])
    return a.reshape(-1, a.shape[2]), b.transpose(1, 2).reshape(b.shape[0], -1)


def unfuse(spec: ExpertsSpec, weight: str, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The way back: A [E, rank, in], which all projections share, and for each B [E, out, rank]; views where possible.

    Args:
        spec: of the experts module.
        weight: which of `spec.weight_names`.
        a: [E * rank, in].
        b: [out of all projections, E * rank].
    """
    stacked = a.reshape(spec.num_experts, -1, a.shape[1])
    features = b.reshape(b.shape[0], -1, spec.num_experts)
    return stacked, [part.permute(2, 0, 1) for part in layout.split_rows(spec, weight, features)]


def separate(a: Tensor, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of each projection from a stack's: its own share of the rank where B is block-diagonal, else all of A."""
    share = a.shape[1] // len(parts)
    blocks = [slice(index * share, (index + 1) * share) for index in range(len(parts))]

    def is_own(part: Tensor, block: slice) -> bool:
        return not part[:, :, : block.start].any() and not part[:, :, block.stop :].any()

    if a.shape[1] % len(parts) or not all(is_own(part, block) for part, block in zip(parts, blocks, strict=True)):
        yield from ((a, part) for part in parts)
    else:
        yield from ((a[:, block], part[:, :, block]) for part, block in zip(parts, blocks, strict=True))


def pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Zeros after the end of a dimension; nothing is copied where none are needed."""
    if tensor.shape[dim] >= size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def dtype_in_file(dtype: torch.dtype, factor: float) -> torch.dtype:
    """The dtype of B with a scale in it: float32 where its own would round the scale off."""
    return dtype if math.frexp(factor)[0] == 0.5 or dtype.itemsize >= 4 else torch.float32


def fold(b: Tensor, factor: float) -> Tensor:
    """B with a scale in it, rounded once, to `dtype_in_file`."""
    return b if factor == 1 else (b.double() * factor).to(dtype_in_file(b.dtype, factor))


def unfold(b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """The way back; exact for powers of two, and where `fold` widened the dtype."""
    return b.to(dtype) if factor == 1 else (b.double() / factor).to(dtype)


def leaves(modules: Iterable[str]) -> list[str]:
    """Last parts of names, sorted: what PEFT's `target_modules` lists."""
    return sorted({name.rpartition(".")[2] for name in modules})
