"""When a run takes steps, evaluates and saves: checked before a model is loaded.

Where a run file names evaluation data and no times, the run evaluates before its first step and after its last one.
"""

import math
from collections.abc import Mapping
from typing import Any

from expertune.config import RunConfig
from expertune.errors import ConfigError, DataError
from expertune.evaluation.metrics import METRICS, Figure
from expertune.evaluation.objective_figures import SELECTING
from expertune.text import counted
from expertune.train.arguments import ACCUMULATION, BATCH_SIZE, training_argument

# Schedules that wait for an evaluation.
_EVALUATED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def check_schedule(config: RunConfig) -> None:
    """Refuse a run that evaluates on data or by a metric that it does not have.

    Raises:
        ConfigError: names the key and the fix.
    """
    training = config.training
    if config.data.eval is None:
        for key in _needing_evaluation(training):
            raise ConfigError(
                f"training.{key} is {training[key]!r}, but the run has no evaluation data; set data.eval, or remove "
                "the key"
            )
    best = training.get("metric_for_best_model")
    if best is not None and (name := str(best).removeprefix("eval_")) not in metric_names(config):
        known = ", ".join(metric_names(config))
        more = "" if config.task.metric else "; task.metric adds more"
        raise ConfigError(
            f"training.metric_for_best_model is {best!r}, but this run's evaluations give no {name}; choose one of "
            f"{known}{more}"
        )


def metric_names(config: RunConfig) -> list[str]:
    """What an evaluation of the run can give: `loss`, figures of its objective, and those of its task's metric."""
    return ["loss", *SELECTING.get(config.objective, ()), *(figure.name for figure in _task_figures(config))]


def _task_figures(config: RunConfig) -> tuple[Figure, ...]:
    return METRICS[config.task.metric].figures if config.task.metric else ()


def lower_is_better(config: RunConfig) -> bool:
    """Whether the best checkpoint is the one with the lowest figure of the task; of a loss, transformers knows it."""
    best = str(config.training.get("metric_for_best_model")).removeprefix("eval_")
    return any(figure.name == best and not figure.higher_is_better for figure in _task_figures(config))


def scores_in_training(config: RunConfig) -> bool:
    """Whether evaluations in training have to answer prompts: a figure of the task chooses the best checkpoint."""
    best = config.training.get("metric_for_best_model")
    return str(best).removeprefix("eval_") in {figure.name for figure in _task_figures(config)}


def evaluates_at_ends(config: RunConfig) -> bool:
    """Whether the run evaluates before its first and after its last step because no other time is set."""
    training = config.training
    return config.data.eval is not None and "eval_strategy" not in training and training.get("do_eval") is not False


def require_a_batch(num_examples: int, training: Mapping[str, Any], processes: int = 1) -> None:
    """Refuse training data of which no batch is made.

    Args:
        num_examples: examples of the training data set (packs, with `packing: packed`).
        training: the `training:` section; micro-batches that drop examples are never merged.
        processes: how many share each batch.

    Raises:
        DataError: names the batch size and the fix.
    """
    batch_size = int(training_argument(training, BATCH_SIZE)) * processes
    if num_examples < batch_size and training.get("dataloader_drop_last"):
        raise DataError(
            f"data.train has {counted(num_examples, 'example')}, fewer than training.per_device_train_batch_size "
            f"({batch_size}{f' of {processes} processes' if processes > 1 else ''}), "
            "and training.dataloader_drop_last drops them: no step would be taken; lower the batch size, or drop none"
        )


def require_prompts(num_examples: int, arguments: Any) -> None:
    """Refuse fewer prompts than `objective: grpo` generates answers for at once.

    Args:
        num_examples: prompts of the training data set.
        arguments: TRL's GRPOConfig of the run.

    Raises:
        ConfigError: says how many are wanted, and the fix.
    """
    at_once = int(arguments.generation_batch_size) // int(arguments.num_generations)
    if num_examples < at_once:
        raise ConfigError(
            f"training: answers are generated for {counted(at_once, 'prompt')} at once, and data.train has "
            f"{num_examples}; lower per_device_train_batch_size or gradient_accumulation_steps, or raise "
            "num_generations"
        )


