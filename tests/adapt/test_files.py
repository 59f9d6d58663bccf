"""An adapter's files: what is in them, that plain PEFT computes the same from them, and that they come back whole."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from expertune.adapt.live import LiveAdapter
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.load import LoadedModel
from tests.adapt.conftest import (
    CONFIG,
    EVERYTHING,
    W1,
    WEIGHTS,
    Load,
    Stock,
    adapt,
    adopt,
    config_of,
    logits_of,
    stock_peft,
    train_a_little,
)
from tests.families import build
from tests.tiny_models import dequantized, load_tiny, save_random, stock_model


def test_file_holds_a_pair_for_every_projection_of_every_expert_and_nothing_else(saved: Path) -> None:
    layers = [f"base_model.model.model.layers.{layer}" for layer in range(2)]
    modules = [f"{layer}.self_attn.{leaf}_proj" for layer in layers for leaf in "qkvo"]
    modules += [f"{at}.block_sparse_moe.experts.{e}.w{w}" for at in layers for e in range(4) for w in (1, 2, 3)]
    modules += ["base_model.model.lm_head"]
    expected = {f"{module}.lora_{factor}.weight" for module in modules for factor in "AB"}
    tensors = load_file(saved / WEIGHTS)
    assert set(tensors) == expected
    assert tensors[W1].shape == (4, 64)
    assert tensors[W1.replace("lora_A", "lora_B")].shape == (128, 4)
    assert tensors[W1.replace("w1", "w2")].shape == (4, 128)


def test_config_is_in_the_words_of_the_checkpoint_with_dropout_zero(loaded: LoadedModel, tmp_path: Path) -> None:
    adapt(loaded, dropout=0.3, targets=[*EVERYTHING, "router"]).save_pretrained(str(tmp_path))
    config = config_of(tmp_path)
    assert config["target_modules"] == [
        "gate", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"
    ]  # fmt: skip
    assert config["lora_dropout"] == 0
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 4, "owner/tiny")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_same_adapter_gives_the_same_files(loaded: LoadedModel, tmp_path: Path) -> None:
    model = adapt(loaded)
    for name in ("one", "other"):
        model.save_pretrained(str(tmp_path / name))
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [CONFIG, WEIGHTS]


def test_bfloat16_adapter_is_saved_as_such(loaded: LoadedModel, tmp_path: Path) -> None:
    adapt(loaded, dtype="bfloat16").save_pretrained(str(tmp_path))
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}


READABLE: dict[str, dict[str, Any]] = {
    "attention, experts and head": {},
    "experts alone": {"targets": ["experts"]},
    "w2 alone": {"targets": ["w2"]},
    "the router too": {"targets": [*EVERYTHING, "router"]},
    "the router alone": {"targets": ["router"]},
    "a rank for q_proj": {"rank_pattern": {"q_proj": 2}},
    "an alpha for q_proj": {"alpha_pattern": {"q_proj": 2}},
    "rank-stabilized": {"rslora": True},
    "rank-stabilized with a rank for q_proj": {"rslora": True, "rank_pattern": {"q_proj": 2}},
    "a rank for w2": {"rank_pattern": {"w2": 2}},
    "an alpha for w2": {"alpha_pattern": {"w2": 2}},
    "one rank for all experts": {"rank_pattern": {"w1": 2, "w2": 2, "w3": 2}},
    "another rank for w1 and w3": {"rank_pattern": {"w1": 6, "w3": 6}},
    "another alpha for w1 and w3": {"alpha_pattern": {"w1": 2, "w3": 2}},
    "ranks of w1 and w3 that differ and scales that do not": {
        "rank_pattern": {"w1": 2, "w3": 6},
        "alpha_pattern": {"w1": 4, "w3": 12},
    },
    "w1 without w3": {"targets": ["w1"]},
    "w1 and w3 without w2": {"targets": ["attention", "w1", "w3"]},
    "a rank for w1 alone": {"rank_pattern": {"w1": 2}},
    "an alpha for w1 alone": {"alpha_pattern": {"w1": 2}},
    "a larger rank for q_proj, without w1": {"targets": ["attention", "w2", "w3"], "rank_pattern": {"q_proj": 12}},
    "a rank for one layer's w2": {"rank_pattern": {r"layers\.1\..*w2": 2}},
    "rank-stabilized with a rank for w1 and w3": {"rslora": True, "rank_pattern": {"w1": 2, "w3": 2}},
}


class Written(NamedTuple):
    """A model with an adapter, trained a little, and the folder that it was saved to."""

    model: ExpertPeftModel
    folder: Path


def write(loaded: LoadedModel, folder: Path, **lora: Any) -> Written:
    model = adapt(loaded, **lora)
    train_a_little(model)
    model.save_pretrained(str(folder))
    return Written(model, folder)


@pytest.fixture(scope="module", params=READABLE)
def written(request: pytest.FixtureRequest, load: Load, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(load(), tmp_path_factory.mktemp("written"), **READABLE[request.param])


def assert_stock_peft_agrees(base: PreTrainedModel, written: Written, ids: Tensor) -> None:
    without, ours = logits_of(base, ids), logits_of(written.model, ids)
    assert (ours - without).abs().max() > 0.1
    assert written.model.stock_layout().refusal is None
    torch.testing.assert_close(logits_of(stock_peft(base, written.folder), ids), ours, rtol=0, atol=1e-5)


def test_stock_peft_computes_the_same_logits(written: Written, stock: Stock, ids: Tensor) -> None:
    assert_stock_peft_agrees(stock(), written, ids)


FAMILIES = ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe", "phimoe", "minimax_m2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_computes_the_same_logits_for_other_families(
    family: str, load: Load, stock: Stock, tmp_path: Path, ids: Tensor
) -> None:
    loaded = load(family)
    down = loaded.names.projection_names["down"]
    assert_stock_peft_agrees(stock(family), write(loaded, tmp_path, rank_pattern={down: 2}), ids)


# By their last names these are dense layers' and shared experts' too; PEFT makes stacks of such names.
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_stock_peft_computes_the_same_logits_with_shared_and_dense_layers_among_the_targets(
    family: str, load: Load, stock: Stock, tmp_path: Path, ids: Tensor
) -> None:
    targets = ["q_b_proj" if family == "deepseek_v3" else "q_proj", "gate_proj", "up_proj", "down_proj", "router"]
    assert_stock_peft_agrees(stock(family), write(load(family), tmp_path, targets=targets), ids)


def test_experts_that_peft_must_be_told_of_are_found_where_they_are_linears_too(load: Load, tmp_path: Path) -> None:
    """On transformers 4 each projection of each expert is a linear; a name by itself would mean shared experts too."""
    adapt(load("qwen2_moe"), targets=["attention", "experts"]).save_pretrained(str(tmp_path))
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    found = {
        name: bool(check_target_module_exists(config, f"model.layers.1.{name}"))
        for name in (
            "self_attn.q_proj",
            "mlp.experts.3.gate_proj",
            "mlp.experts.0.down_proj",
            "mlp.shared_expert.gate_proj",
        )
    }
    assert list(found.values()) == [True, True, True, False]


SCALES: dict[str, dict[str, Any]] = {
    "rank-stabilized": {"rslora": True, "r": 2},
    "a scale that is no power of two": {"alpha": 6},
    "alphas of their own": {"alpha_pattern": {"q_proj": 2, "w2": 12, "w1": 3, "w3": 3}},
    "rank-stabilized, with a rank and an alpha of its own": {
        "rslora": True,
        "rank_pattern": {"q_proj": 2, "w2": 2},
        "alpha_pattern": {"w2": 3},
    },
}


@pytest.mark.parametrize("case", SCALES)
def test_saved_scale_is_lora_alpha_over_the_rank_of_each_tensor(case: str, loaded: LoadedModel, tmp_path: Path) -> None:
    """What llama.cpp's converter, and others that read `lora_alpha` alone, make of the files."""
    model = adapt(loaded, **SCALES[case])
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    config, tensors = config_of(tmp_path), load_file(tmp_path / WEIGHTS)
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    for pair in LiveAdapter(model.get_base_model(), loaded.names).pairs():
        a, b = (tensors[f"base_model.model.{pair.name}.lora_{factor}.weight"] for factor in "AB")
        update = config["lora_alpha"] / a.shape[0] * b @ a
        torch.testing.assert_close(update, pair.scale * pair.b @ pair.a, rtol=1e-5, atol=1e-6)


