"""The promises on TRL's trainers, the series of a run, and transformers' private methods that the mixin relies on."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from expertune import finetune
from expertune.adapt.attach import attach
from expertune.checkpoint.hf_quantizer import as_loaded
from expertune.config import LoraSection, parse_config
from expertune.errors import CheckpointError, ConfigError
from expertune.experts.module import Nf4Experts
from expertune.experts.replay import with_replay
from expertune.run.record import RunRecord
from expertune.train.callbacks import History
from expertune.train.checkpoints import list_checkpoints, verify
from expertune.train.expert_load import LOAD_FIGURES, ExpertLoad
from expertune.train.promises import Promises
from expertune.train.saving import WholeCheckpoints
from tests.checkpoint.nf4_folders import quantized

ASSETS = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
SERIES = sorted([*LOAD_FIGURES, "grad_norm", "learning_rate", "loss", "seconds", "tokens"])

SIGNATURES = {
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_get_grad_norm": ["model", "grad_norm"],
    "_save_checkpoint": ["model", "trial"],
    "_get_output_dir": ["trial"],
    "_save_rng_state": ["output_dir"],
    "_load_best_model": [],
}
# What calls it, and what comes after it there.
CALLS = {
    "_run_epoch": ("_inner_training_loop", "if self.control.should_training_stop:"),
    "_get_grad_norm": ("_run_epoch", "self.optimizer.step()"),
    "_save_checkpoint": ("_maybe_log_save_evaluate", "self.callback_handler.on_save("),
    "_get_output_dir": ("_save_checkpoint", "self.save_model(output_dir, _internal_call=True)"),
    "_save_rng_state": ("_save_checkpoint", "self.state.save_to_json(os.path.join(output_dir, TRAINER_STATE_NAME))"),
    "_load_best_model": ("_finalize_training", "self.callback_handler.on_train_end("),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_private_method_of_transformers_is_called_as_it_was_read(name: str) -> None:
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == SIGNATURES[name]
    caller, then = CALLS[name]
    _, called, rest = inspect.getsource(getattr(Trainer, caller)).partition(f"self.{name}(")
    assert called
    assert then in rest


def test_mixin_overrides_no_private_method_of_transformers_but_these() -> None:
    own = vars(Promises) | vars(WholeCheckpoints)
    private = {name for name in own if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} == set(SIGNATURES)


def test_resumed_run_has_every_series_of_the_uninterrupted_one(
    run_values: dict[str, Any], whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    whole = RunRecord.load(run_dir)["train"]
    for late in ("adapter", "checkpoint-9"):
        shutil.rmtree(run_dir / late)
    finetune(parse_config(run_values), resume=True)
    resumed = RunRecord.load(run_dir)["train"]
    for name in SERIES:
        assert [step for step, _ in resumed[name]] == list(range(1, 10))
        if name != "seconds":
            assert resumed[name] == whole[name], name
    assert [rate for _, rate in whole["learning_rate"][:4]] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 6 / 7])
    assert all(1 < imbalance < 4 for _, imbalance in whole["expert_imbalance"])
    by_expert = whole["expert_tokens"]
    assert resumed["expert_tokens"] == by_expert
    assert by_expert["steps"] == [[step, step] for step in range(1, 10)]
    for of_layer in by_expert["counts"].values():  # two experts for each token
        assert [sum(of_step) for of_step in of_layer] == [2 * tokens for _, tokens in whole["tokens"]]
    steps = [[of_layer[place] for of_layer in by_expert["counts"].values()] for place in range(9)]
    assert [[step + 1, max(map(max, of_step))] for step, of_step in enumerate(steps)] == whole["expert_tokens_most"]
    assert [[step + 1, min(map(min, of_step))] for step, of_step in enumerate(steps)] == whole["expert_tokens_least"]
    state = (run_dir / "checkpoint-9" / "trainer_state.json").read_text(encoding="utf-8")
    assert '"learning_rate"' in state


def test_history_of_a_checkpoint_that_holds_losses_alone_is_continued() -> None:
    history = History.from_state({"args": {}, "attributes": {"losses": [[1, 2.5]], "tokens": 8, "seconds": 0.5}})
    assert history.losses == history.series["loss"] == [[1, 2.5]]
    assert history.tokens_per_second == 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NF4 folder with a tokenizer."""
    return quantized(ASSETS, tmp_path_factory.mktemp("trl") / "nf4")


