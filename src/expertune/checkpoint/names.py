"""Names on disk and names in the live model, by transformers' own conversion mapping.

A Mixtral checkpoint says `model.layers.0.block_sparse_moe.experts.3.w1.weight`; the live model of transformers 5 says
`model.layers.0.mlp.experts.gate_up_proj[3, :F]`. transformers knows the way for every family it converts; this file
asks it, and keeps no table of its own.
"""

import re
from dataclasses import dataclass, field

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from expertune.experts.contract import ExpertsSpec, require_experts

_INDEX = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class Destination:
    """Where one checkpoint tensor belongs.

    Attributes:
        name: live parameter or buffer name; for an expert tensor the experts module's name.
        projection: canonical projection (`gate`, `up`, `down`) of an expert tensor; `gate_up` for a tensor that is
            fused on disk; None for anything that is not an expert's.
        expert: index of the expert, or None where the tensor holds all of them.
    """

    name: str
    projection: str | None = None
    expert: int | None = None


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
    _reverse_renamings: list[WeightRenaming]
    _live_keys: dict[str, bool]
    _base_prefix: str
    _targets: dict[str, tuple[str, str]] = field(default_factory=dict)

    def locate(self, checkpoint_key: str) -> Destination:
        """Where the tensor of this name on disk belongs in the live model."""
        renamed, pattern = rename_source_key(
            checkpoint_key, self._renamings, self._converters, self._base_prefix, self._live_keys
        )
        if renamed not in self._targets:
            return Destination(renamed)
        module, projection = self._targets[renamed]
        if pattern is None:
            return Destination(module, projection)
        leaf = pattern.removesuffix("$").removesuffix(".weight").rpartition(".")[2]
        canonical = next((key for key, name in self.projection_names.items() if name == leaf), projection)
        # The expert's index is the last number of the name: layers come before experts in every family.
        indices = _INDEX.findall(checkpoint_key)
        return Destination(module, canonical, int(indices[-1]) if indices else None)

    def on_disk(self, live_name: str) -> str:
        """The checkpoint's name for a live module or parameter name (experts modules keep their own leaf)."""
        return rename_source_key(live_name + ".", self._reverse_renamings, [])[0].removesuffix(".")

    def expert_on_disk(self, module: str, expert: int, projection: str) -> str:
        """The checkpoint's module name of one expert's projection, e.g. `...experts.3.w1`."""
        return f"{self.on_disk(module)}.{expert}.{self.projection_names[projection]}"


def read_names(model: nn.Module) -> NameMap:
    """Build the name map of a model that still has its own experts modules (meta device is enough).

    Raises:
        UnsupportedModelError: the model has no experts that can be packed.
    """
    specs = require_experts(model)
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    own = get_model_conversion_mapping(model, add_legacy=False)
    reverse = [transform.reverse_transform() for transform in own if not isinstance(transform, WeightConverter)]

    targets: dict[str, tuple[str, str]] = {}
    for module, spec in specs.items():
        targets[f"{module}.{'gate_up_proj' if spec.has_gate else 'up_proj'}"] = (
            module,
            "gate_up" if spec.has_gate else "up",
        )
        targets[f"{module}.down_proj"] = (module, "down")
    return NameMap(
        specs=specs,
        projection_names=_projection_names(converters, has_gate=next(iter(specs.values())).has_gate),
        _renamings=[transform for transform in transforms if isinstance(transform, WeightRenaming)],
        _converters=converters,
        _reverse_renamings=reverse[::-1],
        _live_keys=dict.fromkeys(model.state_dict(), True),
        _base_prefix=str(model.base_model_prefix),
        _targets=targets,
    )


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