def test_adapter_comes_back_from_its_files_to_the_byte(
    written: Written, load: Load, tmp_path: Path, ids: Tensor
) -> None:
    model, first = written
    again = adopt(load(), first)
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), rtol=0, atol=1e-5)
    again.save_pretrained(str(tmp_path / "second"))
    for name in (WEIGHTS, CONFIG):
        assert (first / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    # Folding a scale that is no power of two into B costs a rounding; a checkpoint keeps what it was.
    checkpoint = shutil.copytree(first, tmp_path / "checkpoint")
    model.save_live_factors(checkpoint)
    again.load_adapter(str(checkpoint), "default")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_vl_moe"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_tied_head_merges_rightly_once_it_has_a_weight_of_its_own(kind: str, tmp_path: Path, ids: Tensor) -> None:
    config = build.tiny_config(kind)
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = True
    folder = save_random(tmp_path / "tied", config)
    loaded = load_tiny(folder)
    base = dequantized(loaded, folder)
    live = adapt(loaded, targets=["lm_head", "experts"])
    train_a_little(live)
    live.save_pretrained(str(tmp_path / "adapter"))
    # As docs/guides/use-the-adapter.md has it.
    head = base.get_output_embeddings()
    assert head.weight is base.get_input_embeddings().weight
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for each in (base.config, base.config.get_text_config()):
        each.tie_word_embeddings = False
    stock_peft(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits_of(stock_model(tmp_path / "merged"), ids), logits_of(live, ids), atol=1e-4)
