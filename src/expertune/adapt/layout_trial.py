"""How an adapter's file is laid out, and what stock PEFT makes of it: tried on a twin of the model without weights.

The twin is the stock model on the meta device. The adapter is injected into it as `PeftModel.from_pretrained` does, and
small tensors under the names of the file go through PEFT's conversion. A layout serves where every tensor arrives where
it belongs, in the right order, and is multiplied by the scale that was meant.

Tried with PEFT 0.21.0 to 0.21.2 and transformers 5.20 to 5.24; `tests/adapt/test_files.py` fails on a release that
reads files otherwise.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.adapt.factors import PREFIX
from expertune.adapt.stacks import fuse
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import ResolvedTargets
from expertune.errors import first_line
from expertune.experts import layout

_T = TypeVar("_T")

_TRIED_EXPERTS = 12
"""Enough to see whether experts are ordered as numbers."""


@dataclass
class StockLayout:
    """How an adapter's file is laid out.

    Attributes:
        r: `r` and `lora_alpha` of the config.
        target_modules: of the config.
        target_parameters: of the config.
        rank_pattern: of the config.
        alpha_pattern: of the config; names stacks only, which other readers do not know.
        ranks: rank in the file, by live name of a linear or router.
        expert_ranks: rank in the file of each projection of an experts module; of a fused stack, its whole rank.
        stacks: names in the file of fused stacks, by experts module and stack; empty where names are per expert.
        use_dora: of the config.
        live_named: linears whose tensors are under live names, the others being under their names on disk.
        refusal: why stock PEFT does not read the adapter; None where it does.
        merging: why the adapter cannot be merged into the model as it stands; None where it can, or nobody has looked.
    """

    r: int
    target_modules: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    expert_ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    stacks: dict[str, dict[str, str]] = field(default_factory=dict)
    live_named: set[str] = field(default_factory=set)
    use_dora: bool = False
    refusal: str | None = None
    merging: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The keys of `adapter_config.json` that depend on the layout."""
        parameters = {"target_parameters": self.target_parameters} if self.target_parameters else {}
        return {
            "r": self.r,
            "lora_alpha": self.r,
            "target_modules": self.target_modules,
            **parameters,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "use_rslora": False,
            **({"use_dora": True} if self.use_dora else {}),
        }


class NotReadError(Exception):
    """PEFT does not read a candidate; the message gives the reason."""


class Twin:
    """The stock model on the meta device, to be given one adapter."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = [name for name, _ in model.named_modules()]
        self.parameters = [name for name, _ in model.named_parameters()]
        self._kept: dict[str, bool] = {}

    def is_kept(self, target: str) -> bool:
        """Whether PEFT leaves a target of this name a module's, rather than making it a stack's."""
        leaf = target.rpartition(".")[2]
        if leaf not in self._kept:
            config = LoraConfig(target_modules=[target])
            try:
                convert_peft_config_for_transformers(config, self.model, None)
                self._kept[leaf] = target in (config.target_modules or ())
            except ValueError:
                self._kept[leaf] = False
        return self._kept[leaf]

    def try_on(self, found: StockLayout, names: NameMap, targets: ResolvedTargets) -> StockLayout:
        """The layout, with the names that its tensors have in the file.

        Raises:
            NotReadError: PEFT does not read it.
        """
        config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, inference_mode=True, **copy.deepcopy(found.config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are for whoever loads an adapter
            try:
                model = PeftModelForCausalLM(self.model, config, low_cpu_mem_usage=True)
            except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
                raise NotReadError(f"PEFT refuses its config: {first_line(error)}") from None
            layers = dict(_adapted(model.get_base_model()))
            expected = _expected_ranks(found, names)
            for name in layers.keys() - expected.keys() - {f"{name}.weight" for name in expected}:
                raise NotReadError(f"PEFT puts an adapter on {name} as well, which has none")
            for name, rank in expected.items():
                found_name = name if name in layers else f"{name}.weight"
                if found_name not in layers:
                    raise NotReadError(f"PEFT puts no adapter on {name}")
                layer = layers[found_name][1]
                if layer.r["default"] != rank or layer.scaling["default"] != self._scale(found, names, name, rank):
                    raise NotReadError(
                        f"PEFT takes rank {layer.r['default']} and scale {layer.scaling['default']:g} for {name}"
                    )
            return _Conversion(model, config, {name: stem for name, (stem, _) in layers.items()}).name(
                found, names, targets
            )

    @staticmethod
    def _scale(found: StockLayout, names: NameMap, name: str, rank: int) -> float:
        """What an update that has no other scale than the file's is multiplied by."""
        module, _, weight = name.rpartition(".")
        is_stack = module in names.specs and weight in names.specs[module].weight_names
        if is_stack and not found.stacks:
            rank //= len(layout.fused_projections(names.specs[module], weight))
        return found.r / rank


def _expected_ranks(found: StockLayout, names: NameMap) -> dict[str, int]:
    """Ranks by live name of a linear, router or stack."""
    ranks = dict(found.ranks)
    for module, weight, _, held in adapted_stacks(names, found.expert_ranks):
        ranks[f"{module}.{weight}"] = held[0] if found.stacks else sum(held)
    return ranks


