"""Arguments of an objective: TRL's class of them, and those of its keys that a run has no use for.

TRL's own defaults hold for what TRL adds to transformers' arguments.
"""

import importlib.metadata
import re
import warnings
from collections.abc import Mapping
from typing import Any

from expertune.config.objective import ObjectiveName
from expertune.config.yaml_file import shortened
from expertune.errors import ConfigError, did_you_mean

# The class of a run's arguments: module and name.
_ARGUMENTS: dict[ObjectiveName, tuple[str, str]] = {
    "sft": ("transformers", "TrainingArguments"),
    "dpo": ("trl", "DPOConfig"),
    "kto": ("trl", "KTOConfig"),
    "orpo": ("trl.experimental.orpo", "ORPOConfig"),
    "grpo": ("trl", "GRPOConfig"),
}

_OLDEST_TRL = (1, 16)  # whose trainers' insides were read

_OF_A_MODEL = "of a model that TRL loads; a run loads its own. Remove the key"
_OF_DATA = "of data that TRL prepares; `data` says how a run's is read. Remove the key"
_OF_A_REFERENCE = "of a reference that moves; a run's is the model that it starts from. Remove the key"
_OF_PADDING = "of padding, and there is none. Remove the key"

# Of the objectives over answers, and what the message says after `training.KEY is`.
_REFUSED = {
    "activation_offloading": "set with offload_activations",
    "dataset_num_proc": _OF_DATA,
    "generate_during_eval": "not supported; task.metric has evaluation examples answered and scored. Remove the key",
    "is_encoder_decoder": _OF_A_MODEL,
    "label_smoothing_factor": "of supervised fine-tuning; TRL has label_smoothing for some losses. Remove the key",
    "max_completion_length": "of data that TRL cuts; data.max_length is where a run cuts. Remove the key",
    "max_length": "set with data.max_length",
    "model_init_kwargs": _OF_A_MODEL,
    "pad_to_multiple_of": _OF_PADDING,
    "pad_token": _OF_PADDING,
    "padding_free": "how a run computes anyway; remove the key",
    "padding_value": _OF_PADDING,
    "precompute_ref_batch_size": "of log-probabilities that are kept, and a run keeps none. Remove the key",
    "precompute_ref_log_probs": "not supported; a run computes the reference as it goes, by the same model. Remove it",
    "ref_model_mixup_alpha": _OF_A_REFERENCE,
    "ref_model_sync_steps": _OF_A_REFERENCE,
    "sync_ref_model": _OF_A_REFERENCE,
    "torch_compile": "of supervised fine-tuning; the other losses take log-probabilities in a way that is not compiled",
    "truncation_mode": _OF_DATA,
    "trust_remote_code": "no key of a run file; give `--trust-remote-code` with the command",
    "use_liger_kernel": "not supported: a run has kernels of its own. Remove the key",
    "use_weighting": "not supported: it needs figures of all logits. Remove the key",
}


# Names of losses, which TRL looks at when it takes the first one.
_LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
}
# The strategies of training.train_sampling_strategy that look for `input_ids`, which examples of answers do not have.
_BY_LENGTH = ("group_by_length", "batch_rebalance")
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Losses of a difference of rewards, in which another divergence than reverse_kl has a meaning.
_OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}

# Keys of DPO that some losses alone read.
_READ_BY = {
    "discopop_tau": ("discopop",),
    "label_smoothing": ("exo_pair", "robust", "aot", "aot_unpaired"),
}

_OF_ANOTHER_ENGINE = "of another engine; a run generates with the model that it trains. Remove the key"
_NO_TOOLS = "of tools or conversations, and a prompt is answered once. Remove the key"

# Of generation_kwargs: a prompt has one answer each time that it is handed to the model.
_OF_GENERATION = {"num_beams", "num_return_sequences"}

_REFUSED_OF_GRPO = {
    **{key: reason for key, reason in _REFUSED.items() if reason in (_OF_A_MODEL, _OF_A_REFERENCE)},
    "cast_lm_head_to_fp32": _OF_A_MODEL,
    "chat_template_kwargs": _NO_TOOLS,
    "data_seed": "not used: TRL draws prompts by training.seed; set that",
    "label_smoothing_factor": "of supervised fine-tuning; remove the key",
    "log_completions": "not supported; `expertune generate` shows answers. Remove the key",
    "log_completions_hub_repo": "not supported: a run uploads nothing. Remove the key",
    "max_tool_calling_iterations": _NO_TOOLS,
    "neftune_noise_alpha": "of supervised fine-tuning; remove the key",
    "num_generations_eval": "not used: an evaluation has one answer for each prompt. Remove the key",
    "reward_weights": "set with rewards: [{function: NAME, weight: NUMBER}]",
    "torch_compile": "of supervised fine-tuning; remove the key",
    "train_sampling_strategy": "of supervised fine-tuning; TRL repeats each prompt for its group. Remove the key",
    "trust_remote_code": _REFUSED["trust_remote_code"],
    "use_liger_kernel": _REFUSED["use_liger_kernel"],
    "use_transformers_continuous_batching": _OF_ANOTHER_ENGINE,
    "use_transformers_paged": _OF_ANOTHER_ENGINE,
}


