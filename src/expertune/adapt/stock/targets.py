"""What a stock `LoraConfig` means on a model with 4-bit experts: which matrices, at which ranks; or why it cannot be.

Names may be the checkpoint's (`w1`), the live model's (`experts.gate_up_proj`), or the field's usual ones (`gate_proj`,
`up_proj`, `down_proj`), as a list, as a regular expression or as `all-linear`, which means the experts too. PEFT's own
reading of a name (ends in it, or matches it as a whole), of `exclude_modules` and of `layers_to_transform` holds.
"""

import warnings
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from expertune.adapt.internals import is_excluded, with_all_linear
from expertune.adapt.patterns import first_match
from expertune.adapt.reachability import is_weight_used_alone
from expertune.checkpoint.linears import is_linear
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank, ResolvedTargets
from expertune.errors import ConfigError
from expertune.experts.router import find_router

USUAL_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

# What the experts can have of a LoraConfig; anything else must stand at its default.
_POSSIBLE = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    *("runtime_config",),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size"),
}
_INITS = (True, False, "gaussian")


@dataclass
class StockTargets(ResolvedTargets):
    """`ResolvedTargets`, and what else PEFT adapts by itself.

    Attributes:
        others: names of further modules (embeddings, convolutions) -> rank.
        parameters: names of further parameters -> rank.
    """

    others: dict[str, Rank] = field(default_factory=dict)
    parameters: dict[str, Rank] = field(default_factory=dict)


def read_targets(model: nn.Module, names: NameMap, config: LoraConfig) -> StockTargets:
    """Resolve a LoraConfig against a model without adapters.

    Args:
        model: the transformers model.
        names: its name map.
        config: the user's; it is not changed.

    Raises:
        ConfigError: a regular expression or a pattern takes some experts of a layer and not the others.
    """
    reading = _Reading(model, names, config)
    found = StockTargets(use_dora=config.use_dora)
    routers = {find_router(module, model, spec) for module, spec in names.specs.items()}
    inside = tuple(f"{module}." for module in names.specs)
    for name, module in model.named_modules():
        if not name or name in names.specs or name.startswith(inside):
            continue
        keys = [name, names.on_disk(name)]
        # A linear that groups, clips or scales is none that PEFT's own layer computes, and one whose weight is used
        # without calling it would have no effect there; they are adapted where they are named.
        plain = is_linear(module) and not is_weight_used_alone(model, name)
        if reading.takes(keys) and (plain or not is_all_linear(config)):
            into = found.linears if is_linear(module) else found.router if name in routers else found.others
            into[name] = reading.rank(keys)
        for parameter, _ in module.named_parameters(recurse=False) if config.target_parameters else ():
            keys = [f"{name}.{parameter}", names.on_disk(f"{name}.{parameter}")]
            if reading.takes_parameter(keys):
                is_router = name in routers and parameter == "weight"
                (found.router if is_router else found.parameters)[name if is_router else keys[0]] = reading.rank(keys)
    for module in names.specs:
        for projection in names.projection_names:
            rank = reading.projection(module, projection)
            if rank is not None:
                found.experts.setdefault(module, {})[projection] = rank
    reading.warn_of_unused()
    return found


class _Reading:
    """One config against one model; remembers which of its names were of use."""

    def __init__(self, model: nn.Module, names: NameMap, config: LoraConfig) -> None:
        self._names, self._config = names, config
        self._all_linear = is_all_linear(config)
        if self._all_linear:
            config = with_all_linear(copy(config), model)
        elif config.target_modules is None:
            config = copy(config)
            config.target_modules = set()
        self._matching = config
        listed = set() if isinstance(self._config.target_modules, str) else set(self._config.target_modules or ())
        self._unused = {"target_modules": listed, "target_parameters": set(self._config.target_parameters or ())}

    def takes(self, keys: list[str]) -> bool:
        """Whether any of a module's names is a target, and none is excluded."""
        if self._is_excluded(keys) or not any(check_target_module_exists(self._matching, key) for key in keys):
            return False
        self._note("target_modules", keys)
        return True

    def takes_parameter(self, keys: list[str]) -> bool:
        """Whether any of a parameter's names is one of `target_parameters`."""
        targets = self._config.target_parameters or ()
        taken = any(key == target or key.endswith(f".{target}") for key in keys for target in targets)
        if taken:
            self._note("target_parameters", keys)
        return taken

    def projection(self, module: str, projection: str) -> Rank | None:
        """The rank of one projection of all experts of a module; None where it is no target.

        Of an adapter that comes from a file, the file's tensors have the last word: a pattern there may be of the
        stacked parameters, whose rank is the sum of gate's and up's.

        Raises:
            ConfigError: the patterns give the experts different ranks.
        """
        shared, experts = _names_of(self._names, module, projection)
        # Both are evaluated, so that a second name for the same projection is not reported as unused.
        taken = [self._is_taken(module, projection, shared, experts), self.takes_parameter(shared)]
        if not any(taken):
            return None
        ranks = {self.rank([*shared, *keys]) for keys in experts}
        if len(ranks) > 1:
            raise ConfigError(
                f"rank_pattern, alpha_pattern: the experts of {module} share a rank and an alpha, but the patterns "
                f"give {sorted(ranks)}; write patterns that do not name a single expert"
            )
        return ranks.pop()

    def _is_taken(self, module: str, projection: str, shared: list[str], experts: list[list[str]]) -> bool:
        def together(key: str, each: list[bool]) -> bool:
            if any(each) and not all(each):
                raise ConfigError(
                    f"{key} takes {sum(each)} of the {len(each)} experts of {module} ({projection}); the experts of a "
                    "layer are adapted together: write names that fit all of them"
                )
            return all(each)

        if self._config.exclude_modules and together(
            "exclude_modules", [self._is_excluded([*shared, *keys]) for keys in experts]
        ):
            return False
        return self._all_linear or self.takes(shared) or together("target_modules", [self.takes(k) for k in experts])

    def _is_excluded(self, keys: list[str]) -> bool:
        return any(is_excluded(self._matching, key) for key in keys)

    def rank(self, keys: list[str]) -> Rank:
        """Rank and alpha by the patterns, for a module of these names."""
        return rank_by_patterns(self._config, keys)

    def _note(self, kind: str, keys: list[str]) -> None:
        self._unused[kind] -= {each for each in self._unused[kind] for key in keys if f".{key}".endswith(f".{each}")}

    def warn_of_unused(self) -> None:
        """Warn of names that match nothing and therefore train nothing; PEFT itself does not."""
        for kind, unused in self._unused.items():
            if unused:
                known = ", ".join(self._names.projection_names.values())
                warnings.warn(
                    f"{kind}: nothing in this model is called {', '.join(sorted(map(repr, unused)))}, so nothing is "
                    f"adapted by that name; the projections of its experts are called {known}",
                    stacklevel=2,
                )


