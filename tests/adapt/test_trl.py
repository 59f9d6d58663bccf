"""TRL's trainers on an NF4 folder train the experts that their `peft_config` names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import expertune
from expertune.adapt.attach import attach
from expertune.checkpoint.hf_quantizer import as_loaded
from expertune.config import LoraSection
from expertune.errors import ConfigError
from expertune.experts.lora import ExpertsLora
from tests.checkpoint.nf4_folders import quantized
from tests.tiny_models import changed, frozen_bytes

ASSETS = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
SETTINGS = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NF4 folder with a tokenizer."""
    return quantized(ASSETS, tmp_path_factory.mktemp("trl") / "nf4")


def moved(model: Any) -> list[bool]:
    """Of every factor B of the experts, which starts at zero, whether it is something else."""
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertsLora)]
    return [bool(factor.any()) for layer in layers for factor in layer.lora_B["default"].values()]


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_trains_and_saves_the_experts(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = frozen_bytes(model)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), max_length=32, **SETTINGS),
        train_dataset=Dataset.from_list([{"text": "name: The Vaults, eatType: pub"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05),
    )
    trainer.train()
    assert moved(trainer.model)
    assert all(moved(trainer.model))
    names = {name.replace(".base_layer", ""): tensor for name, tensor in frozen_bytes(model).items()}
    assert changed(before, {name: names[name] for name in before}) == []
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    )
    ids, trained = torch.arange(5, 25)[None], trainer.model.eval()
    with torch.no_grad():
        read, truth = again(ids).logits, trained(ids).logits
        with trained.disable_adapter():
            effect = (truth - trained(ids).logits).abs().max()
    # TRL has made the live factors bfloat16; PEFT reads them back as float32.
    assert (read - truth).abs().max() < 0.02 * effect


@pytest.mark.filterwarnings("ignore")
def test_reward_trainer_trains_the_experts_and_the_head(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16)
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(str(tmp_path), max_length=32, **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " good", "rejected": " bad"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]),
    )
    head = trainer.model.score.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    assert all(moved(trainer.model))
    assert not torch.equal(trainer.model.score.modules_to_save["default"].weight, head)


@pytest.mark.filterwarnings("ignore")
def test_attach_before_a_reward_trainer_is_refused_with_the_way(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"MixtralForSequenceClassification is none.*task_type='SEQ_CLS'"):
        attach(as_loaded(model), LoraSection(), "owner/tiny")
