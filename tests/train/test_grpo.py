"""Group relative policy optimization: TRL's loss, with the promises of a run."""

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import expertune
from expertune.config import RewardConfig
from expertune.errors import ConfigError, RewardError
from expertune.objectives.rewards import Reward, Rewards, load_rewards
from expertune.run.record import RunRecord
from expertune.train.oom import OutOfMemory
from expertune.train.promises import Promised

trl = pytest.importorskip("trl")

ASSETS = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
PROMPTS = ["The Vaults is a pub.", "A cheap bar.", "It is a game.", "Is it for the PC?", "Yes.", "No, it is not."]
OVERRIDDEN = {
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_prepare_inputs": ["generation_batch"],
    "_generate_and_score_completions": ["inputs"],
    "_get_train_sampler": ["dataset"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "_send_telemetry": [],
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_private_method_of_trl_has_the_signature_that_was_read(name: str) -> None:
    assert list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)[1:] == OVERRIDDEN[name]


def by_length(completions: list[str], **_: Any) -> list[float]:
    return [len(each) / 10 for each in completions]


def trainer_on(
    model: Any, output_dir: Path, oom: OutOfMemory | None = None, own: list[Reward] | None = None, **arguments: Any
) -> Any:
    from expertune.train.grpo import GroupTrainer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    settings = {
        **{"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        **{"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "gradient_checkpointing": False},
        **{"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"},
    }
    args = trl.GRPOConfig(str(output_dir), **(settings | arguments))
    examples = [
        {"prompt": text, "prompt_ids": tokenizer(text)["input_ids"], "answer": text, "example_ids": [number]}
        for number, text in enumerate(PROMPTS)
    ]
    rewards = own or [Reward("length", 1.0, by_length), *load_rewards([RewardConfig(function="exact-match")], False)]
    return GroupTrainer(model, args, examples, tokenizer, Rewards(rewards), Promised(oom=oom))


def adapted(**lora: Any) -> Any:
    return expertune.attach(expertune.load_model(ASSETS, dtype="float32"), r=4, **lora)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.mark.slow
def test_resumed_in_the_second_epoch_and_between_generations_it_ends_byte_identical(tmp_path: Path) -> None:
    # Answers of a generation last for two steps, which are an epoch: step 4 is the second of the second.
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "steps_per_generation": 4}
    whole = trainer_on(adapted(dropout=0.1), tmp_path, **settings)
    whole.train()
    resumed = trainer_on(adapted(dropout=0.1), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    after = trained(resumed.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in trained(whole.model).items())
    series, again = whole.history.series, resumed.history.series
    assert {name: again[name] for name in series if name != "seconds"} == {
        name: figures for name, figures in series.items() if name != "seconds"
    }
    # Rewards are known where answers were generated, what the loss knows at every step.
    assert [step for step, _ in series["reward"]] == [1, 3]
    assert [step for step, _ in series["kl"]] == list(range(1, 5))
    assert {"rewards/length/mean", "rewards/exact-match/mean", "completions/mean_length", "entropy"} <= series.keys()


def test_loss_is_trls_and_the_reference_is_the_adapter_that_training_starts_from(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_B." in name:
                tensor.normal_(std=0.02)
    before = trained(model)
    ours = trainer_on(model, tmp_path, max_steps=1)
    ours.train()  # after which the adapter is not the reference any more
    inputs = [{"prompt": str(number)} for number in (0, 0, 1, 1)]
    model.train()
    batch = ours._generate_and_score_completions(inputs)
    assert "ref" not in model.peft_config
    start = adapted()
    set_trained(start, before)
    theirs = trl.GRPOTrainer(
        start,
        by_length,
        trl.GRPOConfig(str(tmp_path), num_generations=2, beta=0.1, bf16=False, use_cpu=True, report_to=[]),
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
    )
    with torch.no_grad():  # TRL's reference is the copy that it has made of the starting adapter
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logps, _, _ = theirs._get_per_token_logps_and_entropies(start, ids, mask, batch["completion_ids"].shape[1])
        assert (logps - batch["ref_per_token_logps"]).abs().max() < 1e-5
        set_trained(start, trained(model))
        for trainer in (ours, theirs):
            trainer.current_gradient_accumulation_steps = 1
            trainer.args.steps_per_generation = 1
        losses = [trainer.compute_loss(trainer.model.train(), dict(batch)) for trainer in (ours, theirs)]
    assert abs(losses[0] - losses[1]) < 1e-5
    assert ours.figures.take()["kl"] > 1e-4


def test_generation_without_a_reward_is_an_error_and_a_group_without_one_has_no_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    # With a handler of its own: the default run has pytest's plugin for logs switched off.
    monkeypatch.setattr(logging.getLogger("trl.trainer.grpo_trainer"), "handlers", [handler])
    given = iter([[None, None, 1.0, 2.0], [None] * 4])
    own = [Reward("mine", 1.0, lambda **_: next(given))]
    trainer = trainer_on(adapted(), tmp_path, own=own, max_steps=1, beta=0.0)
    inputs = [{"prompt": str(number)} for number in (0, 0, 1, 1)]
    trainer.model.train()
    trainer._generate_and_score_completions(inputs)
    assert trainer._generated["frac_reward_zero_std"] == [0.5]
    with pytest.raises(RewardError, match=r"^rewards: mine returned None for each of the 4 answers of a generation"):
        trainer._generate_and_score_completions(inputs)
    assert not [line for line in said if "returned None" in line]


@torch.no_grad()
def set_trained(model: Any, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


@pytest.fixture(scope="module")
def run_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("grpo")
    rows = [{"prompt": text, "completion": f"inform(name[{number}])"} for number, text in enumerate(PROMPTS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mine.py").write_text(
        "def short(prompts, completions, **columns):\n"
        "    assert columns['answer'][0].startswith('inform(') and prompts[0].startswith('Question: ')\n"
        "    return [-len(each) for each in completions]\n"
    )
    return {
        "model": str(ASSETS),
        "objective": "grpo",
        "rewards": ["slot-f1", {"function": f"{folder / 'mine.py'}:short", "weight": 0.1}],
        "data": {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl[0:2]")},
        "lora": {"r": 2},
        "training": {
            **{"max_steps": 2, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4},
            **{"logging_steps": 1, "save_steps": 1, "beta": 0.1},
        },
        "task": {"metric": "slot-f1", "max_new_tokens": 4},
        "output_dir": str(folder / "run"),
    }


def test_run_with_rewards_has_them_in_its_record_and_resumes(run_values: dict[str, Any]) -> None:
    run_dir = Path(run_values["output_dir"])
    with pytest.raises(ConfigError, match=r"mine.py:short is Python that the run file names.*--trust-rewards"):
        expertune.finetune(run_values)
    assert not (run_dir / "record.json").exists()
    expertune.finetune(run_values, trust_rewards=True)
    record = RunRecord.load(run_dir)
    assert [step for step, _ in record["train"]["reward"]] == [1, 2]
    assert {"kl", "rewards/slot-f1/mean", "completions/mean_length", "aux_loss"} <= record["train"].keys()
    assert any("TRL adds the router's auxiliary loss" in note and "0.02" in note for note in record["train"]["notes"])
    ((_, loss), *_), ((_, figures), *_) = record["eval"]["loss"], record["eval"]["scores"]
    assert loss == -figures["reward"]
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    for late in ("adapter", "checkpoint-2"):
        shutil.rmtree(run_dir / late)
    expertune.finetune(run_values, resume=True, trust_rewards=True)
    assert (run_dir / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"use_vllm": True}}, "training.use_vllm is of another engine; a run generates with the model"),
        ({"training": {"reward_weights": [1.0]}}, r"training.reward_weights is set with rewards: \[{function"),
        (
            {"training": {"per_device_train_batch_size": 16, "num_generations": 2}},
            "generated for 8 prompts at once, and data.train has 6; lower per_device",
        ),
        (
            {"training": {"num_generations": 3}},
            r"training.num_generations: 8 answers .* no multiple of 3; set per_device_train_batch_size \(now 8\) to 3",
        ),
        (
            {"lora": {"targets": ["experts", "lm_head"]}},
            "would not train an adapter there; leave it out of lora.targets",
        ),
    ],
)
def test_what_goes_with_no_rewards_is_refused_before_loading(
    run_values: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        expertune.finetune(run_values | changes | {"rewards": ["slot-f1"], "output_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_an_answer_to_compare_with_leaves_no_directory_behind(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS))
    values = run_values | {"rewards": ["slot-f1"], "data": {"train": str(tmp_path / "bare.jsonl")}, "task": {}}
    with pytest.raises(RewardError, match=r"bare.jsonl: row 1: the example has no answer"):
        expertune.finetune(values | {"output_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_example_starts_from_the_demos_adapter_and_rewards_its_answers(tmp_path: Path) -> None:
    examples, few = Path(__file__).parents[2] / "examples", "training.per_device_train_batch_size=8"
    before = ["lora.targets=[attention, experts]", "data.eval=null", "task.metric=null", "training.eval_strategy=no"]
    before += ["training.eval_on_start=false", "training.max_steps=4", few, f"output_dir={tmp_path / 'sft'}"]
    expertune.finetune(examples / "demo.yaml", before)
    small = [f"lora.init_from={tmp_path / 'sft' / 'adapter'}", "training.max_steps=2", "training.eval_steps=2", few]
    small += ["data.max_length=256", "training.max_completion_length=8"]
    small += ["data.eval=src/expertune/assets/viggo/viggo-valid.csv[0:4]"]
    small += ["task.rows=4", "task.max_new_tokens=8", "training.beta=0.05", f"output_dir={tmp_path / 'grpo'}"]
    record = expertune.finetune(examples / "grpo.yaml", small).record
    assert [step for step, _ in record["train"]["reward"]] == [1, 2]
    # The reference is the adapter that the run started from.
    assert record["train"]["kl"][0][1] == pytest.approx(0, abs=1e-6)
    assert [step for step, _ in record["eval"]["loss"]] == [0, 2]
