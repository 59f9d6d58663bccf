"""Attach LoRA as the run file describes it: resolve names, build the PeftModel, start from an adapter if asked."""

from collections.abc import Collection
from dataclasses import replace

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel

from expertune.adapt.base_model import adapted_names, require_every_layer, require_same_base, within_layers_of
from expertune.adapt.factors import PerExpert
from expertune.adapt.file_layout import sparse_layout, stock_layout
from expertune.adapt.files import (
    FURTHER_SETTINGS,
    AdapterFile,
    Origin,
    read_adapter,
    read_adapter_base,
    settings_of,
)
from expertune.adapt.first_factors import take_first_away
from expertune.adapt.internals import is_refused
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.live import LiveAdapter, live_held, live_ranks, without_adapters
from expertune.adapt.patterns import leaves
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.adapt.reachability import reachable_modules
from expertune.adapt.stock.config import exact_names
from expertune.adapt.stock.targets import StockTargets
from expertune.adapt.validation import require_ranks_in_file
from expertune.checkpoint.adapter_folder import SETTINGS, require_same_setting
from expertune.checkpoint.linears import is_linear
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.names import NameMap, read_names
from expertune.checkpoint.targets import Group, Rank, ResolvedTargets, resolve_targets
from expertune.config import LoraSection
from expertune.errors import CheckpointError, ConfigError
from expertune.experts.lora import ExpertLoraConfig
from expertune.experts.module import Nf4Experts, parallel_of

# Targets that mean what a loss reaches.
_ALIASES = frozenset({"attention", "experts"})


def attach(
    loaded: LoadedModel,
    lora: LoraSection,
    base_model: str,
    revision: str | None = None,
    adapter_name: str = "default",
    onto: ExpertPeftModel | None = None,
) -> ExpertPeftModel:
    """Attach an adapter to a loaded model.

    Args:
        loaded: the base model with 4-bit experts, and its names.
        lora: the run file's adapter section. With `init: pissa` the adapter takes its first factors away, but these
            are those of an adapter that starts at zero until `expertune.adapt.initial` sets them; of the other
            beginnings nothing is done here.
        base_model: what `adapter_config.json` names as the base: hub id or path. Of an NF4 folder that is the
            checkpoint which it was made of, whatever is given here.
        revision: commit of the base.
        adapter_name: name of the adapter.
        onto: a model that already has adapters; None makes a new one.

    Raises:
        ConfigError: a target fits nothing, or `init_from` disagrees with a value that the run file sets.
        CheckpointError: `init_from` is no adapter of this model, or was trained on another base.
    """
    if lora.selects and not (lora.experts and lora.experts.layers):
        raise ConfigError(
            "lora.experts, lora.expert_rank: load: which experts these are is found by a pass over training examples, "
            "which a run makes; give experts={'share': ..., 'layers': {layer: [experts]}}, as a run's record has them"
        )
    if not loaded.model.can_generate() and loaded.model.get_output_embeddings() is None:
        raise ConfigError(
            f"attach adapts language models, and {type(loaded.model).__name__} is none: its head would stay as it was "
            "initialized. For a reward model or a classifier give peft.LoraConfig(task_type='SEQ_CLS', "
            "target_modules='all-linear') to get_peft_model or to TRL's trainer, which train the head too"
        )
    adopted: tuple[AdapterFile, PerExpert] | None = None
    if lora.init_from:
        file = read_adapter(lora.init_from)
        if not lora.init_from_other_base:
            require_same_base(lora.init_from, loaded.fingerprint, base_model)
        adopted = file, file.per_expert(loaded.names)
    with without_adapters(loaded.model):
        reached = _reached(loaded, lora)
        if adopted is None:
            targets = resolve_targets(loaded.model, loaded.names, lora, reached)
        else:
            lora, targets = _adopted_targets(loaded.model, loaded.names, lora, adopted, reached)
    if targets.groups and parallel_of(loaded.model):
        raise ConfigError(
            f"lora.init_from: the adapter at {lora.init_from} is on some experts only, or with several ranks, and "
            "distributed.experts: parallel shares out adapters of all alike; set it to shard or replicate"
        )
    config = _live_config(targets, lora)
    settings = settings_of(lora)
    origin = Origin(*(loaded.source or (base_model, revision)), settings)
    dtype = torch.bfloat16 if lora.dtype == "bfloat16" else torch.float32
    if onto is None:
        model = ExpertPeftModel(loaded.model, config, origin, loaded.names, adapter_name, dtype)
    else:
        model = onto
        model.attach(adapter_name, config, origin, dtype)
    model.base = loaded.fingerprint
    if adopted is not None:
        file, plain = adopted
        LiveAdapter(loaded.model, loaded.names, adapter_name).load(plain, file.live)
    elif lora.init == "pissa":
        take_first_away(loaded.model, adapter_name)
    return model


