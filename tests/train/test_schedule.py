"""When a run takes steps and evaluates: what is refused before the model is loaded, and what is done by default."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from expertune import finetune
from expertune.config import parse_config
from expertune.errors import ConfigError, DataError
from expertune.run.record import RunRecord
from expertune.run.signals import Terminated
from expertune.train.callbacks import History
from expertune.train.schedule import check_schedule, evaluates_at_ends


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"max_steps": 0}, "max_steps: .* got 0"),
        ({"max_steps": -3}, "max_steps: .* got -3"),
        ({"num_train_epochs": 0}, "num_train_epochs: .* got 0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs: .* got -1.0"),
    ],
)
def test_train_without_a_step_to_take_is_refused_before_anything_is_written(
    training: dict[str, Any], named: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    rest = {key: value for key, value in run_values["training"].items() if key != "max_steps"}
    with pytest.raises(ConfigError, match=rf"training\.{named}"):
        finetune(parse_config(run_values | {"model": "not/there", "training": rest | training}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps'"),
        ({"eval_on_start": True}, "eval_on_start"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
        ({"save_strategy": "best"}, "save_strategy"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
    ],
)
def test_train_that_evaluates_without_evaluation_rows_is_refused_by_key(training: dict[str, Any], named: str) -> None:
    values = {"model": "m", "data": {"train": "t"}, "output_dir": "o", "training": training}
    with pytest.raises(ConfigError, match=rf"training\.{named}.*data\.eval"):
        check_schedule(parse_config(values))


@pytest.mark.parametrize(
    ("metric", "best", "known"),
    [
        (None, "eval_exact_match", "loss; task.metric adds more"),
        ("exact-match", "slot_f1", "loss, exact_match$"),
        ("slot-f1", "accuracy", "loss, slot_f1, precision, recall, exact_match$"),
    ],
)
def test_train_by_a_metric_that_no_evaluation_gives_is_refused_with_those_there_are(
    metric: str | None, best: str, known: str
) -> None:
    values = {"model": "m", "data": {"train": "t", "eval": "e"}, "output_dir": "o", "task": {"metric": metric}}
    check_schedule(parse_config(values | {"training": {"metric_for_best_model": "eval_loss"}}))
    with pytest.raises(ConfigError, match=rf"metric_for_best_model is '{best}'.*choose one of {known}"):
        check_schedule(parse_config(values | {"training": {"metric_for_best_model": best}}))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, True),
        ({"eval_on_start": False}, True),
        ({"eval_strategy": "no"}, False),
        ({"eval_strategy": False}, False),
        ({"eval_strategy": "epoch"}, False),
        ({"do_eval": False}, False),
    ],
)
def test_what_the_run_file_says_of_evaluations_is_left_as_it_is(training: dict[str, Any], expected: bool) -> None:
    values = {"model": "m", "data": {"train": "t", "eval": "e"}, "output_dir": "o", "training": training}
    assert evaluates_at_ends(parse_config(values)) is expected
    assert not evaluates_at_ends(parse_config(values | {"data": {"train": "t"}}))


def test_train_drops_no_batch_that_is_its_only_one(run_values: dict[str, Any]) -> None:
    training = {"per_device_train_batch_size": 64, "dataloader_drop_last": True, "max_steps": 2}
    with pytest.raises(DataError, match=r"20 examples.*per_device_train_batch_size \(64\).*dataloader_drop_last"):
        finetune(parse_config(run_values | {"training": training}))
    assert not Path(run_values["output_dir"]).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_train_ended_by_a_signal_is_interrupted_in_its_record(
    number: signal.Signals, run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "on_step_end", lambda *_, **__: os.kill(os.getpid(), number))
    with pytest.raises(Terminated) as stop:
        finetune(parse_config(run_values))
    assert stop.value.code == 128 + number
    run = RunRecord.load(run_values["output_dir"])["run"]
    assert (run["status"], run["error"]) == ("interrupted", f"interrupted by {number.name}")
    assert signal.getsignal(number) is signal.SIG_DFL
