"""Names on disk and names in the live model, by transformers' own conversion mapping.

A checkpoint may say `model.layers.0.block_sparse_moe.experts.3.w1.weight` where the live model of transformers 5 says
`model.layers.0.mlp.experts.gate_up_proj[3, :F]`. transformers knows the way for every family it converts; this file
asks it, and keeps no table of its own.

It cannot know of tools that took a stack of experts apart into linears of their own, to let bitsandbytes pack these:
`...experts.gate_up_projs.3.weight` [out, in], its output features in the family's order, `...gate_up_projs.3.bias`, and
a router that became `router.linear`. Such lists are read for every family alike.
"""

import re
from dataclasses import dataclass, field

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from expertune.errors import UnsupportedModelError
from expertune.experts.contract import ExpertsSpec, require_experts
from expertune.experts.router import find_router

INDEX = re.compile(r"\.(\d+)(?=\.)")
"""The numbers in a name; the last is the expert's, as layers come before experts in every family."""


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint tensor belongs.

    Attributes:
        name: live parameter or buffer name; for an expert tensor the experts module's name.
        projection: canonical projection (`gate`, `up`, `down`) of an expert tensor; `gate_up` for a tensor that is
            fused on disk; None for anything that is not an expert's.
        expert: index of the expert, or None where the tensor holds all of them.
        converter: what transformers computes from this tensor and its like; None where the tensor is taken as it is.
            `name` is then the first parameter that comes of it.
        pattern: which of the converter's sources the tensor is.
    """

    name: str
    projection: str | None = None
    expert: int | None = None
    converter: WeightConverter | None = field(default=None, compare=False)
    pattern: str | None = field(default=None, compare=False)


@dataclass
class NameMap:
    """Both directions between checkpoint names and live names for one model.

    Attributes:
        specs: the model's experts modules.
        projection_names: canonical projection -> its name on disk, e.g. `{"gate": "w1", "up": "w3", "down": "w2"}`.
    """

    specs: dict[str, ExpertsSpec]
    projection_names: dict[str, str]
    _renamings: list[WeightRenaming]
    _converters: list[WeightConverter]
    _own: list[WeightRenaming]
    _live_keys: dict[str, bool]
    _base_prefix: str
    _listed: list[WeightConverter] = field(default_factory=list)
    _targets: dict[str, tuple[str, str]] = field(default_factory=dict)
    _reverse: dict[tuple[bool, ...], list[WeightTransform]] = field(default_factory=dict)

    def locate(self, checkpoint_key: str) -> Destination:
        """Where the tensor of this name on disk belongs in the live model."""
        renamed, pattern = rename_source_key(
            checkpoint_key, self._renamings, self._converters, self._base_prefix, self._live_keys
        )
        if renamed not in self._live_keys and checkpoint_key in self._live_keys:
            renamed, pattern = checkpoint_key, None
        indices = INDEX.findall(checkpoint_key) if pattern is not None and "*" in pattern else []
        expert = int(indices[-1]) if indices else None
        converter = next((each for each in self._converters if pattern in each.source_patterns), None)
        if converter is not None and not self._is_direct(renamed, converter):
            return Destination(renamed, expert=expert, converter=converter, pattern=pattern)
        if renamed not in self._targets:
            return Destination(renamed)
        module, projection = self._targets[renamed]
        if pattern is None:
            return Destination(module, projection)
        leaf = pattern.removesuffix("$").removesuffix(".weight").rpartition(".")[2]
        canonical = next((key for key, name in self.projection_names.items() if name == leaf), projection)
        return Destination(module, canonical, expert)

    def weight_of(self, live_name: str) -> tuple[str, str] | None:
        """The experts module and which of its `weight_names` a live parameter is; None for any other parameter."""
        if live_name not in self._targets:
            return None
        module, _, weight = live_name.rpartition(".")
        return module, weight

    def is_listed(self, destination: Destination) -> bool:
        """Whether a tensor is the linear of one expert that tools made of a stack: [out, in], in the family's order."""
        return (
            any(destination.converter is each for each in self._listed) and self.weight_of(destination.name) is not None
        )

    def converted_names(self, destination: Destination) -> list[str]:
        """Live names of everything that the conversion of a tensor makes."""
        if destination.converter is None:
            return [destination.name]
        first, *others = destination.converter.target_patterns
        return [destination.name, *(destination.name.replace(first, other) for other in others)]

    def made_with(self, live_name: str) -> list[str]:
        """Live names of everything that one conversion makes together with this, itself included."""
        for converter in self._converters:
            for pattern in converter.target_patterns:
                if live_name.endswith(pattern):
                    names = (live_name.replace(pattern, other) for other in converter.target_patterns)
                    return [name for name in names if name in self._live_keys]
        return [live_name]

    def stack_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stacks of experts by live name, as the family lays them out."""
        return {
            name: self.specs[module].stack_shape(name.rpartition(".")[2]) for name, (module, _) in self._targets.items()
        }

    def _is_direct(self, renamed: str, converter: WeightConverter) -> bool:
        """Whether a converter does no more than stack experts, so that each of its tensors is one matrix as it is."""
        if renamed not in self._targets or len(converter.target_patterns) > 1:
            return False
        if any(converter is each for each in self._listed):
            return False
        spec = self.specs[self._targets[renamed][0]]
        operations = {(type(each), getattr(each, "dim", None)) for each in converter.operations}
        stacks = operations <= {(MergeModulelist, 0), (Concatenate, 1)} and (MergeModulelist, 0) in operations
        return stacks and spec.is_concatenated and not spec.is_transposed

    def on_disk(self, live_name: str) -> str:
        """The checkpoint's name for a live module or parameter name (experts modules keep their own leaf)."""
        # As transformers writes a model: a prefix of the whole checkpoint only where the one that was read had it.
        used = tuple(transform.was_used() or not isinstance(transform, PrefixChange) for transform in self._own)
        if used not in self._reverse:
            own = [each for each, is_used in zip(self._own, used, strict=True) if is_used]
            self._reverse[used] = [each.reverse_transform() for each in reversed(own)]
        return rename_source_key(live_name + ".", self._reverse[used], [])[0].removesuffix(".")

    def live_modules(self) -> list[str]:
        """Live names of everything outside the experts that has a weight."""
        stacks = tuple(f"{module}." for module in self.specs)
        return [
            key.removesuffix(".weight")
            for key in self._live_keys
            if key.endswith(".weight") and not key.startswith(stacks)
        ]

    def expert_on_disk(self, module: str, expert: int, projection: str) -> str:
        """The checkpoint's module name of one expert's projection, e.g. `...experts.3.w1`."""
        return f"{self.on_disk(module)}.{expert}.{self.projection_names[projection]}"

    def experts_on_disk(self, module: str, projection: str) -> list[str]:
        """The same of all experts of a module, in their order."""
        return [self.expert_on_disk(module, expert, projection) for expert in range(self.specs[module].num_experts)]