def _adopted_targets(
    model: PreTrainedModel,
    names: NameMap,
    asked: LoraSection,
    adapter: tuple[AdapterFile, PerExpert],
    reached: Collection[str] | None,
    tried: bool = True,
) -> tuple[LoraSection, ResolvedTargets]:
    """The run file's section in the adapter's own shape, and what of the model the adapter is on.

    Args:
        model: the base model.
        names: its name map.
        asked: the run file's section.
        adapter: the adapter, and its tensors under per-expert names.
        reached: see `resolve_targets`.
        tried: whether that is what a loss has been tried on. Otherwise aliases may mean less than it has, and are held
            to the adapter within the layers alone that the adapter is on: a loss reaches these.

    Raises:
        ConfigError, CheckpointError: see `attach`.
    """
    (file, plain), are_named = adapter, "targets" in asked.model_fields_set
    lora = adopt(asked, names, file, plain)
    try:
        wanted = resolve_targets(model, names, lora, reached)
    except ConfigError as error:
        if are_named:
            raise
        raise CheckpointError(f"{file.where}: no adapter of this model: {error}") from None
    targets = _held_targets(wanted, names, set(plain.modules))
    if not asked.init_from_other_base and read_adapter_base(file.where) is None:
        require_every_layer(file.where, wanted, targets)
    require_ranks_in_file(file.where, targets, names, plain.tensors)
    if are_named:
        # Patterns of the adapter's may fit none of these.
        alone = lora.model_copy(update={"targets": asked.targets, "rank_pattern": {}, "alpha_pattern": {}})
        named, adapted = adapted_names(resolve_targets(model, names, alone, reached)), adapted_names(targets)
        if not tried and _ALIASES.intersection(asked.targets):
            named = within_layers_of(adapted, named)
        if named != adapted:
            raise ConfigError(
                f"lora.targets is {asked.targets}, but the adapter at {asked.init_from} has {lora.targets}; "
                "remove the key to take the adapter's (on the command line: lora.targets=null)"
            )
    return lora, targets


def expected_layout(model: PreTrainedModel, lora: LoraSection) -> StockLayout:
    """How the file of an adapter is going to be laid out, from the model's config alone.

    Modules that no text reaches are known only when the model is there; aliases may mean fewer modules then.

    Args:
        model: the base model on the meta device.
        lora: the run file's adapter section.

    Raises:
        ConfigError, CheckpointError: see `attach`.
    """
    names, lora = read_names(model), lora.in_files
    modules = {name for name, module in model.named_modules() if is_linear(module) and not is_refused(model, name)}
    lora, targets = expected_targets(model, names, lora, modules | names.specs.keys())
    if any(
        sum(len(group.experts) for group in groups) < names.specs[module].num_experts
        for module, groups in targets.groups.items()
    ):
        found = sparse_layout(names, targets, lora.r, lora.rank_pattern)
    else:
        found = stock_layout(model, names, _widest(targets), lora.r, lora.rank_pattern)
    return replace(found, merging=_why_not_merged(model, names, targets))


def expected_targets(
    model: PreTrainedModel, names: NameMap, lora: LoraSection, reached: Collection[str] | None = None
) -> tuple[LoraSection, ResolvedTargets]:
    """What an adapter is going to be on; of one that there is already (`init_from`), with the section in its shape.

    Args:
        model: the base model on the meta device.
        names: its name map.
        lora: the run file's adapter section.
        reached: see `resolve_targets`.

    Raises:
        ConfigError, CheckpointError: see `attach`.
    """
    if not lora.init_from:
        return lora, resolve_targets(model, names, lora, reached)
    file = read_adapter(lora.init_from)
    return _adopted_targets(model, names, lora, (file, file.per_expert(names)), reached, tried=False)


