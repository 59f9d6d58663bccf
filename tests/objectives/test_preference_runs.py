"""Runs over pairs and labeled answers: what they record, that they resume to the byte, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import expertune
from expertune import finetune, load_config
from expertune.config import parse_config
from expertune.config.origin import Origin
from expertune.errors import CheckpointError, ConfigError
from expertune.objectives.units import keeps_start
from expertune.run.record import RunRecord
from tests.train.scarce import Scarce

pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {n} plus {n + 1}?", "chosen": f"It is {2 * n + 1}.", "rejected": f"{n} and {n + 1}."}
        for n in range(14)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def values(objective: str, model: Path, pairs: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Four steps of four examples, a checkpoint after two."""
    training = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "seed": 3}
    return {
        "model": str(model),
        "objective": objective,
        "data": {"train": f"{pairs}[0:10]", "eval": f"{pairs}[10:14]", "max_length": 64},
        "lora": {"r": 4, "targets": ["attention", "experts", "lm_head"], **changes.pop("lora", {})},
        "training": training | changes.pop("training", {}),
        "output_dir": str(output_dir),
        **changes,
    }


def series_of(record: RunRecord) -> dict[str, list[list[float]]]:
    return {name: found for name, found in record["train"].items() if "/" in name or name in ("loss", "kl", "nll_loss")}


@pytest.mark.parametrize(
    "objective", ["dpo", pytest.param("kto", marks=pytest.mark.slow), pytest.param("orpo", marks=pytest.mark.slow)]
)
def test_run_over_answers_records_rewards_and_resumes_to_the_same_bytes(
    objective: str, small_mixtral: Path, pairs_file: Path, tmp_path: Path
) -> None:
    config = values(objective, small_mixtral, pairs_file, tmp_path / "run")
    run = finetune(config)
    record, adapter = run.record, (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    whole = series_of(record)
    assert whole.keys() >= REWARDS
    assert all([step for step, _ in found] == [1, 2, 3, 4] for found in whole.values())
    assert [step for step, _ in record["eval"]["loss"]] == [0, 4]
    (_, before), (_, after) = record["eval"]["scores"]
    assert before.keys() >= REWARDS
    assert after["rewards/margins"] > before["rewards/margins"]
    if objective == "dpo":
        assert whole["loss"][0][1] == pytest.approx(0.6931, abs=1e-4)
        assert before["rewards/margins"] == 0
    scored = expertune.evaluate(run)
    assert scored["loss"] == record["eval"]["after"]
    assert scored["figures"] == after

    for late in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / late)
    resumed = finetune(config, resume=True)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert series_of(resumed.record) == whole
    assert resumed.record["eval"]["scores"] == record["eval"]["scores"]


