"""Adapters of runs and of stock PEFT on an NF4 folder, by every call of PEFT and transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.meta import auto_class
from expertune.errors import CheckpointError
from tests.adapt.conftest import FolderOf, adapt, logits_of, train_a_little
from tests.adapt.stock.conftest import by_transformers, experts_of, linears_of, lora
from tests.checkpoint.nf4_folders import quantized
from tests.families import build
from tests.tiny_models import dequantized, load_tiny, random_rows, save_random

# PEFT asks transformers by a renamed property, and tells that a head among the targets is copied into the file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def with_load_adapter(nf4: Path, adapter: Path) -> nn.Module:
    model = by_transformers(nf4)
    report = model.load_adapter(str(adapter))
    assert report.missing_keys | report.unexpected_keys == set()
    return model


def as_second(nf4: Path, adapter: Path) -> nn.Module:
    model = get_peft_model(by_transformers(nf4), lora(r=2))
    model.load_adapter(str(adapter), "second")
    model.set_adapter("second")
    return model


def into_one_with_other_scales(nf4: Path, adapter: Path) -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]
    model = get_peft_model(by_transformers(nf4), lora(lora_alpha=64, target_modules=targets))
    model.load_adapter(str(adapter), "default")
    return model


CALLS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "PeftModel.from_pretrained": lambda nf4, adapter: PeftModel.from_pretrained(by_transformers(nf4), adapter),
    "from_pretrained, low_cpu_mem_usage": lambda nf4, adapter: PeftModel.from_pretrained(
        by_transformers(nf4), adapter, low_cpu_mem_usage=True
    ),
    "from_pretrained, is_trainable": lambda nf4, adapter: PeftModel.from_pretrained(
        by_transformers(nf4), adapter, is_trainable=True
    ),
    "AutoPeftModelForCausalLM": lambda nf4, adapter: AutoPeftModelForCausalLM.from_pretrained(
        adapter, dtype=torch.float32
    ),
    "AutoModelForCausalLM": lambda nf4, adapter: AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32),
    "PreTrainedModel.load_adapter": with_load_adapter,
    "PeftModel.load_adapter": as_second,
    "PeftModel.load_adapter, an adapter that is there": into_one_with_other_scales,
    "a model of load_model": lambda nf4, adapter: PeftModel.from_pretrained(load_tiny(nf4).model, adapter),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_on_an_nf4_folder_gives_the_adapters_true_logits(call: str, nf4: Path, written: Any) -> None:
    adapter, ids, truth = written("mixtral", "attention", "experts")
    assert torch.equal(logits_of(CALLS[call](nf4, adapter), ids), truth)


@pytest.mark.parametrize("targets", [["experts"], ["w1"], ["w2", "router"], ["lm_head", "w3"]], ids="-".join)
def test_from_pretrained_adapts_what_the_adapter_holds_and_nothing_else(
    targets: list[str], nf4: Path, written: Any
) -> None:
    adapter, ids, truth = written("mixtral", *targets)
    loaded = PeftModel.from_pretrained(by_transformers(nf4), adapter)
    assert torch.equal(logits_of(loaded, ids), truth)
    assert linears_of(loaded) == {"router": {"gate"}, "lm_head": {"lm_head"}}.get(targets[0], set()) | (
        {"gate"} if "router" in targets else set()
    )


def test_experts_without_the_shared_ones_of_the_same_names_stay_without(nf4_of: FolderOf, written: Any) -> None:
    adapter, ids, truth = written("qwen2_moe", "experts")
    loaded = PeftModel.from_pretrained(by_transformers(nf4_of("qwen2_moe")), adapter)
    assert torch.equal(logits_of(loaded, ids), truth)
    assert linears_of(loaded) == set()


@pytest.mark.parametrize("settings", [{"rslora": True}, {"rank_pattern": {"w1": 2}, "alpha_pattern": {"w2": 5.0}}])
def test_from_pretrained_takes_scales_and_ranks_from_the_files(
    settings: dict[str, Any], nf4: Path, written: Any
) -> None:
    adapter, ids, truth = written("mixtral", "experts", "q_proj", **settings)
    assert torch.allclose(
        logits_of(PeftModel.from_pretrained(by_transformers(nf4), adapter), ids), truth, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h", "granitemoe"])
def test_families_that_lay_experts_out_otherwise_keep_them(kind: str, tmp_path: Path) -> None:
    folder = quantized(save_random(tmp_path / "source", build.tiny_config(kind)), tmp_path / "nf4")
    live = adapt(load_tiny(folder), targets=["experts"])
    train_a_little(live)
    live.save_pretrained(str(tmp_path / "adapter"))
    ids = random_rows(2, 12)
    base = auto_class(live.config).from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(
        logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter"), ids), logits_of(live, ids), atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any")  # PEFT of its own pattern
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any")
def test_an_adapter_that_stock_peft_made_over_16_bits_loads_on_the_nf4_folder(
    loaded: LoadedModel, mixtral: Path, model: PreTrainedModel, tmp_path: Path, ids: Tensor
) -> None:
    stock = get_peft_model(dequantized(loaded, mixtral), lora(target_modules=["w1", "w2", "w3", "gate", "o_proj"]))
    train_a_little(stock)
    stock.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(model, tmp_path)
    assert torch.allclose(logits_of(found, ids), logits_of(stock, ids), rtol=1e-4, atol=1e-4)
    assert set(experts_of(found)) == {f"base_model.model.model.layers.{layer}.mlp.experts" for layer in (0, 1)}


def test_an_adapter_on_selected_experts_is_refused_with_what_loads_it(model: PreTrainedModel, written: Any) -> None:
    layers = {f"model.layers.{layer}.mlp.experts": [2, 0] for layer in range(2)}
    folder, *_ = written("mixtral", "experts", experts={"share": 0.3, "layers": layers})
    with pytest.raises(CheckpointError, match=r"has no adapter.*\(lora.experts\) is loaded by expertune.load_adapter"):
        PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize(
    ("left", "told"), [(["w1", "w2", "w3", "q_proj"], "k_proj"), (["q_proj", "k_proj"], "experts")]
)
def test_a_config_that_names_fewer_modules_than_the_file_holds_is_refused(
    left: list[str], told: str, model: PreTrainedModel, written: Any, tmp_path: Path
) -> None:
    adapter, _, _ = written("mixtral", "q_proj", "k_proj", "experts")
    shutil.copytree(adapter, tmp_path / "narrow")
    path = tmp_path / "narrow" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": left}))
    with pytest.raises(CheckpointError, match=rf"holds an adapter of \S+{told}, which its config does not name"):
        PeftModel.from_pretrained(model, str(tmp_path / "narrow"))


def test_an_adapter_of_other_layers_is_refused(model: PreTrainedModel, written: Any) -> None:
    adapter, _, _ = written("mixtral", "experts")
    found = get_peft_model(model, lora(target_modules=["w1"]))
    train_a_little(found)
    with pytest.raises(CheckpointError, match="has been trained with others"):
        found.load_adapter(str(adapter), "default")


def test_an_embeddings_factors_are_read_at_the_files_scale_into_an_adapter_of_another(
    model: PreTrainedModel, nf4: Path, tmp_path: Path, ids: Tensor
) -> None:
    targets = ["embed_tokens", "w2"]
    found = get_peft_model(model, lora(lora_alpha=12, target_modules=targets))
    train_a_little(found)
    found.save_pretrained(tmp_path)
    other = get_peft_model(by_transformers(nf4), lora(lora_alpha=64, target_modules=targets))
    other.load_adapter(str(tmp_path), "default")
    assert torch.allclose(logits_of(other, ids), logits_of(found, ids), atol=1e-5)
