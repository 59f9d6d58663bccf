"""What a plan counts of an objective over answers: both sides of a pair, the reference, answers that are written."""

import dataclasses

import pytest
from trl import GRPOConfig

from expertune.config import parse_config
from expertune.planning import make_plan
from expertune.planning.duration import Lengths
from expertune.planning.passes import GRPO_DEFAULTS, Passes, passes_of
from expertune.planning.table import as_text

from .conftest import TINY_MIXTRAL


def of(objective, training, **sections):
    values = {"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "o", "objective": objective}
    return passes_of(parse_config(values | {"training": training} | sections))


def plan_of(run_of, objective, **sections):
    training = {"per_device_train_batch_size": 256, "max_steps": 10}
    return make_plan(run_of(TINY_MIXTRAL, objective=objective, training=training, **sections), gpu="h100")


def test_pairs_are_two_sequences_and_the_reference_a_forward_more(run_of):
    plans = {name: plan_of(run_of, name) for name in ("sft", "dpo", "orpo", "kto")}
    tokens = {name: made.time.tokens for name, made in plans.items()}
    assert tokens["dpo"] == tokens["orpo"] == 2 * tokens["sft"] == 2 * tokens["kto"]
    seconds = {name: made.time.seconds for name, made in plans.items()}
    assert 2 * seconds["sft"] == pytest.approx(seconds["orpo"], rel=0.02)
    assert seconds["orpo"] < seconds["dpo"] < 2 * seconds["orpo"]
    assert seconds["sft"] < seconds["kto"]  # three forwards more
    assert plans["sft"].memory.peak_bytes < plans["dpo"].memory.peak_bytes
    assert "reference" in plans["dpo"].memory.phases
    assert "reference" not in plans["orpo"].memory.phases
    assert "objective" not in plans["sft"].to_json()


@pytest.mark.parametrize("width", [60, 120])
def test_plan_names_the_objective_and_what_it_computes(run_of, width):
    text = as_text(plan_of(run_of, "dpo"), width)
    assert max(map(len, text.splitlines())) <= width
    text = " ".join(text.split())
    assert "objective dpo: 2 sequences an example, a forward without gradients beside each trained one" in text
    assert "while the reference computes" in text


def test_mean_length_of_a_pair_is_that_of_both_sides(run_of):
    pairs, answers = (
        plan_of(run_of, name).timed(Lengths(100, tokens)).run_time
        for name, tokens in (("orpo", 1000.0), ("sft", 500.0))
    )
    assert pairs.step_seconds == pytest.approx(2 * answers.step_seconds, rel=0.2)


def test_adapter_to_start_from_is_kept_once_more_where_it_is_the_reference():
    assert [of(name, {}, lora={"init_from": "a"}).keeps_start for name in ("dpo", "kto", "orpo", "sft")] == [
        *(True, True),
        *(False, False),
    ]
    assert of("kto", {"loss_type": "apo_zero_unpaired"}).silent == 1
    for lora in ({"init_from": "a"}, {"init": "loftq"}):
        assert of("grpo", {"beta": 0.1}, rewards=["exact-match"], lora=lora).keeps_start
        assert not of("grpo", {}, rewards=["exact-match"], lora=lora).keeps_start


def test_answers_that_a_run_writes_are_counted_by_the_keys_of_trl():
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 64}
    rewards = {"rewards": ["exact-match"]}
    found = of("grpo", training | {"num_generations": 4}, **rewards)
    assert found == Passes(written=64, written_at_once=8, written_for=2, answers=4)
    assert "8 answers of up to 64 tokens written at once" in found.line
    more = of("grpo", training | {"beta": 0.1, "num_iterations": 2, "steps_per_generation": 4}, **rewards)
    assert (more.silent, more.written_at_once, more.written_for, more.answers) == (2, 16, 8, 16)


def test_an_evaluation_of_rewards_is_answers_as_long_as_in_training(run_of):
    def made(longest, **data):
        training = {"per_device_train_batch_size": 8, "max_steps": 10, "max_completion_length": longest}
        sections = {"data": {"train": "a.jsonl", "max_length": 64} | data, "rewards": ["exact-match"]}
        training |= {"eval_strategy": "steps", "eval_steps": 5} if data else {}
        return make_plan(run_of(TINY_MIXTRAL, objective="grpo", training=training, **sections), gpu="h100")

    assert "generation" not in made(32).memory.phases
    short, long = (made(longest, eval="b.jsonl") for longest in (32, 64))
    assert "evaluation" not in short.memory.phases
    caches = [each.memory.phases["generation"]["cache"] for each in (short, long)]
    assert caches[1] / caches[0] == (64 + 64) / (64 + 32)  # 32 prompts at once
    times = [each.timed(Lengths(100, 64.0, 50, 64.0)).run_time.evaluation_seconds for each in (short, long)]
    assert 1.5 < times[1] / times[0] < 2.1


def test_defaults_are_those_of_trl():
    known = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert {name: known[name] for name in GRPO_DEFAULTS} == GRPO_DEFAULTS