def _names_of(names: NameMap, module: str, projection: str) -> tuple[list[str], list[list[str]]]:
    """Every name of one projection: those for all experts of the module at once, and those of each expert."""
    spec, leaf = names.specs[module], names.projection_names[projection]
    places = dict.fromkeys((module, names.on_disk(module)))
    leaves = dict.fromkeys((leaf, USUAL_NAMES[projection]))
    shared = [
        *places,
        f"{module}.{spec.weight_names[projection == 'down']}",
        *(f"{place}.{each}" for place in places for each in leaves),
    ]
    return shared, [
        [f"{place}.{expert}.{each}" for place in places for each in leaves] for expert in range(spec.num_experts)
    ]


def rank_by_patterns(config: LoraConfig, keys: list[str]) -> Rank:
    """Rank and alpha that a config gives a module of these names: by its live one, or by its name on disk."""
    return Rank(
        int(first_match(config.rank_pattern or {}, keys, config.r)),
        first_match(config.alpha_pattern or {}, keys, config.lora_alpha),
    )


def is_all_linear(config: PeftConfig) -> bool:
    """Whether a config's targets are `all-linear`."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


# ---- what cannot be


def require_possible(config: LoraConfig) -> None:
    """Refuse what experts cannot have, by its name in LoraConfig.

    Raises:
        ConfigError: for the first such setting.
    """
    if config.init_lora_weights not in _INITS:
        _refuse(f"init_lora_weights={config.init_lora_weights!r}", "True, False or 'gaussian'")
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name not in _POSSIBLE and value not in (_default_of(each), None):
            _refuse(f"{each.name}={value!r}", f"{each.name}={_default_of(each)!r}")


def _refuse(what: str, instead: str) -> None:
    raise ConfigError(
        f"LoraConfig: {what} cannot be had on 4-bit experts, which are among the targets; use {instead}, or take the "
        "experts out of target_modules and target_parameters"
    )


def _default_of(each: "Field[Any]") -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default


def refuse_whole_experts(model: nn.Module, names: NameMap, config: PeftConfig) -> None:
    """Refuse `modules_to_save` that reach the experts: a trained copy of 4-bit weights is no such thing.

    Raises:
        ConfigError: one does.
    """
    projections = {*names.projection_names.values(), *USUAL_NAMES.values()}
    projections |= {weight for spec in names.specs.values() for weight in spec.weight_names}
    for target in getattr(config, "modules_to_save", None) or ():
        hit = target.rpartition(".")[2] in projections or any(
            experts.startswith(f"{key}.") or f"{key}.".startswith(f"{experts}.")
            for key, _ in model.named_modules()
            if key and any(each.endswith(target) for each in (key, names.on_disk(key)))
            for experts in names.specs
        )
        if hit:
            raise ConfigError(
                f"modules_to_save: {target!r} names 4-bit experts or a block that holds them, which cannot be trained "
                "as a whole; name the experts in target_modules instead"
            )


def refuse_other_methods(model: nn.Module, names: NameMap, config: PeftConfig, tuner: BaseTuner) -> None:
    """Refuse methods other than LoRA where they name experts, which they would leave out in silence.

    Raises:
        ConfigError: they do.
    """
    method = str(getattr(config.peft_type, "value", config.peft_type))
    targets = getattr(config, "target_modules", None)
    if is_all_linear(config):
        warnings.warn(
            f"all-linear does not mean the 4-bit experts with {method}: only LoRA can adapt these", stacklevel=2
        )
    elif targets:
        plain = LoraConfig(
            target_modules=targets,
            target_parameters=getattr(config, "target_parameters", None),
            exclude_modules=getattr(config, "exclude_modules", None),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            experts = read_targets(model, names, plain).experts
        if experts:
            raise ConfigError(
                f"{method} ({type(tuner).__name__}) cannot adapt 4-bit experts, which target_modules names; use "
                "LoraConfig, or take the experts out of target_modules"
            )