def count_steps(training: Mapping[str, Any], num_examples: int | None, processes: int = 1) -> int | None:
    """How many optimizer steps a run takes; None where that depends on examples that nobody has counted.

    Args:
        training: the run file's `training:` section.
        num_examples: examples of the training data set.
        processes: how many share each batch.
    """
    if (steps := int(training_argument(training, "max_steps"))) >= 1:
        return steps
    if num_examples is None:
        return None
    return math.ceil(
        float(training_argument(training, "num_train_epochs")) * _per_epoch(training, num_examples, processes)
    )


def count_evaluations(config: RunConfig, steps: int, num_examples: int | None, processes: int = 1) -> int:
    """How many evaluations of the loss a run of so many steps takes while it trains; arguments as of `count_steps`."""
    training = config.training
    if evaluates_at_ends(config):
        return 2
    strategy, at_start = training_argument(training, "eval_strategy"), bool(training.get("eval_on_start"))
    delay = float(training_argument(training, "eval_delay") or 0)  # in epochs or in steps, as the strategy is
    if strategy == "epoch" and num_examples is not None:
        epochs = steps / _per_epoch(training, num_examples, processes)
        return at_start + sum(min(epoch, epochs) >= delay for epoch in range(1, math.ceil(epochs) + 1))
    if strategy != "steps":
        return int(at_start)
    every = float(training_argument(training, "eval_steps") or training_argument(training, "logging_steps"))
    every = every if every >= 1 else max(math.ceil(steps * every), 1)
    too_early = max(math.ceil(delay / every) - 1, 0)
    return at_start + max(int(steps // every) - too_early, 0)


def _per_epoch(training: Mapping[str, Any], num_examples: int, processes: int = 1) -> int:
    """Optimizer steps of an epoch."""
    batches = num_examples / (int(training_argument(training, BATCH_SIZE)) * processes)
    batches = math.floor(batches) if training_argument(training, "dataloader_drop_last") else math.ceil(batches)
    return max(math.ceil(batches / int(training_argument(training, ACCUMULATION))), 1)


def checkpoints_at_once(training: Mapping[str, Any], num_examples: int) -> int:
    """The most checkpoints that are in a run directory at one time; one is written before the oldest is removed.

    Args:
        training: the run file's `training:` section.
        num_examples: examples of the training data set.
    """

    def argument(name: str) -> Any:
        return training_argument(training, name)

    num_steps = count_steps(training, num_examples) or 0
    strategy, every = argument("save_strategy"), float(argument("save_steps"))
    if strategy in (False, "no"):
        return 0
    if strategy == "best":
        count = 1  # at least; evaluations decide how many more
    elif strategy == "epoch":
        count = math.ceil(num_steps / _per_epoch(training, num_examples))
    else:
        count = math.ceil(num_steps / (every if every >= 1 else max(math.ceil(num_steps * every), 1)))
    limit = argument("save_total_limit")
    if limit is None or count <= limit:
        return count
    # The newest and the best are both kept, whatever the limit is.
    kept = max(int(limit), 2) if training.get("load_best_model_at_end") else int(limit)
    return min(count, kept + 1)


def _needing_evaluation(training: Mapping[str, Any]) -> list[str]:
    """Keys that are set such that they need evaluation data."""
    needing = {
        "eval_strategy": training.get("eval_strategy") not in (None, False, "no"),
        "eval_on_start": bool(training.get("eval_on_start")),
        "do_eval": bool(training.get("do_eval")),
        "load_best_model_at_end": bool(training.get("load_best_model_at_end")),
        "metric_for_best_model": training.get("metric_for_best_model") is not None,
        "save_strategy": training.get("save_strategy") == "best",
        "lr_scheduler_type": training.get("lr_scheduler_type") in _EVALUATED_SCHEDULES,
    }
    return [key for key, needs in needing.items() if needs]