def test_imbalance_is_the_busiest_experts_share_over_an_even_one(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    layers = [module for module in model.modules() if isinstance(module, Nf4Experts)]
    routed: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: routed.append(inputs[1]))
    load = ExpertLoad()
    with load.watching(model):
        model(torch.arange(5, 45)[None])
        model.eval()(torch.arange(50, 60)[None])  # an evaluation is not counted
    trained = [torch.bincount(index.flatten(), minlength=layers[0].num_experts) for index in routed[: len(layers)]]
    expected = sum(float(counts.max() / counts.float().mean()) for counts in trained) / len(layers)
    unused = sum(int((counts == 0).sum()) for counts in trained) / sum(map(len, trained))
    most, least = max(int(counts.max()) for counts in trained), min(int(counts.min()) for counts in trained)
    figures, tokens = load.take()
    assert figures == pytest.approx(dict(zip(LOAD_FIGURES, [expected, 100 * unused, most, least], strict=True)))
    assert list(tokens.values()) == [counts.tolist() for counts in trained]
    assert expected > 1
    assert load.take() == ({}, {})
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(with_replay(None))
    with load.watching(model):
        model(torch.arange(5, 45)[None], labels=torch.arange(5, 45)[None]).loss.backward()
    assert load.take()[1] == tokens  # what is computed again is not counted again


def trl_trainer(kind: str, folder: Path, run_dir: Path) -> Any:
    """One of TRL's trainers with the promises: four steps, a checkpoint after each two, an evaluation at the end.

    For supervised fine-tuning the adapter is attached first, so that it comes back from a checkpoint in its own dtype.
    """
    trl = pytest.importorskip("trl")
    kept = type("Kept", (Promises, getattr(trl, f"{kind}Trainer")), {})
    examples = [{"prompt": f"{n} plus 1 is", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(8)]
    if kind == "SFT":
        examples = [{"prompt": each["prompt"], "completion": each["chosen"]} for each in examples]
    settings = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1e-2}
    plain = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": [], "per_device_train_batch_size": 2}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05)
    if kind == "SFT":
        lora = LoraSection(r=4, dropout=0.05, targets=["attention", "experts"])
        model, peft_config = attach(as_loaded(model), lora, "owner/tiny"), None
    return kept(
        model,
        args=getattr(trl, f"{kind}Config")(str(run_dir), max_length=32, **settings, **plain),
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(examples[:2]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainer_of_trl_keeps_the_promises(kind: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = trl_trainer(kind, folder, tmp_path / "whole")
    whole.train()
    for checkpoint in list_checkpoints(tmp_path / "whole"):
        verify(checkpoint)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoint-4" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])

    torch.manual_seed(1)
    resumed = trl_trainer(kind, folder, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)

    assert sorted(resumed.history.series) == SERIES
    for name in SERIES:
        assert [step for step, _ in resumed.history.series[name]] == [1, 2, 3, 4], name
    assert [step for step, _ in resumed.history.eval_losses] == [4]
    for checkpoint in list_checkpoints(tmp_path / "run"):
        verify(checkpoint)
    if kind == "DPO":  # PEFT reads a stock adapter back in float32, where TRL had made it bfloat16
        return
    for name in set(SERIES) - {"seconds"}:
        assert resumed.history.series[name] == whole.history.series[name], name
    assert resumed.history.eval_losses == whole.history.eval_losses
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        files = [tmp_path / run / "checkpoint-4" / name for run in ("whole", "run")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.filterwarnings("ignore")
def test_resume_without_a_whole_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from"):
        trl_trainer("SFT", folder, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore")
def test_trainer_that_knows_of_one_process_is_refused_in_several(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match=r"one of 2 processes.*promised=Promised\(ranks=ranks\)"):
        trl_trainer("SFT", folder, tmp_path)
