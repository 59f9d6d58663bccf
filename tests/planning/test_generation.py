"""Answers for the task's metric: the cache of keys and values, and what reading the prompts takes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.generation.cache import cache_argument, cached_numbers
from expertune.planning import make_plan
from tests.tiny_models import FAMILIES, tiny_config

DATA = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 320}
TASK = {"metric": "exact-match", "batch_size": 32, "max_new_tokens": 128}


def planned(run_of, model, device="cuda", **sections):
    return make_plan(run_of(model, **{"data": DATA, "task": TASK} | sections), device=device).memory.phases


def numbers_of(folder):
    model = build_meta_model(folder, torch.float32)
    return cached_numbers(model, read_names(model).specs)


def test_answers_hold_keys_and_values_of_prompt_and_answer_in_all_layers(run_of):
    generation = planned(run_of, "mixtral-8x7b-v0.1")["generation"]
    assert generation["cache"] == 32 * (320 + 128) * 32 * 2 * 8 * 128 * 2
    task = TASK | {"batch_size": 1, "max_new_tokens": 524288}
    long_answer = planned(run_of, "mixtral-8x7b-v0.1", task=task)["generation"]
    assert long_answer["cache"] == (320 + 524288) * 32 * 2 * 8 * 128 * 2
    # A token's logits as they are and in float32; a layer's keys and values are copied for each new token.
    assert long_answer["generation"] == 32000 * (2 + 4) + long_answer["cache"] // 32


def test_latent_attention_is_counted_as_it_is_cached(run_of):
    generation = planned(run_of, "deepseek-v2-lite")["generation"]
    assert generation["cache"] == 32 * (320 + 128) * 27 * (512 + 64) * 2


def test_longer_prompts_in_a_larger_batch_take_more(run_of):
    few = planned(run_of, "qwen3-30b-a3b")["generation"]
    more = planned(run_of, "qwen3-30b-a3b", task=TASK | {"batch_size": 64})["generation"]
    assert more["cache"] == 2 * few["cache"]
    assert few["generation"] < more["generation"]


def test_fewer_examples_than_a_batch_of_answers_take_the_memory_of_their_number(run_of):
    few = planned(run_of, "qwen3-30b-a3b", task=TASK | {"rows": 4})
    assert few == planned(run_of, "qwen3-30b-a3b", task=TASK | {"batch_size": 4})
    assert planned(run_of, "qwen3-30b-a3b", task=TASK | {"rows": 64}) == planned(run_of, "qwen3-30b-a3b")


@pytest.mark.parametrize("rows", [None, 100])
def test_where_answers_set_the_peak_smaller_batches_of_them_are_offered(run_of, rows):
    sections = {"lora": {"targets": ["q_proj"]}, "kernels": {"working_set": "128MiB"}}
    run = run_of("qwen3-30b-a3b", data=DATA, task=TASK | {"batch_size": 128, "rows": rows}, **sections)
    plan = make_plan(run, device="cuda")
    assert plan.memory.phase == "generation"
    enough = max(num_bytes for phase, num_bytes in plan.memory.totals.items() if phase != "generation")
    less = make_plan(run, device="cuda", memory=enough)
    assert [change.settings.keys() for change in less.what_to_change] == [{"task.batch_size"}]
    assert less.what_to_change[0].settings["task.batch_size"] < (rows or 128)
    assert less.smallest_peak_bytes <= enough


def test_a_run_without_a_metric_plans_no_generation(run_of):
    assert "generation" not in planned(run_of, "mixtral-8x7b-v0.1", task={})


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_numbers_are_those_that_a_real_forward_leaves_in_the_cache(tmp_path, family):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 6)[None], use_cache=True, **{cache_argument(model): cache})
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held > 0
    assert numbers_of(tmp_path) == held // 5


def test_layers_that_hold_a_state_leave_nothing_for_each_token(tmp_path):
    kinds = ["linear_attention", "full_attention"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "qwen3_next", hidden_size=64, layer_types=kinds, num_hidden_layers=2, **heads, **experts
    )
    config.save_pretrained(tmp_path)
    assert numbers_of(tmp_path) == 2 * 2 * 16


def test_a_family_that_cannot_run_without_values_is_counted_by_its_widths(run_of, tmp_path):
    # It has a cache of its own.
    config = AutoConfig.for_model("minimax", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    config.save_pretrained(tmp_path)
    assert numbers_of(tmp_path) is None
    keys_and_values = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert planned(run_of, tmp_path)["generation"]["cache"] == 32 * (320 + 128) * 3 * keys_and_values * 2


def test_batches_of_answers_shrink_no_further_than_it_lowers_the_peak(run_of):
    sections = {"lora": {"targets": ["q_proj"]}, "kernels": {"working_set": "128MiB"}, "data": DATA}

    def totals(answered):
        run = run_of("qwen3-30b-a3b", task=TASK | {"batch_size": answered}, **sections)
        plan = make_plan(run, device="cuda", memory="1MB")
        return plan.what_to_change, dict(plan.memory.totals)

    changes, _ = totals(128)
    answered = changes[0].settings["task.batch_size"]
    _, with_it = totals(answered)
    _, with_twice = totals(2 * answered)
    others = max(num_bytes for phase, num_bytes in with_it.items() if phase != "generation")
    assert with_it["generation"] <= others < with_twice["generation"]
