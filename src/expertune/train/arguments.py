"""TrainingArguments of a run, from the `training:` section of its run file."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertune.config import ObjectiveName
from expertune.config.training_fields import fields_of, imported_fields, training_fields
from expertune.config.training_keys import MUON, unused_keys
from expertune.config.trl_keys import arguments_class
from expertune.errors import ConfigError
from expertune.train.optimizers import MuonSettings, default_optimizer, usable_optimizer

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

BATCH_SIZE = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
EVALUATION_BATCH_SIZE = "per_device_eval_batch_size"


def training_argument(training: Mapping[str, Any], name: str) -> Any:
    """A key under `training:`, or TrainingArguments' own default."""
    return training[name] if name in training else training_fields().default_of(name)


def uses_checkpointing(training: Mapping[str, Any]) -> bool:
    """Whether layers are recomputed; TrainingArguments has two names for it, the older one deprecated."""
    return bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))


def training_arguments(
    training: Mapping[str, Any], output_dir: str, device: "torch.device", objective: ObjectiveName = "sft"
) -> tuple[Any, list[str]]:
    """TrainingArguments with this project's defaults, or TRL's arguments of an objective.

    Args:
        training: the section; its keys have been checked.
        output_dir: the run directory.
        device: where the model is.
        objective: the run's. What TRL's arguments have from transformers keeps transformers' defaults.

    Returns:
        The arguments, and a sentence for each value that could not be used as it stands.

    Raises:
        ConfigError: transformers refuses a value.
    """
    # YAML 1.1 reads a bare `no` as False.
    values = {key: "no" if key.endswith("_strategy") and value is False else value for key, value in training.items()}
    notes = unused_keys(values, on_cpu=device.type == "cpu")
    _use_new_names(values)
    if device.type == "cpu":
        values |= {"use_cpu": True, "fp16": False}
        values.setdefault("dataloader_pin_memory", False)
    elif values.get("use_cpu"):
        raise ConfigError(
            "training.use_cpu is true, but the model is on the GPU that this process sees; hide it with "
            "CUDA_VISIBLE_DEVICES= (nothing after the sign) in the environment, and remove the key"
        )
    optimizer = str(values.get("optim") or default_optimizer(device.type))
    values["optim"] = usable_optimizer(optimizer, device.type)
    if values["optim"] != optimizer:
        notes.append(f"training.optim: {optimizer} needs a CUDA device; using {values['optim']} on this CPU")
    if is_muon := values["optim"] == MUON:
        MuonSettings.parse(values.get("optim_args"))  # refuses what is wrong in it
        values["optim"] = "adamw_torch"
    values.setdefault("report_to", "none")
    values.setdefault("disable_tqdm", False)
    values.setdefault("run_name", f"{Path(output_dir).name}-{time.strftime('%Y-%m-%d-%H-%M')}")
    values.setdefault("save_strategy", "steps")
    values |= {"output_dir": output_dir, "remove_unused_columns": False}
    arguments = arguments_class(objective)
    if objective == "grpo":
        values["num_generations_eval"] = 1  # TRL compares it with a batch size, and an evaluation is the run's own
    defaults = fields_of(arguments_class("sft")).defaults
    for own in dataclasses.fields(arguments):
        if own.name in defaults and own.default != defaults[own.name]:
            values.setdefault(own.name, defaults[own.name])
    try:
        args = arguments(**values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: {arguments.__module__.partition('.')[0]} refuses a value: {error}") from None
    if is_muon:
        args.optim = MUON  # a name that transformers' list of optimizers lacks
    use_one_gpu(args)
    return args, notes


def loss_arguments(training: Mapping[str, Any], objective: ObjectiveName) -> Any:
    """TRL's arguments of an objective, for its loss alone: what of `training:` is transformers' is left out."""
    defaults = fields_of(arguments_class("sft")).defaults
    own = {key: value for key, value in training.items() if key not in defaults}
    own |= {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    return arguments_class(objective)(**own, gradient_checkpointing=defaults["gradient_checkpointing"])


def use_one_gpu(args: "TrainingArguments") -> None:
    """Of several GPUs that a process sees, transformers would use all: a batch on each, by nn.DataParallel.

    It has no argument for one; the attribute was read from releases 5.20 to 5.24, and a test checks it.
    """
    args._n_gpu = min(args.n_gpu, 1)


def _use_new_names(values: dict[str, Any]) -> None:
    """transformers renamed two arguments: run files may use either name, and either release is given its own."""
    known = imported_fields().known
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if new in known and old in values:
            values[new] = values.pop(old)
    name = next(each for each in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if each in known)
    # The reentrant variant needs inputs that require gradients, which frozen embeddings do not give.
    values[name] = {"use_reentrant": False, **(values.get(name) or {})}
