"""How many of a step's micro-batches run as one."""

import pytest
from transformers import AutoConfig, MixtralForCausalLM

from expertune.planning import MicroBatch, make_plan
from expertune.planning.plan import Started
from tests.tiny_models import tiny_config

from .test_fit import LONG, MIXTRAL, memory_of, shown

ACCUMULATING = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}


def micro_batch(run, **arguments):
    return make_plan(run, device="cuda", **arguments).micro_batch


def test_a_step_that_fits_at_once_is_one_micro_batch(run_of):
    plan = make_plan(run_of(MIXTRAL, training=ACCUMULATING), device="cuda")
    assert plan.micro_batch == MicroBatch(rows=8, accumulation=1, merged=8)
    at_once = {"per_device_train_batch_size": 8, "gradient_checkpointing": True}
    assert plan.memory == memory_of(run_of(MIXTRAL, training=at_once))
    assert plan.to_json()["micro_batch"] == {"rows": 8, "accumulation": 1, "merged": 8, "reason": None}
    assert "8 examples a step, run as 1 x 8 in place of 8 x 1" in shown(plan, 80)


def test_memory_decides_how_many_are_merged_and_a_tenth_of_it_stays_free(run_of):
    run = run_of(MIXTRAL, data=LONG, training=ACCUMULATING)
    of_four = ACCUMULATING | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    four = run_of(MIXTRAL, data=LONG | {"merge_accumulation": False}, training=of_four)
    peak = memory_of(four).peak_bytes
    enough = micro_batch(run.model_copy(update={"memory_budget": int(peak / 0.9) + 2}))
    assert (enough.rows, enough.accumulation, enough.merged) == (4, 2, 4)
    assert enough.reason.startswith("8 examples at once would take ")
    short = micro_batch(run.model_copy(update={"memory_budget": int(peak / 0.9) - 2}))
    assert (short.rows, short.accumulation, short.merged) == (2, 4, 2)


def test_only_divisors_of_the_accumulation_are_merged(run_of):
    six = run_of(MIXTRAL, data=LONG, training=ACCUMULATING | {"gradient_accumulation_steps": 6})
    of_four = ACCUMULATING | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    four = run_of(MIXTRAL, data=LONG, training=of_four)
    budget = int(memory_of(four).peak_bytes / 0.9) + 2
    assert micro_batch(six.model_copy(update={"memory_budget": budget})).merged == 3


def test_on_a_cpu_merging_ends_where_products_gain_nothing(run_of, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    run = run_of(tmp_path, data={"train": "rows.jsonl", "max_length": 4096}, training=ACCUMULATING)
    chosen = make_plan(run, device="cpu").micro_batch
    assert (chosen.rows, chosen.accumulation, chosen.merged) == (2, 4, 2)
    assert "beyond 8192 tokens" in chosen.reason
    assert make_plan(run, device="cpu", started=Started(8)).micro_batch.merged == 8
    assert micro_batch(run).merged == 8


def test_a_run_that_fits_only_as_it_is_written_is_left_so(run_of):
    apart = memory_of(run_of(MIXTRAL, data=LONG | {"merge_accumulation": False}, training=ACCUMULATING))
    run = run_of(MIXTRAL, data=LONG, training=ACCUMULATING, memory_budget=apart.peak_bytes)
    plan = make_plan(run, device="cuda")
    assert plan.fits
    assert plan.micro_batch.merged == 1
    assert plan.memory == apart


def test_a_resumed_run_merges_as_many_as_before_or_fewer_where_memory_has_gone(run_of):
    run = run_of(MIXTRAL, training=ACCUMULATING)
    assert micro_batch(run, started=Started(2)) == MicroBatch(2, 4, 2, "as the run started")
    assert micro_batch(run, started=Started(1)) == MicroBatch(1, 8, 1, "as the run started")
    peak = make_plan(run, device="cuda").memory.peak_bytes
    assert micro_batch(run.model_copy(update={"memory_budget": peak}), started=Started(8)).merged == 8
    fewer = micro_batch(run.model_copy(update={"memory_budget": peak - 1}), started=Started(8))
    assert fewer.merged < 8
    assert "the run started with 8, and continues to rounding" in fewer.reason


def test_noise_on_embeddings_is_of_each_sequence_and_keeps_no_micro_batches_apart(run_of, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    training = ACCUMULATING | {"neftune_noise_alpha": 5}
    assert micro_batch(run_of(tmp_path, data={"train": "rows.jsonl"}, training=training)).merged > 1


def test_a_run_without_accumulation_says_nothing_of_it(run_of):
    plan = make_plan(run_of(MIXTRAL), device="cuda")
    assert plan.micro_batch == MicroBatch(rows=1, accumulation=1)
    assert "examples a step" not in shown(plan, 80)


@pytest.mark.parametrize(
    ("data", "training", "reason"),
    [
        ({"merge_accumulation": False}, {}, "merge_accumulation"),
        ({"packing": "padded"}, {}, "packing=padded"),
        ({}, {"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({}, {"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({}, {"optim": "adalomo"}, "steps at every micro-batch"),
    ],
)
def test_settings_under_which_a_larger_micro_batch_is_another_step_keep_them_apart(
    run_of, tmp_path, data, training, reason
):
    tiny_config().save_pretrained(tmp_path)
    chosen = micro_batch(run_of(tmp_path, data={"train": "rows.jsonl"} | data, training=ACCUMULATING | training))
    assert (chosen.rows, chosen.accumulation, chosen.merged) == (1, 8, 1)
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {}, None),
        ("qwen3_moe", {}, None),
        ("deepseek_v3", {}, None),
        ("mixtral", {"output_router_logits": True}, None),  # which is taken over the whole step
        ("mixtral", {"sliding_window": 16}, "by itself"),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
    ],
)
def test_models_whose_rows_or_loss_depend_on_the_batch_keep_micro_batches_apart(
    run_of, tmp_path, family, changes, reason
):
    tiny_config(family, head_dim=16, **changes).save_pretrained(tmp_path)
    chosen = micro_batch(run_of(tmp_path, training=ACCUMULATING))
    assert chosen.merged == (1 if reason else 8)
    assert (reason or "") in (chosen.reason or "")


@pytest.mark.parametrize(("kind", "apart"), [("linear_attention", True), ("full_attention", False)])
def test_layers_that_carry_a_state_from_row_to_row_keep_micro_batches_apart(run_of, tmp_path, kind, apart):
    AutoConfig.for_model("minimax", num_hidden_layers=2, layer_types=[kind, "full_attention"]).save_pretrained(tmp_path)
    chosen = micro_batch(run_of(tmp_path, training=ACCUMULATING, lora={"targets": ["experts"]}))
    assert (chosen.merged == 1) == apart


def test_a_model_that_cannot_normalize_by_the_step_keeps_micro_batches_apart(run_of, tmp_path, monkeypatch):
    tiny_config().save_pretrained(tmp_path)
    monkeypatch.setattr(MixtralForCausalLM, "accepts_loss_kwargs", False, raising=False)
    assert "not over the step's" in micro_batch(run_of(tmp_path, training=ACCUMULATING)).reason
