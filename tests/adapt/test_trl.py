"""TRL's trainers, as they are, on attached models, and on an NF4 folder with the experts that `peft_config` names."""

import importlib
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
from expertune.errors import ConfigError, ExportError
from expertune.experts.lora import ExpertsLora
from tests.checkpoint.nf4_folders import quantized
from tests.tiny_models import changed, frozen_bytes

ASSETS = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
PROMPT, ANSWER = "name: The Vaults, eatType: pub", " inform(name[The Vaults], eatType[pub])"
ROWS: dict[str, list[dict[str, Any]]] = {
    "SFT": [{"text": PROMPT + ANSWER}] * 8,
    "KTO": [{"prompt": PROMPT, "completion": ANSWER[: 9 * cut], "label": cut > 1} for cut in (1, 2, 3, 4)] * 2,
    **dict.fromkeys(("DPO", "CPO", "ORPO"), [{"prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER[:9]}] * 8),
    **dict.fromkeys(("RLOO", "GRPO"), [{"prompt": PROMPT}] * 8),
}
# What each takes besides; without a number, a trainer that compares with a reference does so by itself.
DRAWN = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "KTO": {"per_device_train_batch_size": 4},
    "RLOO": DRAWN | {"beta": 0.05},
    "GRPO": DRAWN | {"beta": 0.05},
}
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


def trainer_of(name: str, model: Any, output_dir: Path, **arguments: Any) -> Any:
    """TRL's trainer of this name, as a script of a user's own makes it."""
    trl = pytest.importorskip("trl")
    where: Any = trl
    if name in ("CPO", "ORPO"):
        where = importlib.import_module(f"trl.experimental.{name.lower()}")
    args = getattr(where, f"{name}Config")(str(output_dir), **SETTINGS, **ARGUMENTS.get(name, {}), **arguments)
    reward = {"reward_funcs": lambda completions, **_: [float(len(each) % 7) for each in completions]}
    return getattr(where, f"{name}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS[name]),
        processing_class=AutoTokenizer.from_pretrained(ASSETS),
        **(reward if name in ("RLOO", "GRPO") else {}),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["DPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name != "DPO")]
)
def test_trl_trains_an_attached_model_as_it_is_with_float32_adapters(name: str, tmp_path: Path) -> None:
    model = expertune.attach(expertune.load_model(ASSETS, dtype="float32"), r=4)
    before = frozen_bytes(model)
    trainer = trainer_of(name, model, tmp_path, save_strategy="no")
    trainer.train()
    assert all(moved(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    after = frozen_bytes(model)
    base = {name: tensor for name, tensor in before.items() if ".lora_" not in name}
    assert changed(base, {name: after[name] for name in base}) == []
    # The reference is a second adapter, with the weights that the first one had: B is zero.
    assert list(model.peft_config) == ["default", *(["ref"] if name in ("DPO", "KTO", "RLOO", "GRPO") else [])]
    layers = [layer for layer in model.modules() if isinstance(layer, ExpertsLora) and "ref" in layer.lora_B]
    assert not any(factor.any() for layer in layers for factor in layer.lora_B["ref"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_dpo_trainer_ends_with_the_same_adapter(tmp_path: Path) -> None:
    def trained(checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        trainer = trainer_of("DPO", expertune.attach(expertune.load_model(ASSETS, "float32")), tmp_path, save_steps=1)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}

    whole = trained()
    resumed = trained(tmp_path / "checkpoint-1")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


@pytest.mark.filterwarnings("ignore")
def test_what_trl_cannot_do_on_an_attached_model_is_one_error_with_the_way(tmp_path: Path) -> None:
    model = expertune.attach(expertune.load_model(ASSETS, dtype="float32"), targets=["lm_head", "experts"])
    with pytest.raises(ValueError, match=r"adapter to `lm_head` is not supported.*Remove `'lm_head'` from"):
        trainer_of("DPO", model, tmp_path)
    with pytest.raises(ExportError, match=r"merge into 16-bit weights.*leave its `use_vllm` off"):
        model.merge_adapter()  # which GRPOTrainer calls before vLLM generates
    with pytest.raises(ConfigError, match="Start a process for each GPU with torchrun"):
        model._replicate_for_data_parallel()


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
