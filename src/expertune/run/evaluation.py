"""Scores of a finished run: on its evaluation examples, or on tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

from pydantic import PositiveInt

from expertune.config.arguments import checked
from expertune.data import prepare_examples, settled
from expertune.errors import ConfigError, option
from expertune.evaluation.harness import Harness
from expertune.evaluation.harness_tasks import TaskFiles
from expertune.evaluation.held_out import HeldOut
from expertune.evaluation.metrics import METRICS
from expertune.objectives.log_probs import Reference
from expertune.objectives.rewards import Rewards, load_rewards
from expertune.objectives.units import keeps_start
from expertune.run.beside import write_card
from expertune.run.directory import INITIAL_ADAPTER, require_kept_adapter
from expertune.run.inference import OpenOptions, Run, opened_run, recovery_of
from expertune.run.lock import hold_run_directory
from expertune.run.record import RunRecord
from expertune.run.written import ADAPTER_FOLDER
from expertune.storage import notify_if_it_fails
from expertune.train.arguments import loss_arguments
from expertune.train.oom import Change


class EvaluateOptions(OpenOptions, total=False):
    """The arguments of `open_run`, and of `evaluate` those that go with `tasks`."""

    include_path: str | Path | None
    task_code: bool
    download: bool


_TASK_OPTIONS = ("include_path", "task_code", "download")


@checked
def evaluate(
    run: Run | str | Path,
    rows: PositiveInt | None = None,
    base_only: bool = False,
    tasks: str | Sequence[str] | None = None,
    **options: Unpack[EvaluateOptions],
) -> dict[str, Any]:
    """Loss, and the task's metric where the run has one that is registered here, on the run's evaluation examples.

    With `tasks`, instead of these, tasks of lm-evaluation-harness with the adapter and without it, which the run's
    record then holds as well.

    Args:
        run: a run directory, or a run.
        rows: how many examples the metric, or each task, is taken on; None means what the run file says, or all.
        base_only: score the base model without the adapter.
        tasks: names of tasks, as a list or separated by commas.
        **options: how a run directory is opened, see `open_run`; and with `tasks` `include_path`, a folder of task
            files, `task_code`, which runs the Python that these name, and `download`, which fetches what a task needs
            from the hub.

    Returns:
        `adapter`, `loss` in nats per token (of an objective over answers its own loss, with its `figures`; of rewards,
        if all of them are shipped, minus their mean, with the same), `task` as
        `expertune.evaluation.scoring.score_task` returns it, and `recoveries`: what was changed when memory ran out, as
        in the record. With `tasks`: `adapter`, and `tasks` as the record has it.

    Raises:
        ConfigError: the run has no evaluation examples, or a task cannot be run.
        CheckpointError: see `open_run`; or the adapter that the run's loss compares with has changed.
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    of_tasks = {name: options.pop(name) for name in _TASK_OPTIONS if name in options}  # type: ignore[misc]
    if tasks is not None:
        names = tasks.split(",") if isinstance(tasks, str) else tasks
        named = [name.strip() for name in names if name.strip()]
        files = TaskFiles(named, **of_tasks)  # before a model is loaded
        return _evaluate_tasks(opened_run(run, options), files, rows, base_only)
    if of_tasks:
        raise ConfigError(f"{', '.join(of_tasks)}: of use with {option('tasks', 'NAME')} only")
    if not isinstance(run, Run):
        _require_examples(Path(run), RunRecord.load(run))  # before a model is loaded
    run = opened_run(run, options)
    _require_examples(run.output_dir, run.record)
    if rows is not None and run.config.task.metric is None:
        run.context.notify(f"rows: {rows} decides nothing: the run has no task.metric, and its loss is of all examples")
    data, tokenizer = settled(run.config.data, run.record["data"]["eval"]), run.tokenizer
    with run.context.bars.task("tokenizing", "examples") as progress:
        examples = prepare_examples(data, "eval", tokenizer, progress, run.config.objective)
    result: dict[str, Any] = {"adapter": "none" if base_only else run.adapter}
    step = 0 if base_only else run.steps
    changes: list[Change] = []
    recovery = recovery_of(run, changes)
    held_out = HeldOut(run.config, run.model, run.tokenizer, examples, recovery, run.context.bars)
    held_out.preference, held_out.rewards = _preference(run), _rewards(run)
    if held_out.rewards or run.config.objective != "grpo":
        found = held_out.figures(step, base_only)
        result["loss"] = found.pop("loss")
        if found:
            result["figures"] = found
    metric = run.config.task.metric
    if metric in METRICS:
        result["task"] = held_out.score(step, rows, base_only)
    elif metric:
        run.context.notify(
            f"task.metric: {metric} is not registered in this process, and only the loss is taken; import the module "
            f"that registers it under @metric({metric!r}, ...), from expertune.evaluation.metrics"
        )
    result["recoveries"] = [change.to_json() for change in changes]
    return result


