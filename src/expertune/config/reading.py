"""A run file read: its overrides, the check of every key, and the messages of its errors.

The keys under `training:` are TrainingArguments' own names; they are checked against the installed transformers when
the run starts (`check_training_arguments`), because only transformers knows them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from expertune.config.lora import LoraSection
from expertune.config.messages import describe, nearest_key
from expertune.config.objective import ObjectiveName
from expertune.config.origin import Origin
from expertune.config.schema import TRUST_KEY, RunConfig
from expertune.config.secrets import is_secret
from expertune.config.training_fields import ArgumentFields, fields_of, imported_fields, training_fields
from expertune.config.training_keys import refused_keys
from expertune.config.training_values import check_training_values
from expertune.config.trl_keys import arguments_class, problem_of_groups, problem_of_loss, refused_of_trl
from expertune.config.weights import QuantizationConfig
from expertune.config.yaml_file import parse_value, shortened
from expertune.errors import ConfigError

# Section, key, the value's earlier name, and its name now.
_RENAMED_VALUES = (("kernels", "route", "decode_then_gemm", "dequant_gemm"),)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Set `section.key=value` overrides in a mapping of run-file keys; `null` removes a key, and its default holds.

    Of `training`, where null may be a value of transformers' own, it is set.

    Returns:
        Of each key that was set or removed, in dots, the override, for `parse_config`.

    Raises:
        ConfigError: names the override.
    """
    set_by: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        shown = shortened(override) if not is_secret(key.strip(), text) else f"{key}=..."
        where = f"override {shown!r}"
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"{where}: write it as section.key=value")
        if not text.strip():  # which YAML reads as null: a variable of the shell that is not set, for example
            raise ConfigError(f"{where}: no value behind the =; write one, or null for the key's default")
        value = parse_value(text, where)
        *parents, leaf = key.strip().split(".")
        here = values
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{where}: {shortened(parent)} is a value, not a section")
        if value is None and parents and parents[0].strip() != "training":
            here.pop(leaf, None)
        else:
            here[leaf] = value
        dotted = ".".join([*parents, leaf])
        set_by = {each: by for each, by in set_by.items() if not each.startswith(f"{dotted}.")} | {dotted: shown}
    return set_by


def parse_config(
    values: Mapping[str, Any],
    where: str = "config",
    opened: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> RunConfig:
    """Check a mapping of run-file keys and return the RunConfig.

    Args:
        values: the keys.
        where: what errors name.
        opened: the run is over and is only used: its metric need not be registered here.
        overrides: what `apply_overrides` has set in them, which errors name in place of `where`.

    Raises:
        ConfigError: names each wrong key, what was found there, and the nearest known key.
    """
    values, notes = with_current_names(values)
    origin = Origin(where, notes, overrides or {})
    config = RunConfig.model_validate(values, context={"origin": origin, "opened": opened})
    config._origin = origin
    return config


def parse_lora(values: dict[str, Any]) -> LoraSection:
    """Check the keys of the section `lora` alone.

    Raises:
        ConfigError: see `parse_config`.
    """
    try:
        return LoraSection.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, Origin("lora"), LoraSection)) from None


def parse_quantization(values: dict[str, Any]) -> QuantizationConfig:
    """Check the keys of the section `quantization` alone.

    Raises:
        ConfigError: see `parse_config`.
    """
    try:
        return QuantizationConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, Origin("quantization"), QuantizationConfig)) from None


def with_current_names(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Values that earlier releases called otherwise under the names that they have now, and a sentence for each."""
    notes = []
    for section, key, old, new in _RENAMED_VALUES:
        found = values.get(section)
        if isinstance(found, dict) and found.get(key) == old:
            values = {**values, section: {**found, key: new}}
            notes.append(f"{section}.{key}: {old} is now called {new}")
    return values, tuple(notes)


def recorded_config(
    values: Mapping[str, Any], where: str, opened: bool = False, overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """The RunConfig that a record holds. What earlier releases recorded of trusted code is ignored.

    Args:
        values, where, opened, overrides: see `parse_config`.

    Raises:
        ConfigError: see `parse_config`.
    """
    return parse_config({key: value for key, value in values.items() if key != TRUST_KEY}, where, opened, overrides)


def check_training_arguments(
    training: dict[str, Any], origin: Origin | None = None, objective: ObjectiveName = "sft"
) -> None:
    """Refuse keys under `training:` that the installed libraries do not know, and values that they cannot use.

    Reads transformers, so it runs when a run is planned or started, not when `--help` is printed.

    Args:
        training: the section.
        origin: what is named in errors.
        objective: the run's; TRL is imported for all but `sft`.

    Raises:
        ConfigError: names the unknown key and the nearest known one, a key that a run does not take, or a wrong value;
            or TRL is not installed.
    """
    origin = origin or Origin()
    owned = refused_keys(training) | refused_of_trl(training, objective)
    for key in training:
        if key in owned:
            raise ConfigError(f"{origin.of(f'training.{key}')}: training.{key} is {owned[key]}")
    if objective != "sft":
        _check_arguments(training, origin, fields_of(arguments_class(objective, origin.of("objective"))))
    else:
        try:
            _check_arguments(training, origin, training_fields())
        except ConfigError as error:
            # The class decides what is refused: its source may say less than the class takes.
            try:
                arguments = imported_fields()
            except Exception:  # of whatever libraries it brings
                raise error from None
            _check_arguments(training, origin, arguments)
    if problem := problem_of_loss(training, objective) or (objective == "grpo" and problem_of_groups(training)):
        raise ConfigError(f"{origin.of(problem.partition(':')[0], problem)}: {problem}")


def _check_arguments(training: dict[str, Any], origin: Origin, arguments: ArgumentFields) -> None:
    for key in training:
        if key not in arguments.known:
            near = nearest_key(key, arguments.known, RunConfig)
            where = origin.of(f"training.{key}")
            raise ConfigError(f"{where}: training.{shortened(key)} is not an argument of {arguments.name}{near}")
    check_training_values(training, origin, arguments)