def read_names(model: nn.Module) -> NameMap:
    """Build the name map of a model that still has its own experts modules (meta device is enough).

    Raises:
        UnsupportedModelError: the model has no experts that can be packed.
    """
    try:
        specs = require_experts(model)
    except UnsupportedModelError as error:
        folder = getattr(getattr(model, "config", None), "_name_or_path", "")
        raise UnsupportedModelError(f"{folder}: {error}" if folder else str(error)) from None
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    # Renamings of long ago come last; nothing is written by them.
    own = transforms[: len(get_model_conversion_mapping(model, add_legacy=False))]
    renamings = [transform for transform in own if isinstance(transform, WeightRenaming)]

    lists = _lists(specs, transforms)
    targets: dict[str, tuple[str, str]] = {}
    for module, spec in specs.items():
        for weight in spec.weight_names:
            targets[f"{module}.{weight}"] = (module, weight.removesuffix("_proj"))
    return NameMap(
        specs=specs,
        projection_names=_projection_names(converters, has_gate=next(iter(specs.values())).has_gate),
        _renamings=[
            *(transform for transform in transforms if isinstance(transform, WeightRenaming)),
            *_wrapped_routers(model, specs),
        ],
        _converters=converters + lists,
        _own=renamings,
        _live_keys=dict.fromkeys(model.state_dict(), True),
        _base_prefix=str(model.base_model_prefix),
        _listed=lists,
        _targets=targets,
    )


def _lists(specs: dict[str, ExpertsSpec], transforms: list[WeightTransform]) -> list[WeightConverter]:
    """How a list of linears, one for each expert, becomes a stack; not where the family itself has such names."""
    known = [pattern for transform in transforms for pattern in transform.source_patterns]
    found: dict[str, WeightConverter] = {}
    for module, spec in specs.items():
        leaf = module.rpartition(".")[2]
        for weight in spec.weight_names:
            if any(f"{weight}s" in pattern for pattern in known):
                continue
            turned = [Transpose(1, 2)] if spec.is_transposed else []
            lists = {"weight": (weight, turned)} | ({"bias": (f"{weight}_bias", [])} if spec.has_bias else {})
            for part, (target, operations) in lists.items():
                source = f"{leaf}.{weight}s.*.{part}"
                merged = [MergeModulelist(dim=0), *operations]
                found.setdefault(source, WeightConverter(source, f"{leaf}.{target}", merged))
    return list(found.values())


def _wrapped_routers(model: nn.Module, specs: dict[str, ExpertsSpec]) -> list[WeightRenaming]:
    """Routers whose weight such tools put into a linear within them."""
    routers = {find_router(module, model, spec) for module, spec in specs.items()} - {None}
    leaves = sorted({str(router).rpartition(".")[2] for router in routers})
    names = [name for name, _ in model.named_modules()]
    return [
        WeightRenaming(rf"\.{leaf}\.linear\.", f".{leaf}.")
        for leaf in leaves
        if not any(f".{leaf}.linear." in f"{name}." for name in names)
    ]


def _projection_names(converters: list[WeightConverter], has_gate: bool) -> dict[str, str]:
    """Names that the family's per-expert checkpoints use; the field's usual ones where experts are fused on disk."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    for converter in converters:
        leaves = [
            pattern.removesuffix("$").removesuffix(".weight").rpartition(".")[2]
            for pattern in converter.source_patterns
        ]
        target = converter.target_patterns[0]
        if not any("*" in pattern for pattern in converter.source_patterns):
            continue
        if target.endswith("gate_up_proj") and len(leaves) == 2:
            names["gate"], names["up"] = leaves
        elif target.endswith("down_proj") and len(leaves) == 1:
            names["down"] = leaves[0]
        elif target.endswith("up_proj") and len(leaves) == 1:
            names["up"] = leaves[0]
    return names if has_gate else {key: names[key] for key in ("up", "down")}


def first_names(names: list[str]) -> str:
    """The first three of them, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
