"""Adapters that PEFT and transformers put on an NF4 folder and save: stock PEFT and the folder read them."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from expertune.checkpoint.load import LoadedModel
from tests.adapt.conftest import logits_of, stock_peft, train_a_little
from tests.adapt.stock.conftest import by_transformers, experts_of, lora
from tests.checkpoint.nf4_folders import quantized
from tests.families import build
from tests.tiny_models import dequantized, load_tiny, random_rows, save_random

# PEFT asks transformers by a renamed property, and tells that a head among the targets is copied into the file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


SAVED = {
    "plain": lora(),
    "down alone": lora(target_modules=["w2", "v_proj"], alpha_pattern={"w2": 3}),
    "scales and ranks": lora(use_rslora=True, lora_dropout=0.1),
    "with a head of its own": lora(target_modules="all-linear", modules_to_save=["lm_head"]),
    "with the router": lora(target_modules=["gate", "down_proj"]),
    "with embeddings": lora(
        lora_alpha=7, target_modules=["embed_tokens", "down_proj"], rank_pattern={"embed_tokens": 6}
    ),
}


@pytest.mark.parametrize("what", SAVED)
def test_a_saved_adapter_is_what_stock_peft_and_an_nf4_folder_read(
    what: str, model: PreTrainedModel, loaded: LoadedModel, mixtral: Path, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    found = get_peft_model(model, copy.deepcopy(SAVED[what]))
    train_a_little(found)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "modules_to_save.default" in name:
                parameter.mul_(1.5)
    found.save_pretrained(tmp_path)
    truth = logits_of(found, ids)
    again = logits_of(PeftModel.from_pretrained(by_transformers(nf4), tmp_path), ids)
    assert torch.allclose(again, truth, rtol=1e-5, atol=1e-5)
    # The same 4-bit weights, as 16-bit models have them, under PEFT alone.
    assert torch.allclose(logits_of(stock_peft(dequantized(loaded, mixtral), tmp_path), ids), truth, atol=1e-4)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".experts." in name for name in names)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 12}, {"r": 2}], ids=str)
def test_a_stack_and_an_embedding_saved_together_load_in_stock_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    """Where the file's r is that of gate and up together, an embedding's factors are filled up to it too."""
    source = save_random(tmp_path / "source", build.tiny_config("gpt_oss"))
    folder = quantized(source, tmp_path / "nf4")
    targets = ["embed_tokens", "gate_up_proj"]
    found = get_peft_model(by_transformers(folder), lora(target_modules=targets, **settings))
    train_a_little(found)
    found.save_pretrained(tmp_path / "adapter")
    ids = random_rows(2, 12)
    base = dequantized(load_tiny(folder), source)
    for again in (
        PeftModel.from_pretrained(by_transformers(folder), tmp_path / "adapter"),
        stock_peft(base, tmp_path / "adapter"),
    ):
        assert torch.allclose(logits_of(again, ids), logits_of(found, ids), atol=1e-4)


def test_an_adapter_saved_without_a_task_type_loads_by_its_auto_mapping(
    model: PreTrainedModel, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    found = get_peft_model(model, lora(task_type=None))
    train_a_little(found)
    found.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(nf4)}
    assert config["auto_mapping"]["base_model_class"] == "MixtralForCausalLM"
    path.write_text(json.dumps(config), encoding="utf-8")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(logits_of(again, ids), logits_of(found, ids), atol=1e-5)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter of this transformers asks for PEFT {MIN_PEFT_VERSION}, whatever the model",
)
def test_transformers_own_add_adapter_trains_and_saves_the_experts(
    model: PreTrainedModel, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    model.add_adapter(lora())
    train_a_little(model)
    model.save_pretrained(tmp_path)
    again = by_transformers(nf4)
    again.load_adapter(str(tmp_path))
    assert len(experts_of(again)) == 2
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
