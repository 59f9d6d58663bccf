"""Keys under `training:` that a run does not leave to transformers: refused by name, or noted as not used.

TrainingArguments serves many kinds of training. What this program sets itself, or never reaches, may not be dropped
without a note: the writer of the run file would take it for done.
"""

from collections.abc import Mapping
from typing import Any

from expertune.errors import option

# An optimizer that TrainingArguments does not know (see `expertune.train.muon`).
MUON = "muon"

# Read by transformers' own evaluation loop, which the run's evaluation (`expertune.evaluation.held_out`) replaces.
_OF_THE_OTHER_EVALUATION = (
    "batch_eval_metrics",
    "bf16_full_eval",
    "eval_accumulation_steps",
    "eval_use_gather_object",
    "fp16_full_eval",
    "include_for_metrics",
    "label_names",
    "prediction_loss_only",
)

# Of torch's DistributedDataParallel, which averages gradients inside of backward, and of several folders.
_OF_SEVERAL_PROCESSES = (
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "fsdp_config",
    "save_on_each_node",
)

_OF_THE_HUB = ("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token")

_NO_UPLOAD = "a run uploads nothing; when it is finished, `hf upload REPOSITORY OUTPUT_DIR/adapter` does"


def refused_keys(training: Mapping[str, Any]) -> dict[str, str]:
    """Keys that a run file cannot set, or not to such a value, with what the message says after `training.KEY is`.

    Args:
        training: the `training:` section.
    """
    refused = {
        "output_dir": "set by the run itself; use output_dir instead",
        "remove_unused_columns": "set by the run itself; use data instead",
        "resume_from_checkpoint": f"set by the run itself; use {option('resume')} instead",
        "logging_nan_inf_filter": "always off: a loss that is not finite stops the run; remove the key",
        "logging_dir": "no longer an argument of TrainingArguments; set the variable TENSORBOARD_LOGGING_DIR",
    }
    for key in ("fsdp", "deepspeed", "parallelism_config"):
        if training.get(key):
            refused[key] = (
                "for a model that is spread over devices, and each process of a run has all of it; remove the key"
            )
    if training.get("push_to_hub"):
        refused["push_to_hub"] = f"not supported: {_NO_UPLOAD}. Remove the key"
    if training.get("do_train") is False:
        refused["do_train"] = "false, and a run trains; `expertune evaluate RUN_DIR` scores one. Remove the key"
    if training.get("do_predict"):
        refused["do_predict"] = (
            "not supported: task.metric has evaluation examples answered and scored, `expertune generate` answers a "
            "prompt. Remove the key"
        )
    return refused


def unused_keys(training: Mapping[str, Any], on_cpu: bool) -> list[str]:
    """A sentence for each key that is set to something and decides nothing.

    Args:
        training: the `training:` section; its keys have been checked.
        on_cpu: whether the run is on a CPU.
    """
    reasons = dict.fromkeys(_OF_THE_OTHER_EVALUATION, "an evaluation is that of `expertune evaluate`")
    reasons |= dict.fromkeys(
        _OF_SEVERAL_PROCESSES, "gradients of several processes are averaged after backward, and rank 0 writes"
    )
    reasons |= dict.fromkeys(_OF_THE_HUB, _NO_UPLOAD)
    reasons["auto_find_batch_size"] = "a run that is short of memory takes a micro-batch in parts, and stays the same"
    reasons["length_column_name"] = "examples hold no such column; their lengths are counted"
    if on_cpu:
        reasons["fp16"] = "it needs a GPU; quantization.compute_dtype sets the dtype of products"
    notes = [f"training.{key} is not used: {reason}" for key, reason in reasons.items() if training.get(key)]
    for key, default in (("eval_do_concat_batches", True), ("restore_callback_states_from_checkpoint", True)):
        if key in training and training[key] is not default:
            reason = reasons["label_names"] if key.startswith("eval") else "a resumed run is the uninterrupted one"
            notes.append(f"training.{key}: {training[key]} is not used: {reason}")
    if training.get("do_eval") is False and training.get("eval_strategy") not in (None, False, "no"):
        notes.append("training.do_eval: False is not used: training.eval_strategy asks for evaluations")
    if on_cpu and training.get("use_cpu") is False:
        notes.append("training.use_cpu: False is not used: no GPU is found on this machine")
    return notes