def _require_examples(run_dir: Path, record: RunRecord) -> None:
    data = record.section("config").get("data")
    if isinstance(data, dict) and data.get("eval") is None:
        raise ConfigError(
            f"{run_dir}: the run has no data.eval, and so no examples to evaluate on; {option('tasks', 'TASK')} scores "
            "it on tasks of lm-evaluation-harness"
        )


def _preference(run: Run) -> Any:
    """The run's objective where it is one over answers, with the reference that it was trained with."""
    config = run.config
    if config.objective not in ("dpo", "kto", "orpo"):
        return None
    from expertune.objectives.preference import Preference  # which imports TRL

    if keeps_start(config):
        start = config.lora.init_from or str(run.output_dir / INITIAL_ADAPTER)
        if not Path(start).is_dir():
            raise ConfigError(
                f"{start}: the adapter that the run started from is gone, and the loss of objective: "
                f"{config.objective} compares with it; put it back there"
            )
        begun = run.record.section("inputs").get("init_from") or run.record.section("adapter")["init"]["sha256"]
        require_kept_adapter(Path(start), begun)
        reference = Reference.of_adapter(run.model, start)
    else:
        reference = Reference(run.model, keeps_start=False)
    return Preference(config, run.model, loss_arguments(config.training, config.objective), reference)


def _rewards(run: Run) -> Rewards | None:
    """The run's rewards; None where one is code, which a finished run does not import."""
    configs = run.config.rewards
    if coded := [config.function for config in configs if config.is_code]:
        run.context.notify(f"rewards: {coded[0]} is code, which is not run here: rewards are not taken")
        return None
    return Rewards(load_rewards(configs, trusted=False)) if configs else None


def _evaluate_tasks(run: Run, files: TaskFiles, rows: int | None, base_only: bool) -> dict[str, Any]:
    """Score tasks of the harness, and add the scores to the run's record."""
    harness = Harness(run.model, run.tokenizer, files, run.config.task.batch_size, run.context.notify)
    found: dict[str, dict[str, Any]] = {}
    for which in ["none"] if base_only else ["none", run.adapter]:
        with run.model.disable_adapter() if which == "none" else nullcontext():
            for name, score in harness.scores(rows).items():
                found.setdefault(name, {})[which] = score
    notify_if_it_fails("the scores in record.json", lambda: _record_tasks(run, found), run.context.notify)
    return {"adapter": "none" if base_only else run.adapter, "tasks": found}


def _record_tasks(run: Run, found: dict[str, dict[str, Any]]) -> None:
    with hold_run_directory(run.output_dir):
        record = RunRecord.load(run.output_dir)  # as it is by now
        for name, scores in found.items():
            record.add("tasks", **{name: {**record.section("tasks").get(name, {}), **scores}})
        record.save()
    run.record.values["tasks"] = record.values["tasks"]
    write_card(record.values, run.config, run.output_dir / ADAPTER_FOLDER)