def _widest(targets: ResolvedTargets) -> ResolvedTargets:
    """The same with the largest rank of each layer's experts for all of them, as files have it."""
    experts = {
        module: {
            projection: rank._replace(rank=max(1, round(rank.rank * max(each.factor for each in groups))))
            for projection, rank in ranks.items()
        }
        for module, ranks in targets.experts.items()
        for groups in [targets.groups.get(module, [Group(())])]
    }
    return replace(targets, experts=experts)


def _why_not_merged(model: PreTrainedModel, names: NameMap, targets: ResolvedTargets) -> str | None:
    model.tie_weights()  # creating parameters on the meta device parts those that the config ties
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    name = next((names.on_disk(name) for name in targets.linears if model.get_submodule(name) is head), None)
    return name and (
        f"{name} shares its weight with this model's embedding. Unmerged, the adapter is right; merged as it stands, "
        "it would change the embedding too: untie the two first, as docs/guides/use-the-adapter.md shows"
    )


def adopt(lora: LoraSection, names: NameMap, file: AdapterFile, plain: PerExpert) -> LoraSection:
    """The adapter section with the shape of an adapter that is there already.

    Args:
        lora: the run file's.
        names: the base model's name map.
        file: the adapter.
        plain: its tensors under per-expert names.

    Raises:
        ConfigError: the run file sets a value that the adapter contradicts.
    """
    found = file.settings
    if found is None and plain.is_plain and not file.config.get("target_parameters"):
        # Ranks and alphas of stacks name no module of the checkpoint.
        stacks = {f"{module}.{weight}" for module, spec in names.specs.items() for weight in spec.weight_names}
        patterns = {
            key: {name: value for name, value in (file.config.get(key) or {}).items() if name not in stacks}
            for key in ("rank_pattern", "alpha_pattern")
        }
        rslora = bool(file.config.get("use_rslora"))
        found = {"r": file.config["r"], "alpha": file.config["lora_alpha"], "rslora": rslora, **patterns}
    found = {**(plain.settings() if found is None else found), "targets": leaves(plain.modules)}
    found["use_dora"] = bool(file.config.get("use_dora"))
    found = {key: LoraSection.model_fields[key].default for key in FURTHER_SETTINGS} | found
    for key in (*SETTINGS, "use_dora", *FURTHER_SETTINGS):
        if key != "init":
            require_same_setting(lora, key, found[key])
    return lora.model_copy(update=found)


def _reached(loaded: LoadedModel, asked: LoraSection) -> set[str] | None:
    """What aliases among the targets may mean; None where there is no alias to ask for."""
    given = not asked.init_from or "targets" in asked.model_fields_set
    if not given or not _ALIASES.intersection(asked.targets):
        return None
    candidates = {
        name: module
        for name, module in loaded.model.named_modules()
        if is_linear(module) or isinstance(module, Nf4Experts)
    }
    return reachable_modules(loaded.model, candidates)


def _held_targets(targets: ResolvedTargets, names: NameMap, held: set[str]) -> ResolvedTargets:
    """Those of the targets that an adapter holds a tensor of.

    An adapter names what it adapts by the last part of a name, which shared experts and dense layers may have in common
    with the experts. Where all tensors of a projection are missing, it was none of the adapter's.
    """

    def is_held(module: str, projection: str) -> bool:
        return not held.isdisjoint(names.experts_on_disk(module, projection))

    experts = {
        module: {projection: rank for projection, rank in ranks.items() if is_held(module, projection)}
        for module, ranks in targets.experts.items()
    }
    return ResolvedTargets(
        linears={name: rank for name, rank in targets.linears.items() if names.on_disk(name) in held},
        router={name: rank for name, rank in targets.router.items() if names.on_disk(name) in held},
        experts={module: ranks for module, ranks in experts.items() if ranks},
        use_dora=targets.use_dora,
        groups={module: groups for module, groups in targets.groups.items() if experts[module]},
    )


def _live_config(targets: ResolvedTargets, lora: LoraSection) -> ExpertLoraConfig:
    found = exact_names(StockTargets(**vars(targets)), Rank(lora.r, lora.alpha))
    found["target_modules"] = found["target_modules"] or DUMMY_TARGET_MODULES
    config = ExpertLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.use_dora,
        bias="none",
        **found,
    )
    config.expert_ranks, config.expert_held = live_ranks(targets), live_held(targets)
    return config