def adapted_stacks(
    names: NameMap, experts: Mapping[str, Mapping[str, _T]]
) -> Iterator[tuple[str, str, Sequence[str], list[_T]]]:
    """Stacks that an adapter is on.

    Args:
        names: the model's name map.
        experts: experts module -> adapted projection -> anything.

    Yields:
        The experts module, the stack's name in it, the stack's projections, and what there is for those adapted.
    """
    for module, adapted in experts.items():
        for weight in names.specs[module].weight_names:
            projections = layout.fused_projections(names.specs[module], weight)
            if held := [adapted[projection] for projection in projections if projection in adapted]:
                yield module, weight, projections, held


def _adapted(model: nn.Module) -> Iterator[tuple[str, tuple[str, LoraLayer]]]:
    """Live name of what each layer of PEFT adapts, a module or a parameter -> the layer's own name, and the layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adapted = name.replace(".base_layer", "")
            parameter = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            yield f"{adapted}{parameter}", (name, module)


class _Conversion:
    """PEFT's conversion of tensors by name in a file, tried with small ones.

    Names that differ in numbers alone go the same way, so that one of them is tried.

    Args:
        model: the twin with an adapter.
        config: the adapter's, as PEFT has converted it.
        stems: live name of what a layer of PEFT adapts -> the name of that layer.
    """

    def __init__(self, model: PeftModelForCausalLM, config: LoraConfig, stems: dict[str, str]) -> None:
        self.model, self.config, self.stems = model, config, stems
        self._random = torch.Generator().manual_seed(0)
        # Tensors by name in the file, and what they have to be under PEFT's own names.
        self._given: dict[str, Tensor] = {}
        self._due: dict[str, Tensor] = {}

    def name(self, found: StockLayout, names: NameMap, targets: ResolvedTargets) -> StockLayout:
        """The layout with the names of its tensors; raises `NotReadError` where one does not arrive."""
        for module in _one_of_each(targets.experts):
            # A [E, 2, 3] and B [E, 4, 2] of a few experts.
            count = min(names.specs[module].num_experts, _TRIED_EXPERTS)
            pairs = {each: (self._toy(count, 2, 3), self._toy(count, 4, 2)) for each in targets.experts[module]}
            for _, weight, _, _ in adapted_stacks(names, {module: pairs}):
                self._name_stack(found, names, module, weight, pairs)
        others = (*targets.linears, *targets.router)
        is_usual = not (found.stacks or found.target_parameters)
        for name in _one_of_each(others):
            pair = self._toy(2, 3), self._toy(4, 2)
            self._due |= _entries(self.stems.get(name) or self.stems[f"{name}.weight"], *pair)
            choice = self._first_read([names.on_disk(name)] if is_usual else [names.on_disk(name), name], pair)
            if choice != names.on_disk(name):
                found.live_named |= {like for like in others if _kind(like) == _kind(name)}
            self._given |= _entries(choice, *pair)
        self._require_arrived()
        return found

    def _name_stack(
        self, found: StockLayout, names: NameMap, module: str, weight: str, pairs: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        """One stack of experts, which PEFT holds as a whole, from its projections."""
        projections = layout.fused_projections(names.specs[module], weight)
        held = [pairs[projection] for projection in projections if projection in pairs]
        whole = [pairs.get(projection) or _nothing(held[0]) for projection in projections]
        tried = replace(names.specs[module], num_experts=whole[0][0].shape[0])
        fused = fuse(tried, weight, whole, 2 * len(whole))
        stem = self.stems[f"{module}.{weight}"]
        self._due |= _entries(stem, *fused)
        if not found.stacks:
            for projection in projections:
                experts = names.experts_on_disk(module, projection)
                for expert, a, b in zip(experts, *pairs[projection], strict=False):
                    self._given |= _entries(expert, a, b)
            return
        nested = stem.removeprefix(module)
        choice = self._first_read([f"{module}{nested}", f"{names.on_disk(module)}{nested}"], fused)
        for like, stacks in found.stacks.items():
            if _kind(like) == _kind(module):
                stacks[weight] = f"{like if choice == stem else names.on_disk(like)}{nested}"
        self._given |= _entries(choice, *fused)

    def _first_read(self, choices: Sequence[str], pair: tuple[Tensor, Tensor]) -> str:
        """The first name in a file under which a pair arrives where it is due; the first of all where none does."""
        for name in choices:
            arrived = self._convert(_entries(name, *pair))
            if all(key in self._due and torch.equal(tensor, self._due[key]) for key, tensor in arrived.items()):
                return name
        return choices[0]

    def _require_arrived(self) -> None:
        arrived = self._convert(self._given)
        for key, tensor in self._due.items():
            if key not in arrived:
                raise NotReadError(f"PEFT loses the tensors of {key.removeprefix(PREFIX).partition('.lora_')[0]}")
            if not torch.equal(arrived[key], tensor):
                raise NotReadError(f"PEFT puts the experts together otherwise than {key} has them")

    def _convert(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return convert_peft_adapter_state_dict_for_transformers(self.model, self.config, dict(given))
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise NotReadError(f"PEFT cannot convert its names: {first_line(error)}") from None

    def _toy(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._random)


def _nothing(like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    a, b = like
    return a[:, :0], b[:, :, :0]


def _entries(stem: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{PREFIX}{stem}.lora_A.weight": a, f"{PREFIX}{stem}.lora_B.weight": b}


def _one_of_each(names: Iterable[str]) -> list[str]:
    """The first of all names that differ in numbers alone."""
    return list({_kind(name): name for name in reversed(list(names))}.values())


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