def arguments_class(objective: ObjectiveName, where: str = "config") -> Any:
    """TrainingArguments, or TRL's subclass of it for an objective of TRL's.

    Args:
        objective: the run's.
        where: what is named in errors.

    Raises:
        ConfigError: TRL is not installed, or too old.
    """
    module, name = _ARGUMENTS[objective]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            found = getattr(importlib.import_module(module), name)
        is_known = objective == "sft" or _release(importlib.metadata.version("trl")) >= _OLDEST_TRL
    except ImportError:  # also of a package that is not installed
        is_known = False
    if not is_known:
        raise ConfigError(f"{where}: objective: {objective} needs TRL 1.16 or later; `pip install 'expertune[trl]'`")
    return found


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def refused_of_trl(training: Mapping[str, Any], objective: ObjectiveName) -> dict[str, str]:
    """Keys of an objective of TRL's that a run file cannot set, with what the message says after the key.

    Args:
        training: the `training:` section.
        objective: the run's.
    """
    if objective == "sft":
        return {}
    if objective == "grpo":
        engine = {key: _OF_ANOTHER_ENGINE for key in training if key.startswith(("vllm_", "use_vllm"))}
        refused = {key: reason for key, reason in _REFUSED_OF_GRPO.items() if training.get(key)}
        for key in ("max_completion_length", "num_generations"):
            if key in training and training[key] is None:
                refused[key] = "empty; set a whole number, or remove the key"
        if own := _OF_GENERATION & set(training.get("generation_kwargs") or {}):
            refused["generation_kwargs"] = f"setting {min(own)}, and an answer is drawn token by token. Remove it there"
        return refused | {key: reason for key, reason in engine.items() if training[key]}
    refused = {key: reason for key, reason in _REFUSED.items() if training.get(key)}
    if (strategy := training.get("train_sampling_strategy")) in _BY_LENGTH:
        refused["train_sampling_strategy"] = f"{strategy}, which is of supervised fine-tuning. Remove the key"
    return refused


def loss_types(training: Mapping[str, Any]) -> list[str]:
    """The losses that a run file names: TRL takes one name, or a list."""
    named = training.get("loss_type") or []
    return [named] if isinstance(named, str) else list(named)


def problem_of_groups(training: Mapping[str, Any]) -> str | None:
    """Why answers that are generated at once are no whole groups, in a sentence that names the keys; None if they are.

    Args:
        training: of `objective: grpo`, with values that were checked.
    """
    rows, group = training.get("per_device_train_batch_size", 8), training.get("num_generations", 8)
    steps = training.get("steps_per_generation") or training.get("gradient_accumulation_steps", 1)
    given = training.get("generation_batch_size")
    key, value, at_once = (
        ("generation_batch_size", given, given) if given else ("per_device_train_batch_size", rows, rows * steps)
    )
    if at_once % group == 0:
        return None
    return (
        f"training.num_generations: {at_once} answers are generated at once, which is no multiple of {group}; set "
        f"{key} (now {value}) to {group} or a multiple of it, or another num_generations"
    )


def problem_of_loss(training: Mapping[str, Any], objective: ObjectiveName) -> str | None:
    """What TRL would refuse only when it takes a loss, in a sentence that names the key; None where it would not."""
    names, known = loss_types(training), _LOSSES.get(objective, ())
    if "loss_type" in training and not names:
        return "training.loss_type: no loss is named; name one, or remove the key"
    for name in names if known else ():
        if name not in known:
            return f"training.loss_type: {objective} has no loss {shortened(name)!r}{did_you_mean(name, known)}"
    if objective in ("dpo", "kto") and training.get("beta") == 0:
        return f"training.beta: 0 leaves nothing of the loss of objective: {objective}; set it above 0, as TRL's 0.1 is"
    for key, losses in _READ_BY.items() if objective == "dpo" else ():
        if training.get(key) and not set(names or ["sigmoid"]) & set(losses):
            return (
                f"training.{key}: only the losses {', '.join(losses)} read it; remove the key, or name one as loss_type"
            )
    smoothing, divergence = training.get("label_smoothing", 0.0), training.get("f_divergence_type", "reverse_kl")
    if "exo_pair" in names and not smoothing:
        return "training.loss_type: exo_pair needs training.label_smoothing above 0, e.g. 1e-3"
    if "robust" in names and not 0 <= smoothing < 0.5:
        return f"training.label_smoothing: {smoothing} has to be at least 0 and below 0.5 for the loss robust"
    if divergence not in _DIVERGENCES:
        return (
            f"training.f_divergence_type: there is no {shortened(divergence)!r}{did_you_mean(divergence, _DIVERGENCES)}"
        )
    if "f_alpha_divergence_coef" in training and divergence != "alpha_divergence":
        return "training.f_alpha_divergence_coef: only f_divergence_type: alpha_divergence reads it; remove the key"
    if divergence != "reverse_kl" and not set(names) <= _OF_DIFFERENCES:
        return (
            f"training.f_divergence_type: {divergence} has no meaning with loss_type {', '.join(names)}; remove the key"
        )
    return None
