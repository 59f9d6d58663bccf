"""Peak memory, the budget, and what to give up."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from expertune.config import parse_config
from expertune.errors import ConfigError, DoesNotFitError
from expertune.kernels.amounts import scratch_bytes
from expertune.kernels.processor import Processor
from expertune.planning import layer_memory, make_plan
from expertune.planning.devices import Machine
from expertune.planning.table import _Changes

from .conftest import TUTORIAL_LORA

MIXTRAL = "mixtral-8x7b-v0.1"
LONG = {"train": "rows.jsonl", "max_length": 4096}
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
    assert memory.phases["update"]["optimizer"] == int(120_350_720 * bytes_per_weight)


def test_full_logits_and_checkpointed_inputs_grow_with_tokens(run_of):
    components = memory_of(run_of(MIXTRAL, loss="full")).phases["loss"]
    assert components["logits"] == 320 * 32000 * 14
    # A layer's input and what its experts returned, and x @ A of rank 8 for w1, w2 and w3 of two experts a token.
    assert components["activations"] == 32 * 320 * (2 * 4096 * 2 + 2 * 3 * 8 * 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loss_in_chunks_needs_no_more_for_more_tokens_than_their_hidden_states(run_of, device):
    few, many = (
        memory_of(run_of(MIXTRAL, training={"per_device_train_batch_size": batch}), device) for batch in (16, 32)
    )
    itemsize = 4 if few.components["weights"] > 25e9 else 2  # a CPU without 16-bit products takes float32
    few, many = few.phases["loss"]["logits"], many.phases["loss"]["logits"]
    assert many - few == 16 * 320 * 4096 * 2 * itemsize
    assert many < 32 * 320 * 32000 * 4


@pytest.mark.parametrize("training", [{"label_smoothing_factor": 0.1}, {"torch_compile": True}])
def test_settings_that_need_all_logits_are_planned_with_them(run_of, training):
    training = {"per_device_train_batch_size": 1, **training}
    assert memory_of(run_of(MIXTRAL, training=training)).phases["loss"]["logits"] == 320 * 32000 * 14


def test_without_checkpointing_every_layer_keeps_what_one_did(run_of):
    with_it = memory_of(run_of(MIXTRAL)).phases["layer"]
    without = memory_of(run_of(MIXTRAL, training={"per_device_train_batch_size": 1})).phases["layer"]
    assert without["activations"] > 7 * with_it["activations"]
    assert without["working_set"] < with_it["working_set"]


def gpt_oss(folder: Path) -> Path:
    """The config of a family whose attention is eager, of 8 heads."""
    from transformers import GptOssConfig

    GptOssConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_family_with_eager_attention_keeps_the_scores_of_whole_sequences(run_of, tmp_path, device):
    model = gpt_oss(tmp_path)
    short, long = (
        memory_of(
            run_of(
                model,
                data={"train": "a.jsonl", "max_length": 1024 // batch, "packing": "padded"},
                training={"per_device_train_batch_size": batch},
                quantization={"compute_dtype": "bfloat16"},
            ),
            device,
        ).phases["layer"]
        for batch in (2, 1)
    )
    # As many tokens, each with 512 more scores in 8 heads: in float32 for softmax, and in 16 bits.
    assert long["activations"] - short["activations"] == 2 * 8 * 1024 * 512 * (4 + 2)
    assert long["working_set"] > short["working_set"]


def test_eager_attention_has_scores_between_all_tokens_of_sequences_that_are_concatenated(run_of, tmp_path):
    model = gpt_oss(tmp_path)
    padded, concatenated = (
        memory_of(
            run_of(
                model,
                data={"train": "a.jsonl", "max_length": 256, "packing": packing},
                training={"per_device_train_batch_size": 4},
                quantization={"compute_dtype": "bfloat16"},
            ),
            "cpu",
        ).phases["layer"]
        for packing in ("padded", "padding-free")
    )
    assert concatenated["activations"] - padded["activations"] == 2 * 8 * 1024 * 768 * (4 + 2)
    assert concatenated["working_set"] > padded["working_set"]


def test_working_set_of_experts_is_bounded_whatever_the_batch(run_of):
    few, many = (
        memory_of(run_of(MIXTRAL, kernels={"working_set": "64MiB"}, training={"per_device_train_batch_size": batch}))
        for batch in (16, 17)
    )
    grown = many.phases["layer"]["working_set"] - few.phases["layer"]["working_set"]
    rows = 320 * 2 * 4 * 5 * 14336  # what the rows of 320 more tokens would take between the products
    assert 0 < grown < rows / 4


def test_both_names_of_checkpointing_count(run_of):
    new = run_of(MIXTRAL, training={"per_device_train_batch_size": 1, "activation_checkpointing": True})
    assert memory_of(new) == memory_of(run_of(MIXTRAL))


def test_dropout_keeps_copies(run_of):
    plain = memory_of(run_of(MIXTRAL, lora={**TUTORIAL_LORA, "dropout": 0})).phases["layer"]
    assert memory_of(run_of(MIXTRAL, lora=TUTORIAL_LORA)).phases["layer"]["working_set"] > plain["working_set"]


def test_what_layers_on_a_cpu_have_computed_in_is_counted_between_them(run_of):
    training = {"per_device_train_batch_size": 64}
    small, large = (
        memory_of(run_of(MIXTRAL, kernels={"working_set": size}, training=training), "cpu").phases
        for size in ("64MiB", "128MiB")
    )
    for phase in ("loss", "update", "save"):
        assert large[phase]["workspace"] - small[phase]["workspace"] == 2**26
    # While a layer computes its experts' is in the working set.
    assert small["layer"].get("workspace", 0) == large["layer"].get("workspace", 0) < 2**26
    assert "workspace" not in memory_of(run_of(MIXTRAL, training=training)).phases["update"]


def test_what_an_evaluation_on_a_cpu_has_computed_in_is_kept_by_the_steps_after_it(run_of):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 320}
    training = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 4}
    memory = memory_of(run_of(MIXTRAL, data=data, training=training), "cpu")
    alone = memory_of(run_of(MIXTRAL, training=training), "cpu")
    assert memory.phases["save"]["workspace"] == memory.phases["evaluation"]["workspace"]
    assert memory.phases["save"]["workspace"] > 2 * alone.phases["save"]["workspace"]


@pytest.mark.parametrize(("instructions", "in_parts"), [(("avx2", "fma3"), True), (("avx2", "avx512_bf16"), False)])
def test_linears_on_a_cpu_compute_in_float32_beside_tokens_of_16_bits(run_of, monkeypatch, instructions, in_parts):
    monkeypatch.setattr(layer_memory, "processor", lambda: Processor(instructions, threads=1))

    def workspace(dtype, **top):
        training = {"per_device_train_batch_size": 16}
        run = run_of(MIXTRAL, training=training, quantization={"compute_dtype": dtype}, **top)
        return memory_of(run, "cpu").phases["save"]["workspace"]

    tokens, hidden = 16 * 320, 4096
    copies = (2 + 2) * tokens * hidden * 4  # of experts' tokens and their gradient, and of a linear's input and output
    scratch = 0 if in_parts else scratch_bytes(tokens, 2 * 14336)
    assert workspace("bfloat16") - workspace("float32") == copies + scratch
    # Of a head that gives all logits no more than a part is there at once: of 655 MB, with what other parts have given.
    beside = tokens * hidden * 4 if in_parts else 0
    assert workspace("bfloat16", loss="full") - workspace("bfloat16") == beside


def test_the_loss_of_an_adapted_head_holds_its_factor_and_gradient_in_float32(run_of):
    plain, adapted = (
        memory_of(run_of(MIXTRAL, lora={"r": 8, "targets": ["q_proj", *head]})).phases["loss"]["logits"]
        for head in ((), ("lm_head",))
    )
    assert 2 * 8 * 32000 * 4 < adapted - plain < 2 * 8 * 32000 * 4 + 320 * 128 * 4096 * 4


def test_the_peak_counts_one_phase_only(run_of):
    training = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 128, "gradient_checkpointing": True}
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 1024}
    memory = memory_of(run_of("qwen3-30b-a3b", data=data, training=training))
    components = memory.components
    assert memory.phase == "evaluation"
    always = sum(components[name] for name in ("weights", "adapter", "optimizer", "framework", "allocator"))
    assert memory.peak_bytes == always + components["evaluation"]
    assert memory.peak_bytes == memory.totals["evaluation"] == max(memory.totals.values())
    assert "logits" not in components


def test_optimizer_states_are_there_from_the_first_step_and_not_in_the_preflight_check(run_of):
    phases = memory_of(run_of(MIXTRAL, lora=TUTORIAL_LORA)).phases
    assert phases["loss"]["optimizer"] == phases["layer"]["optimizer"] == phases["update"]["optimizer"] > 0
    assert "optimizer" not in phases["preflight"]


def test_the_preflight_checks_loss_and_its_layers_are_not_at_the_same_time(run_of):
    of_layer = memory_of(run_of(MIXTRAL)).phases["preflight"]
    # The base model's and the adapted model's, of 16 tokens for each of 8 experts.
    assert of_layer["logits"] == 128 * 32000 * (2 + 2)
    assert of_layer["working_set"] > 0
    # A large vocabulary, and few gradients.
    run = run_of("qwen3-30b-a3b", quantization={"compute_dtype": "bfloat16"}, lora={"targets": ["attention"]})
    of_loss = memory_of(run, "cpu").phases["preflight"]
    assert of_loss["logits"] == 512 * 151_936 * (2 + 14)
    assert "working_set" not in of_loss


def test_freed_blocks_on_a_cpu_are_of_what_a_run_allocates_again_and_again(run_of):
    sections = {"kernels": {"working_set": "16MiB", "keep": 0}, "lora": {"targets": ["q_proj"]}}
    training = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    plain, stateless, higher = (
        {
            phase: held["allocator"]
            for phase, held in memory_of(run_of(MIXTRAL, training=training | more, **sections), "cpu").phases.items()
        }
        for more in ({}, {"optim": "sgd"}, {"per_device_train_batch_size": 2})
    )
    assert plain == stateless  # the optimizer's states are allocated once
    assert len(set(plain.values())) == 1  # nothing is given back between the phases
    assert max(plain.values()) < max(higher.values())


def test_logits_that_are_mapped_one_by_one_leave_no_freed_blocks(run_of):
    sections = {
        "kernels": {"working_set": "16MiB", "keep": 0},
        "lora": {"targets": ["q_proj"]},
        "data": {"train": "a.jsonl", "max_length": 600},
    }
    in_chunks, at_once = (
        memory_of(run_of(MIXTRAL, loss=loss, **sections), "cpu").phases["loss"] for loss in ("auto", "full")
    )
    assert at_once["logits"] > in_chunks["logits"]
    assert at_once["allocator"] <= in_chunks["allocator"]


def test_no_evaluation_rows_no_evaluation_memory(run_of):
    assert "evaluation" not in memory_of(run_of(MIXTRAL)).phases


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


def test_the_budget_on_a_gpu_is_what_is_free_there_and_what_this_process_has_freed(run_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one that no table has")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 10**9)
    machine = Machine.of(run_of(MIXTRAL, memory_budget=None, quantization={"compute_dtype": "bfloat16"}), "cuda")
    assert machine.budget_bytes == 32 * 10**9


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
    assert "it fits" in message
    assert "training.per_device_train_batch_size=" in message
    assert "training:\n  per_device_train_batch_size: " in message


def test_changes_are_offered_cheapest_first_until_the_run_fits(run_of):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 2048}
    training = {**HUNGRY, "per_device_eval_batch_size": 64}
    run = run_of("qwen3-30b-a3b", data=data, training=training, lora={"r": 16}, memory_budget="10GB")
    plan = make_plan(run, device="cuda")
    changed = [line.partition("=")[0] for change in plan.what_to_change for line in change.lines]
    order = [
        "kernels.working_set",
        "training.per_device_eval_batch_size",
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
        "training.gradient_checkpointing",
        "offload_activations",
        "placement",
        "data.max_length",
        "lora.r",
    ]
    assert set(changed) <= set(order)
    first = {key: changed.index(key) for key in order if key in changed}
    assert first["training.per_device_train_batch_size"] < first["training.gradient_checkpointing"] < first["placement"]
    assert first["training.gradient_checkpointing"] < first["training.per_device_eval_batch_size"]  # by then the peak
    assert first["placement"] < first["lora.r"]
    assert all(change.saves_bytes > 0 for change in plan.what_to_change)
    assert plan.what_to_change[-1].peak_bytes <= plan.budget_bytes < plan.what_to_change[-2].peak_bytes


def test_a_split_batch_keeps_the_tokens_of_a_step(run_of):
    run = run_of(MIXTRAL, training=HUNGRY, memory_budget="29GB", kernels={"working_set": "128MiB"})
    plan = make_plan(run, device="cuda")
    assert plan.what_to_change[0].lines == [
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=16",
    ]


def test_the_changed_run_has_the_peak_that_was_promised(run_of, tmp_path):
    from expertune import load_config

    data = {"train": "rows.jsonl", "max_length": 320, "merge_accumulation": False}
    run = run_of(MIXTRAL, training=HUNGRY, data=data, memory_budget="28GB")
    plan = make_plan(run, device="cuda")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run.model_dump()))  # JSON is YAML
    overrides = [line for change in plan.what_to_change for line in change.lines]
    changed = make_plan(load_config(path, overrides), device="cuda")
    assert changed.fits
    assert changed.memory.peak_bytes == plan.what_to_change[-1].peak_bytes


@pytest.mark.parametrize(("budget", "num_changes"), [("30GB", 2), ("29GB", 2), ("10GB", 1)])
def test_what_is_advised_makes_it_fit_and_nothing_of_it_can_be_left_out(run_of, budget, num_changes):
    run = run_of(MIXTRAL, training=HUNGRY, memory_budget=budget)
    advice = make_plan(run, device="cuda").advice

    def fits(*changes):
        values = run.model_dump()
        for key, value in (pair for change in changes for pair in change.settings.items()):
            section, _, leaf = key.rpartition(".")
            (values[section] if section else values)[leaf] = value
        return make_plan(parse_config(values), device="cuda").fits

    assert fits(*advice.changes)
    assert len(advice.changes) >= num_changes
    for left_out in advice.changes:
        assert not fits(*(change for change in advice.changes if change is not left_out))
    assert all(fits(change) for change in advice.alternatives)


def test_a_model_larger_than_the_hosts_memory_is_to_be_quantized_and_left_on_the_disk(run_of):
    plan = make_plan(run_of(MIXTRAL, placement="auto", memory_budget="16GB"), device="cpu")
    (change,) = plan.what_to_change
    name = Path(plan.model).name
    assert change.settings == {"model": f"{name}-nf4", "placement": "disk"}
    assert change.first == f"expertune quantize {plan.model} {name}-nf4"
    assert change.saves_bytes > 16e9 > change.peak_bytes
    text = " ".join(shown(plan, 120).split())
    assert "With this it fits:" in text
    assert f"once, before it: {change.first}" in text
    assert "data.max_length" not in text  # a sacrifice that would not suffice


def test_a_models_name_in_a_plan_is_no_markup(run_of):
    (change,) = make_plan(run_of(MIXTRAL, placement="auto", memory_budget="16GB"), device="cpu").what_to_change
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(_Changes("", [replace(change, settings={"model": "a[/b]-nf4"})]))
    assert "a[/b]-nf4" in capture.get()


def test_a_device_below_the_frozen_weights_is_told_so(run_of):
    plan = make_plan(run_of(MIXTRAL, memory_budget="3GB"), device="cuda")
    assert not plan.fits
    assert "No change makes it fit. The smallest peak that can be reached is" in " ".join(shown(plan, 120).split())
    smallest = f"{plan.smallest_peak_bytes / 1e9:.2f} GB of 3.00 GB"
    with pytest.raises(
        DoesNotFitError, match=f"smallest peak that can be reached is {smallest}, with .*placement=host"
    ):
        plan.require_fit()


# --- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_the_table_fits_a_terminal_and_nothing_is_cut(run_of, width):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 2048}
    plan = make_plan(run_of(MIXTRAL, data=data, training=HUNGRY, memory_budget="26GB"), device="cuda")
    text = shown(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert Counter("".join(text.split())) == Counter("".join(shown(plan, 1000).split()))
    if width >= 80:
        assert all(line in text for change in plan.what_to_change for line in change.lines)


def test_json_holds_the_documented_keys(run_of):
    plan = make_plan(run_of(MIXTRAL, lora=TUTORIAL_LORA, memory_budget="20GB"), device="cuda")
    values = json.loads(json.dumps(plan.to_json()))
    assert values["parameters"]["line"] == plan.parameters.line
    assert values["weights"]["frozen_bytes"] == plan.weights.frozen_bytes
    assert values["memory"]["peak_bytes"] == plan.memory.peak_bytes
    assert values["disk"] == {
        "adapter_bytes": 481_402_880,
        "download_bytes": 93_405_585_408,
        "nf4_folder_bytes": 24_483_540_992,
        "checkpoint_bytes": 481_402_880 + plan.memory.phases["update"]["optimizer"],
        "checkpoints_kept": None,
    }
    assert values["fits"] is False
    assert values["what_to_change"][0]["lines"]


def test_a_misspelt_training_argument_is_told_before_anything_is_read(run_of):
    with pytest.raises(ConfigError, match="did you mean per_device_train_batch_size"):
        make_plan(run_of("./nowhere", training={"per_device_train_batchsize": 1}))
