"""Values under `training:` against the types that transformers declares, and against what training can use.

TrainingArguments is a dataclass, which checks no type: `learning_rate: abc` would be an error of the optimizer, after
the model is loaded. Types are read from the installed transformers; ranges of the well-known arguments stand here.
"""

import importlib.util
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, get_args

from pydantic import ConfigDict, PydanticUndefinedAnnotation, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from expertune.config.messages import as_written, wanted
from expertune.config.origin import Origin
from expertune.config.secrets import is_secret
from expertune.config.training_fields import ArgumentFields
from expertune.config.training_keys import MUON
from expertune.config.yaml_file import shortened
from expertune.errors import ConfigError, did_you_mean, nearest

# Argument -> (lowest value, whether it is itself allowed, first value that is too high).
_RANGES: dict[str, tuple[float, bool, float]] = {
    "per_device_train_batch_size": (1, True, math.inf),
    "per_device_eval_batch_size": (1, True, math.inf),
    "gradient_accumulation_steps": (1, True, math.inf),
    "num_train_epochs": (0, False, math.inf),
    "learning_rate": (0, False, math.inf),
    "warmup_steps": (0, True, math.inf),
    "warmup_ratio": (0, True, 1),
    "weight_decay": (0, True, math.inf),
    "adam_beta1": (0, True, 1),
    "adam_beta2": (0, True, 1),
    "adam_epsilon": (0, False, math.inf),
    "max_grad_norm": (0, True, math.inf),
    "label_smoothing_factor": (0, True, 1),
    "neftune_noise_alpha": (0, True, math.inf),
    "logging_steps": (0, False, math.inf),
    "eval_steps": (0, False, math.inf),
    "eval_delay": (0, True, math.inf),
    "eval_accumulation_steps": (1, True, math.inf),
    "save_steps": (0, False, math.inf),
    "save_total_limit": (1, True, math.inf),
    "torch_empty_cache_steps": (1, True, math.inf),
    "seed": (0, True, 2**32),
    "data_seed": (0, True, 2**32),
    "dataloader_num_workers": (0, True, 1024),
    "dataloader_prefetch_factor": (1, True, math.inf),
    "ddp_timeout": (1, True, math.inf),
    # TRL's.
    "beta": (0, True, math.inf),
    "label_smoothing": (0, True, 1),
    "desirable_weight": (0, True, math.inf),
    "undesirable_weight": (0, True, math.inf),
    "generation_batch_size": (1, True, math.inf),
    "max_completion_length": (1, True, math.inf),
    "num_generations": (2, True, math.inf),
    "num_iterations": (1, True, math.inf),
    "steps_per_generation": (1, True, math.inf),
    "temperature": (0, False, math.inf),
}

# What these packages are called where they are installed from.
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekitplugins-deck-standard"}


def check_training_values(training: Mapping[str, Any], origin: Origin, arguments: ArgumentFields) -> None:
    """Refuse values of a wrong type, out of range or of an unknown name, and trackers that are not installed.

    Args:
        training: the section; its keys are names of the arguments.
        origin: what is named in errors.
        arguments: fields of TrainingArguments, or of TRL's class of the objective.

    Raises:
        ConfigError: names the key, what it can be and what was found.
    """
    for key, value in training.items():
        if key.endswith("_strategy") and value is False:
            continue  # YAML 1.1 reads a bare `no` as False, and the trainer knows
        if key == "loss_type" and isinstance(value, str):
            continue  # TRL takes one name for a list of it
        problem = _problem_of_type(key, arguments.type_of(key), value) or _problem_of_range(key, value)
        if problem:
            found = "" if is_secret(key, str(value)) else f", got {shortened(as_written(value))}"
            problem, semicolon, hint = problem.partition(";")
            where = origin.of(f"training.{key}")
            raise ConfigError(f"{where}: training.{key}: {problem}{found}{semicolon}{hint}")
    _require_trackers(training.get("report_to"), origin.of("training.report_to"))


def _problem_of_type(key: str, hint: Any, value: Any) -> str | None:
    choices = [each.value for part in (hint, *get_args(hint)) if _is_enum(part) for each in part]
    if key == "optim":
        choices.append(MUON)
    if choices and isinstance(value, str):
        if value in choices:
            return None
        # `adamw` is not near to `adamw_torch` as a whole: it is the first word of several.
        meant = {choice.partition("_")[0]: choice for choice in reversed(choices)} | {each: each for each in choices}
        near = nearest(value, meant)
        return "no value of this name" + (f"; did you mean {meant[near]}?" if near else did_you_mean(value, choices))
    try:
        # As it stands: transformers takes the text "1e-4" for a number no more than "abc".
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):
        return None
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        each = list(dict.fromkeys(wanted(problem) for problem in error.errors()))
        return f"has to be {' or '.join(each[:3])}"
    return None


def _problem_of_range(key: str, value: Any) -> str | None:
    if key == "max_steps":
        # -1 is transformers' own word for "by epochs".
        return None if value == -1 or value >= 1 else "has to be at least 1 (or -1, to go by num_train_epochs)"
    if key not in _RANGES or not isinstance(value, int | float):
        return None
    lowest, is_allowed, too_high = _RANGES[key]
    if (value >= lowest if is_allowed else value > lowest) and value < too_high:
        return None
    below = f" and below {too_high:,}" if too_high != math.inf else ""
    return f"has to be {'at least' if is_allowed else 'above'} {lowest}{below}"


def _require_trackers(report_to: Any, where: str) -> None:
    """Refuse a tracker that transformers does not know, or whose package is missing here."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not set(names) - {"none", "all"}:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = did_you_mean(name, ["none", *INTEGRATION_TO_CALLBACK])
            raise ConfigError(f"{where}: training.report_to: no tracker is called {shortened(name)!r}{known}")
        if name not in get_available_reporting_integrations() and not _is_installed(name):
            raise ConfigError(
                f"{where}: training.report_to: {name} is not installed here; "
                f"`pip install {_PACKAGES.get(name, name)}`, or set training.report_to to none"
            )


def _is_installed(name: str) -> bool:
    """For trackers that transformers' own list leaves out."""
    try:
        return importlib.util.find_spec({"flyte": "flytekit"}.get(name, name)) is not None
    except (ImportError, ValueError):
        return False


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)
