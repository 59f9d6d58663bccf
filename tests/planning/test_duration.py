"""How long a whole run takes: its steps, evaluations and answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from expertune import load_config, plan
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import parse_config
from expertune.data import prepare_examples
from expertune.data.examples import Tally
from expertune.planning import make_plan
from expertune.planning.duration import Lengths
from expertune.planning.examples import read_lengths
from expertune.train.schedule import count_evaluations, count_steps

from .conftest import TINY_MIXTRAL

MIXTRAL = "mixtral-8x7b-v0.1"
STEPS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 500}


def test_time_of_a_run_is_its_steps_times_the_time_of_one(run_of):
    made = make_plan(run_of(MIXTRAL, training=STEPS, data={"train": "a.jsonl", "packing": "padded"}), gpu="h100")
    run = made.timed(Lengths(None, 1024)).run_time
    assert run.steps == 500
    assert run.seconds == pytest.approx(500 * made.time.seconds)
    assert run.line.startswith("500 steps, about ")
    assert made.timed(Lengths(None, 1024)).to_json()["run"]["seconds"] == run.seconds


def test_evaluations_and_answers_are_counted_and_shorter_examples_take_less(run_of):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 1024}
    training = STEPS | {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True}
    task = {"metric": "exact-match", "rows": 64, "max_new_tokens": 100}
    made = make_plan(run_of(MIXTRAL, training=training, data=data, task=task), gpu="h100")
    long = made.timed(Lengths(2000, 1024, 200, 1024)).run_time
    short = made.timed(Lengths(2000, 100, 200, 100)).run_time
    assert (long.evaluations, short.evaluations) == (11, 11)
    assert 0 < short.evaluation_seconds < long.evaluation_seconds
    assert 0 < short.step_seconds < long.step_seconds
    assert short.answer_seconds > 2 * 2 * 100 * made.pace.cost.of_batch(32, 1).forward_seconds()
    assert "11 evaluations" in long.line
    unknown = made.timed(Lengths(None, 1024, None, 1024, is_bound=True)).run_time
    assert "besides loading, evaluations and the preflight check; less where examples are shorter" in unknown.line
    assert long.line.endswith("besides loading and the preflight check")


@pytest.mark.parametrize(
    ("training", "num_examples", "steps"),
    [
        ({"max_steps": 500}, None, 500),
        ({}, None, None),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}, 100, 26),
        ({"per_device_train_batch_size": 32, "num_train_epochs": 2, "dataloader_drop_last": True}, 100, 6),
    ],
)
def test_steps_of_a_run(training, num_examples, steps):
    assert count_steps(training, num_examples) == steps


@pytest.mark.parametrize(
    ("training", "evaluations"),
    [
        ({}, 2),
        ({"eval_strategy": "steps", "eval_steps": 30}, 3),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "eval_on_start": True}, 5),
        ({"eval_strategy": "epoch", "per_device_train_batch_size": 4}, 4),
        ({"eval_strategy": "no"}, 0),
        ({"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 50}, 6),
        ({"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 101, "eval_on_start": True}, 1),
        ({"eval_strategy": "epoch", "per_device_train_batch_size": 3, "eval_delay": 2.5}, 1),
        ({"eval_strategy": "epoch", "per_device_train_batch_size": 4, "eval_delay": 2}, 3),
    ],
)
def test_evaluations_of_a_run_of_a_hundred_steps(training, evaluations):
    data = {"train": "a.jsonl", "eval": "b.jsonl"}
    config = parse_config({"model": "m", "data": data, "training": training, "output_dir": "x"})
    assert count_evaluations(config, 100, 100) == evaluations


def test_examples_are_tokenized_where_they_and_the_tokenizer_are_here_and_else_counted_by_slices(tmp_path):
    rows = [{"prompt": "What is the capital of Malta?", "completion": "Valletta."}] * 30
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": f"{tmp_path}/rows.jsonl[0:20]", "eval": f"{tmp_path}/rows.jsonl[20:]"}
    values = {"model": str(TINY_MIXTRAL), "data": data, "output_dir": "x"}
    lengths = read_lengths(parse_config(values))
    assert (lengths.num_rows, lengths.num_eval_rows, lengths.is_bound) == (20, 10, False)
    assert 10 < lengths.tokens < 40
    on_hub = values | {"model": "owner/name", "data": {"train": "owner/rows[0:800]", "max_length": 320}}
    assert read_lengths(parse_config(on_hub)) == Lengths(800, 320, 0, 320, is_bound=True)
    nowhere = values | {"data": {"train": "nowhere.jsonl"}}
    assert read_lengths(parse_config(nowhere)).num_rows is None


@pytest.mark.parametrize("source", ["nowhere.jsonl", "{folder}/rows.jsonl[0:99]"])
def test_a_plan_of_examples_that_a_run_would_stop_at_says_so(source, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Ada."}\n')
    data = {"train": source.format(folder=tmp_path)}
    made = plan({"model": str(TINY_MIXTRAL), "data": data, "output_dir": "x"})
    assert "a run would stop at this: " in made.notes[-1]
    assert Path(data["train"]).name.partition("[")[0] in made.notes[-1]
    assert made.notes[-1] in made.to_json()["notes"]


@pytest.mark.parametrize("of_a_length", [1, 200])
def test_of_a_source_of_thousands_a_sample_from_all_over_it_is_tokenized(of_a_length, tmp_path, monkeypatch):
    """Lengths that grow along the file, and lengths that take turns from one example to the next."""
    rows = [{"prompt": "Who?", "completion": "Ada. " * (1 + index // of_a_length % 20)} for index in range(4000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": f"{tmp_path}/rows.jsonl", "eval": f"{tmp_path}/rows.jsonl[0:2048]", "max_length": 512}
    config = parse_config({"model": str(TINY_MIXTRAL), "data": data, "output_dir": "x"})
    tokenizer, tokenized = load_tokenizer(TINY_MIXTRAL), []
    whole = prepare_examples(config.data, "train", tokenizer).report
    tally = Tally.add
    monkeypatch.setattr(Tally, "add", lambda self, example: (tokenized.append(example.place), tally(self, example)))
    found = read_lengths(config)
    assert (found.num_rows, found.num_eval_rows, found.is_sampled) == (4000, 2048, True)
    assert len(tokenized) == 2 * 1024
    assert found.tokens == pytest.approx(whole["num_tokens"] / 4000, rel=0.015)


def test_steps_that_follow_from_a_sample_are_said_to_be_about_so_many(run_of):
    sampled = Lengths(4000, 100, is_sampled=True)
    epochs = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
    by_epochs = make_plan(run_of(MIXTRAL, training=epochs), gpu="h100")
    assert by_epochs.timed(sampled).run_time.line.startswith("about 1,000 steps, about ")
    assert by_epochs.timed(sampled).to_json()["run"]["is_sampled"] is True
    assert by_epochs.timed(replace(sampled, is_sampled=False)).run_time.line.startswith("1,000 steps, about ")
    by_steps = make_plan(run_of(MIXTRAL, training=STEPS), gpu="h100").timed(sampled).run_time
    assert by_steps.line.startswith("500 steps, about ")


def test_the_plan_of_the_demo_says_how_long_it_takes():
    made = plan(load_config("examples/demo.yaml"))
    assert made.run_time.steps == 320
    assert made.run_time.evaluations == 3
    alone = replace(made.run_time, was_busy=False)
    assert alone.line.startswith("about 320 steps, at least ")
    assert alone.line.endswith("a model this small can take several times as long")
    beside_others = replace(made.run_time, was_busy=True)
    assert beside_others.line.startswith("about 320 steps, about "), "it may take less, too"


def test_of_less_than_half_a_second_no_number_is_said(run_of):
    made = make_plan(run_of(MIXTRAL, training=STEPS), gpu="h100").timed(Lengths(8, 64))
    short = replace(made.run_time, steps=2, step_seconds=0.01, evaluations=1, evaluation_seconds=0.2)
    assert short.line.startswith("2 steps, under a second (under a second of steps, under a second of 1 evaluation)")
    assert replace(short, is_least=True).line.startswith("2 steps, seconds (")
