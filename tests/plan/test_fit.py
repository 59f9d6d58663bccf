"""Peak memory, the budget, and what to give up."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from expertune.errors import ConfigError, DoesNotFitError
from expertune.plan import make_plan

from .conftest import TUTORIAL_LORA

MIXTRAL = "mixtral-8x7b-v0.1"
HUNGRY = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def memory_of(run, device="cuda"):
    return make_plan(run, device=device).memory


def shown(plan, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(plan.render())
    return capture.get()


def test_what_follows_from_shapes_is_exact(run_of):
    components = memory_of(run_of(MIXTRAL, lora=TUTORIAL_LORA)).components
    assert components["weights"] == 24_483_540_992
    assert components["adapter"] == components["gradients"] == 120_350_720 * 4


def test_an_adapter_in_bfloat16_takes_half(run_of):
    components = memory_of(run_of(MIXTRAL, lora={**TUTORIAL_LORA, "dtype": "bfloat16"})).components
    assert components["adapter"] == 120_350_720 * 2


@pytest.mark.parametrize(
    ("device", "optim", "bytes_per_weight"),
    [
        ("cuda", "adamw_torch", 8),
        ("cuda", "paged_adamw_8bit", 2 * (1 + 4 / 256)),
        ("cuda", "lion_8bit", 1 + 4 / 256),
        ("cuda", "sgd", 0),
        ("cuda", None, 2 * (1 + 4 / 256)),
        ("cpu", "paged_adamw_8bit", 8),
        ("cpu", None, 8),
    ],
)
def test_optimizer_states_by_name_and_device(run_of, device, optim, bytes_per_weight):
    training = {"per_device_train_batch_size": 1, **({"optim": optim} if optim else {})}
    memory = memory_of(run_of(MIXTRAL, lora=TUTORIAL_LORA, training=training), device)
    assert memory.components["optimizer"] == int(120_350_720 * bytes_per_weight)


def test_full_logits_and_checkpointed_inputs_grow_with_tokens(run_of):
    components = memory_of(run_of(MIXTRAL, loss="full")).components
    assert components["logits"] == 320 * 32000 * 14
    assert components["activations"] == 32 * 320 * 4096 * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loss_in_chunks_needs_no_more_for_more_tokens_than_their_hidden_states(run_of, device):
    few, many = (
        memory_of(run_of(MIXTRAL, training={"per_device_train_batch_size": batch}), device) for batch in (16, 32)
    )
    itemsize = 4 if few.components["weights"] > 25e9 else 2  # a CPU without 16-bit products takes float32
    assert many.components["logits"] - few.components["logits"] == 16 * 320 * 4096 * 2 * itemsize
    assert many.components["logits"] < 32 * 320 * 32000 * 4


@pytest.mark.parametrize("training", [{"label_smoothing_factor": 0.1}, {"torch_compile": True}])
def test_settings_that_need_all_logits_are_planned_with_them(run_of, training):
    training = {"per_device_train_batch_size": 1, **training}
    assert memory_of(run_of(MIXTRAL, training=training)).components["logits"] == 320 * 32000 * 14


def test_without_checkpointing_every_layer_keeps_what_one_did(run_of):
    with_it = memory_of(run_of(MIXTRAL)).components
    without = memory_of(run_of(MIXTRAL, training={"per_device_train_batch_size": 1})).components
    assert without["activations"] > 20 * with_it["activations"]
    assert without["working_set"] < with_it["working_set"]


def test_both_names_of_checkpointing_count(run_of):
    new = run_of(MIXTRAL, training={"per_device_train_batch_size": 1, "activation_checkpointing": True})
    assert memory_of(new) == memory_of(run_of(MIXTRAL))


def test_dropout_keeps_copies(run_of):
    plain = memory_of(run_of(MIXTRAL, lora={**TUTORIAL_LORA, "dropout": 0}))
    assert memory_of(run_of(MIXTRAL, lora=TUTORIAL_LORA)).components["working_set"] > plain.components["working_set"]


def test_the_peak_counts_one_moment_only(run_of):
    training = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 32, "gradient_checkpointing": True}
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 1024}
    memory = memory_of(run_of("qwen3-30b-a3b", data=data, training=training))
    components = memory.components
    assert memory.moment == "evaluation"
    always = sum(components[name] for name in ("weights", "adapter", "optimizer", "framework"))
    assert memory.peak_bytes == always + components["evaluation"]
    assert not memory.at_peak("logits")


def test_no_evaluation_rows_no_evaluation_memory(run_of):
    assert memory_of(run_of(MIXTRAL)).components["evaluation"] == 0


# --- the budget -----------------------------------------------------------------------------------------------------


def test_a_run_within_its_budget_fits(run_of):
    plan = make_plan(run_of(MIXTRAL, memory_budget="32GB"), device="cuda")
    assert plan.fits
    assert plan.what_to_change == ()
    assert plan.require_fit() is plan


def test_the_budget_is_the_hosts_memory_on_a_cpu(run_of, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12345))
    plan = make_plan(run_of(MIXTRAL, memory_budget=None), device="cpu")
    assert plan.budget_bytes == 12345
    assert not plan.fits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to ask")
def test_a_plan_for_a_gpu_that_is_not_here_needs_its_size(run_of):
    with pytest.raises(ConfigError, match="set memory_budget"):
        make_plan(run_of(MIXTRAL, memory_budget=None), device="cuda")


def test_what_does_not_fit_is_an_error_that_shows_the_plan_and_what_to_give_up(run_of):
    plan = make_plan(run_of(MIXTRAL, memory_budget="32GB", training=HUNGRY), device="cuda")
    with pytest.raises(DoesNotFitError) as caught:
        plan.require_fit()
    message = str(caught.value)
    assert "frozen weights" in message
    assert "does not fit" in message
    assert "training.per_device_train_batch_size=1" in message


def test_changes_are_offered_cheapest_first_until_the_run_fits(run_of):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 2048}
    training = {**HUNGRY, "per_device_eval_batch_size": 64}
    run = run_of("qwen3-30b-a3b", data=data, training=training, lora={"r": 16}, memory_budget="24GB")
    plan = make_plan(run, device="cuda")
    changed = [line.partition("=")[0] for change in plan.what_to_change for line in change.lines]
    assert changed[:3] == [
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
        "training.gradient_checkpointing",
    ]
    assert {"training.per_device_eval_batch_size", "data.max_length"} <= set(changed)
    assert all(change.saves_bytes > 0 for change in plan.what_to_change)
    assert plan.what_to_change[-1].peak_bytes <= plan.budget_bytes < plan.what_to_change[-2].peak_bytes


def test_a_split_batch_keeps_the_tokens_of_a_step(run_of):
    plan = make_plan(run_of(MIXTRAL, training=HUNGRY, memory_budget="30GB"), device="cuda")
    assert plan.what_to_change[0].lines == [
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=16",
    ]


def test_the_changed_run_has_the_peak_that_was_promised(run_of, tmp_path):
    from expertune.config import load_config

    run = run_of(MIXTRAL, training=HUNGRY, memory_budget="28GB")
    plan = make_plan(run, device="cuda")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run.model_dump()))  # JSON is YAML
    overrides = [line for change in plan.what_to_change for line in change.lines]
    changed = make_plan(load_config(path, overrides), device="cuda")
    assert changed.fits
    assert changed.memory.peak_bytes == plan.what_to_change[-1].peak_bytes


def test_a_device_below_the_frozen_weights_is_told_so(run_of):
    plan = make_plan(run_of(MIXTRAL, memory_budget="16GB"), device="cuda")
    assert "the frozen weights alone take 24.48 GB" in shown(plan, 80)


# --- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(run_of, width):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 2048}
    plan = make_plan(run_of(MIXTRAL, data=data, training=HUNGRY, memory_budget="26GB"), device="cuda")
    text = shown(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for change in plan.what_to_change:
        assert all(line in text for line in change.lines)


def test_json_holds_the_documented_keys(run_of):
    plan = make_plan(run_of(MIXTRAL, lora=TUTORIAL_LORA, memory_budget="20GB"), device="cuda")
    values = json.loads(json.dumps(plan.to_json()))
    assert values["parameters"]["line"] == plan.parameters.line == plan.parameters_line
    assert values["weights"]["frozen_bytes"] == plan.weights.frozen_bytes
    assert values["memory"]["peak_bytes"] == plan.memory.peak_bytes
    assert values["disk"] == {"adapter_bytes": 481_402_880, "download_bytes": 93_405_585_408}
    assert values["fits"] is False
    assert values["what_to_change"][0]["lines"]


def test_a_misspelt_training_argument_is_told_before_anything_is_read(run_of):
    with pytest.raises(ConfigError, match="did you mean per_device_train_batch_size"):
        make_plan(run_of("./nowhere", training={"per_device_train_batchsize": 1}))