@pytest.mark.slow
def test_dpo_from_an_adapter_compares_with_that_adapter(small_mixtral: Path, pairs_file: Path, tmp_path: Path) -> None:
    first = values("orpo", small_mixtral, pairs_file, tmp_path / "first", training={"max_steps": 1})
    finetune(first)
    start = tmp_path / "first" / "adapter"
    config = values("dpo", small_mixtral, pairs_file, tmp_path / "run", training={"max_steps": 2, "save_steps": 1})
    config["lora"] = {"init_from": str(start)}
    run = finetune(config)
    assert run.record["train"]["loss"][0][1] == pytest.approx(0.6931, abs=1e-4)
    (_, before), (_, after) = run.record["eval"]["scores"]
    assert before["rewards/chosen"] == 0 != after["rewards/chosen"]
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert expertune.evaluate(tmp_path / "run")["figures"] == after
    # The base model with the same reference, and not with itself.
    of_base = expertune.evaluate(tmp_path / "run", base_only=True)["figures"]
    assert of_base["rewards/chosen"] != 0
    assert of_base["logps/chosen"] != before["logps/chosen"]

    for late in ("adapter", "checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / late)
    finetune(config, resume=True)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    shutil.copy(tmp_path / "run" / "adapter" / "adapter_model.safetensors", start)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: has changed, and the run began with it"):
        expertune.evaluate(tmp_path / "run")
    shutil.rmtree(start)
    with pytest.raises(ConfigError, match=r"the adapter that the run started from is gone.*put it back there"):
        expertune.evaluate(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["dpo", pytest.param("kto", marks=pytest.mark.slow), pytest.param("orpo", marks=pytest.mark.slow)]
)
def test_example_learns_from_the_demos_adapter_or_the_base_model(
    name: str, small_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of four examples on a smaller model; the adapter is as the demo makes it, and changes the model."""
    monkeypatch.chdir(ROOT)
    config = load_config(f"examples/{name}.yaml")
    assert config.data.eval
    sources = {
        part: source.split("[")[0] for part, source in (("train", config.data.train), ("eval", config.data.eval))
    }
    small = [
        f"data.train={sources['train']}[0:4]",
        f"data.eval={sources['eval']}[0:2]",
        f"output_dir={tmp_path / 'run'}",
    ]
    small += [f"model={small_mixtral}", "training.max_steps=2", "training.per_device_train_batch_size=4"]
    if config.lora.init_from:
        assert config.lora.init_from == f"{load_config('examples/demo.yaml').output_dir}/adapter"
        small.append(f"lora.init_from={demo_adapter(small_mixtral, tmp_path / 'start')}")
    record = finetune(f"examples/{name}.yaml", small).record
    (_, before), (_, after) = record["eval"]["scores"]
    assert after["rewards/margins"] != before["rewards/margins"]
    if name != "orpo":  # whose reward has no reference
        assert before["rewards/chosen"] == before["rewards/rejected"] == 0
    if name == "dpo":
        assert record["train"]["loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)


def demo_adapter(base: Path, folder: Path) -> Path:
    """An adapter of the demo's ranks and targets, with random factors."""
    lora = load_config("examples/demo.yaml").lora.model_dump(exclude_unset=True)
    model = expertune.attach(expertune.load_model(base), **lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                factor.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_step_is_the_same_in_parts_merged_and_accumulated(
    small_mixtral: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Four pairs, as one micro-batch and as two that are kept apart; the last step has two pairs."""
    whole = finetune(values("dpo", small_mixtral, pairs_file, tmp_path / "whole"))
    apart = values(
        "dpo",
        small_mixtral,
        pairs_file,
        tmp_path / "apart",
        training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    apart["data"] |= {"merge_accumulation": False}
    accumulated = finetune(apart)
    for name, found in series_of(whole.record).items():
        assert [figure for _, figure in series_of(accumulated.record)[name]] == pytest.approx(
            [figure for _, figure in found], rel=2e-3, abs=2e-4
        ), name


@pytest.mark.parametrize(
    ("objective", "lora", "kept"),
    [
        ("dpo", {}, False),
        ("dpo", {"init": "loftq"}, True),
        ("kto", {"init_from": "a"}, True),
        ("orpo", {"init_from": "a"}, False),
    ],
)
def test_factors_that_training_starts_with_are_kept_where_they_are_the_reference(
    objective: str, lora: dict[str, str], kept: bool
) -> None:
    config = {"model": "m", "output_dir": "o", "objective": objective, "data": {"train": "x"}, "lora": lora}
    assert keeps_start(parse_config(config)) is kept


@pytest.mark.slow
def test_adapter_that_begins_as_a_correction_is_its_own_reference(
    small_mixtral: Path, pairs_file: Path, tmp_path: Path
) -> None:
    training = {"max_steps": 2, "save_steps": 2}
    config = values("dpo", small_mixtral, pairs_file, tmp_path / "run", training=training, lora={"init": "loftq"})
    record = finetune(config).record
    assert record["adapter"]["init"]["how"] == "loftq"
    (_, before), (_, after) = record["eval"]["scores"]
    assert before["rewards/chosen"] == before["rewards/rejected"] == 0 != after["rewards/chosen"]
    assert record["eval"]["loss"][0][1] == record["train"]["loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_pairs_stay_whole_where_memory_runs_out(
    small_mixtral: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = values("dpo", small_mixtral, pairs_file, tmp_path / "run")
    whole = finetune(config)
    scarce = Scarce(most_tokens=60).install(monkeypatch)  # of four pairs; any one pair fits
    recovered = finetune(config | {"output_dir": str(tmp_path / "recovered")})
    assert scarce.num_failures
    (change, *_) = recovered.record["train"]["recoveries"]
    assert change["change"].startswith("micro-batches of at most ")
    for name, found in series_of(whole.record).items():
        expected = [figure for _, figure in found]
        assert [figure for _, figure in series_of(recovered.record)[name]] == pytest.approx(
            expected, rel=2e-3, abs=2e-4
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "grpo", "rewards": "slot-f1", "loss": "full"}, "loss: full is of the other objectives"),
        ({"data": {"train": "x", "packing": "packed"}}, "data.packing: packed is of supervised fine-tuning"),
        ({"data": {"train": "x", "train_on": "all"}}, "data.train_on: all has no meaning with objective: dpo"),
        ({"lora": {"dropout": 0.1}}, r"lora.dropout: 0.1 would do nothing.*training.disable_dropout: false"),
        (
            {"distributed": {"experts": "parallel"}},
            "parallel is of supervised fine-tuning, and with objective: dpo each process has all experts; remove",
        ),
        (
            {"objective": "kto", "training": {"per_device_train_batch_size": 1}},
            r"KL term pairs prompts.*set 2 or more",
        ),
    ],
)
def test_what_does_not_go_with_answers_is_refused_in_the_run_file(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": "m", "output_dir": "o", "objective": "dpo", "data": {"train": "x"}} | changes)


def test_several_processes_are_refused_for_grpo_by_the_plan_that_a_run_begins_with() -> None:
    values = {"model": "not-there", "output_dir": "o", "objective": "grpo", "data": {"train": "x"}}
    with pytest.raises(ConfigError, match="objective: grpo runs in one process, and 2 were asked for; start one"):
        expertune.plan(values | {"rewards": ["slot-f1"]}, devices=2, memory="8GB")


def test_several_processes_each_with_all_experts_are_planned_for_answers(small_mixtral: Path, pairs_file: Path) -> None:
    ranks = expertune.plan(values("dpo", small_mixtral, pairs_file, Path("o")), devices=2, memory="8GB").ranks
    assert ranks is not None
    assert [mode.distribution.mode for mode in ranks.modes] == ["replicate"]


@pytest.mark.parametrize(
    ("objective", "key", "value", "message"),
    [
        ("sft", "beta", 0.1, "training.beta is not an argument of TrainingArguments"),
        ("dpo", "bta", 0.1, "training.bta is not an argument of DPOConfig; did you mean beta?"),
        ("dpo", "beta", "much", "training.beta: has to be"),
        ("dpo", "max_length", 64, "training.max_length is set with data.max_length"),
        ("kto", "sync_ref_model", True, "training.sync_ref_model is of a reference that moves"),
        ("orpo", "model_init_kwargs", {"dtype": "auto"}, "training.model_init_kwargs is of a model that TRL loads"),
        ("dpo", "loss_type", "sigmod", "training.loss_type: dpo has no loss 'sigmod'; did you mean sigmoid?"),
        ("dpo", "loss_type", ["exo_pair"], "exo_pair needs training.label_smoothing above 0"),
        ("dpo", "f_divergence_type", "kl", "training.f_divergence_type: there is no 'kl'"),
        ("kto", "beta", 0, "training.beta: 0 leaves nothing of the loss"),
        ("dpo", "label_smoothing", 0.1, "training.label_smoothing: only the losses exo_pair, robust.* read it"),
        ("dpo", "discopop_tau", 0.1, "training.discopop_tau: only the losses discopop read it"),
        ("dpo", "f_alpha_divergence_coef", 0.1, "only f_divergence_type: alpha_divergence reads it"),
        ("grpo", "data_seed", 4, "training.data_seed is not used: TRL draws prompts by training.seed"),
        ("kto", "loss_type", "sigmoid", "training.loss_type: kto has no loss 'sigmoid'"),
        ("dpo", "loss_type", [], "training.loss_type: no loss is named"),
        (
            "orpo",
            "train_sampling_strategy",
            "group_by_length",
            "is group_by_length, which is of supervised",
        ),
        ("grpo", "loss_type", "gspo", "training.loss_type: grpo has no loss 'gspo'"),
        ("grpo", "num_iterations", 0, "training.num_iterations: has to be at least 1"),
        ("grpo", "max_completion_length", None, "training.max_completion_length is empty; set a whole number"),
        ("grpo", "max_completion_length", 0, "training.max_completion_length: has to be at least 1"),
        ("grpo", "num_generations", None, "training.num_generations is empty"),
        ("grpo", "num_generations", 0, "training.num_generations: has to be at least 2"),
        ("grpo", "temperature", 0, "training.temperature: has to be above 0"),
        ("grpo", "generation_kwargs", {"num_beams": 2}, "training.generation_kwargs is setting num_beams"),
    ],
)
def test_arguments_are_those_of_trl_and_of_use(objective: Any, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expertune.config.check_training_arguments({key: value}, Origin("run.yaml"), objective)
