"""An adapter's files: what is in them, that plain PEFT computes the same from them, and that they come back whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertune.adapt.factors import read_factors
from expertune.adapt.files import (
    LIVE_NAME,
    read_adapter,
    read_adapter_config,
    read_adapter_settings,
)
from expertune.adapt.live import live_pairs, load_adapter_tensors
from expertune.checkpoint.load import LoadedModel
from expertune.errors import CheckpointError, ConfigError
from tests.adapt.conftest import EVERYTHING, FolderOf, adapt, adopt, logits_of, stock_peft, train_a_little
from tests.families import build
from tests.tiny_models import changed, dequantized, load_tiny, save_random, stock_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
W1 = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_A.weight"


@pytest.fixture
def saved(loaded: LoadedModel, tmp_path: Path) -> Path:
    model = adapt(loaded)
    train_a_little(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


# ---- what is written


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


# ---- plain PEFT reads it


READABLE: dict[str, dict[str, Any]] = {
    "attention, experts and head": {},
    "experts alone": {"targets": ["experts"]},
    "w2 alone": {"targets": ["w2"]},
    "the router too": {"targets": [*EVERYTHING, "router"]},
    "the router alone": {"targets": ["router"]},
    "a rank for q_proj": {"rank_pattern": {"q_proj": 2}},
    "an alpha for q_proj": {"alpha_pattern": {"q_proj": 2}},
    "rank-stabilised": {"rslora": True},
    "rank-stabilised with a rank for q_proj": {"rslora": True, "rank_pattern": {"q_proj": 2}},
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
    "rank-stabilised with a rank for w1 and w3": {"rslora": True, "rank_pattern": {"w1": 2, "w3": 2}},
}


def assert_stock_peft_agrees(folder: Path, loaded: LoadedModel, adapter: Path, ids: Tensor, **lora: Any) -> None:
    base, stock_base = logits_of(loaded.model, ids), dequantized(loaded, folder)
    model = adapt(loaded, **lora)
    train_a_little(model)
    model.save_pretrained(str(adapter))
    ours = logits_of(model, ids)
    assert (ours - base).abs().max() > 0.1
    assert model.stock_layout().refusal is None
    torch.testing.assert_close(logits_of(stock_peft(stock_base, adapter), ids), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", READABLE)
def test_stock_peft_computes_the_same_logits(
    case: str, mixtral: Path, loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    assert_stock_peft_agrees(mixtral, loaded, tmp_path, ids, **READABLE[case])


FAMILIES = ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "granitemoe", "phimoe", "minimax_m2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_computes_the_same_logits_for_other_families(
    family: str, family_folder: FolderOf, tmp_path: Path, ids: Tensor
) -> None:
    folder = family_folder(family)
    loaded = load_tiny(folder)
    down = loaded.names.projection_names["down"]
    assert_stock_peft_agrees(folder, loaded, tmp_path, ids, rank_pattern={down: 2})


# By their last names these are dense layers' and shared experts' too; PEFT makes stacks of such names.
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_stock_peft_computes_the_same_logits_with_shared_and_dense_layers_among_the_targets(
    family: str, family_folder: FolderOf, tmp_path: Path, ids: Tensor
) -> None:
    folder = family_folder(family)
    targets = ["q_b_proj" if family == "deepseek_v3" else "q_proj", "gate_proj", "up_proj", "down_proj", "router"]
    assert_stock_peft_agrees(folder, load_tiny(folder), tmp_path, ids, targets=targets)


def test_experts_that_peft_must_be_told_of_are_found_where_they_are_linears_too(
    family_folder: FolderOf, tmp_path: Path
) -> None:
    """On transformers 4 each projection of each expert is a linear; a name by itself would mean shared experts too."""
    adapt(load_tiny(family_folder("qwen2_moe")), targets=["attention", "experts"]).save_pretrained(str(tmp_path))
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
    "rank-stabilised": {"rslora": True, "r": 2},
    "a scale that is no power of two": {"alpha": 6},
    "alphas of their own": {"alpha_pattern": {"q_proj": 2, "w2": 12, "w1": 3, "w3": 3}},
    "rank-stabilised, with a rank and an alpha of its own": {
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
    for pair in live_pairs(model.get_base_model(), loaded.names):
        a, b = (tensors[f"base_model.model.{pair.name}.lora_{factor}.weight"] for factor in "AB")
        update = config["lora_alpha"] / a.shape[0] * b @ a
        torch.testing.assert_close(update, pair.scale * pair.b @ pair.a, rtol=1e-5, atol=1e-6)


def test_saved_adapter_tells_its_runs_own_settings_and_takes_them_back(
    loaded: LoadedModel, mixtral: Path, tmp_path: Path
) -> None:
    own = {"r": 2, "alpha": 6, "rslora": True, "rank_pattern": {"w2": 4}, "alpha_pattern": {"q_proj": 3}}
    adapt(loaded, **own).save_pretrained(str(tmp_path))
    assert read_adapter_settings(tmp_path) == own
    again = adopt(load_tiny(mixtral), tmp_path, **own)
    before, after = (
        {pair.name: (pair.scale, pair.a.shape) for pair in live_pairs(model, loaded.names)}
        for model in (loaded.model, again.get_base_model())
    )
    assert before == after
    with pytest.raises(ConfigError, match=r"lora\.alpha is 2\.0, but the adapter at .* has 6"):
        adopt(load_tiny(mixtral), tmp_path, alpha=2)


def test_file_whose_live_factors_are_another_adapters_is_read_by_itself(
    loaded: LoadedModel, mixtral: Path, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded, alpha=6)
    for seed, folder in ((1, tmp_path / "one"), (2, tmp_path / "other")):
        train_a_little(model, seed)
        model.save_pretrained(str(folder))
        model.save_live_factors(folder)
    (tmp_path / "one" / LIVE_NAME).replace(tmp_path / "other" / LIVE_NAME)
    again = adopt(load_tiny(mixtral), tmp_path / "other")
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), rtol=0, atol=1e-5)


def test_narrow_factors_come_back_to_the_bit_whatever_the_scale(
    loaded: LoadedModel, mixtral: Path, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded, alpha=6, dtype="bfloat16")
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    again = adopt(load_tiny(mixtral), tmp_path, dtype="bfloat16")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize(
    "scale",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"w2": 3}, "rank_pattern": {}}],
    ids=["plain", "rslora", "own"],
)
def test_file_of_an_earlier_release_with_live_scales_is_adopted_to_the_bit(
    scale: dict[str, Any], loaded: LoadedModel, mixtral: Path, tmp_path: Path, ids: Tensor
) -> None:
    lora = {"r": 2, "alpha": 3, "rslora": "use_rslora" in scale, "alpha_pattern": scale.get("alpha_pattern", {})}
    model = adapt(loaded, **lora)
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    held = {
        f"base_model.model.{pair.name}.lora_{factor}.weight": tensor.detach().clone()
        for pair in live_pairs(loaded.model, loaded.names)
        for factor, tensor in (("A", pair.a), ("B", pair.b))
    }
    save_file(held, tmp_path / WEIGHTS)
    break_config(r=2, lora_alpha=3, **scale)(tmp_path)
    again = adopt(load_tiny(mixtral), tmp_path, **lora)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


# ---- and so do we


@pytest.mark.parametrize("case", READABLE)
def test_adapter_comes_back_from_its_files_to_the_byte(
    case: str, mixtral: Path, loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded, **READABLE[case])
    train_a_little(model)
    model.save_pretrained(str(tmp_path / "first"))
    again = adopt(load_tiny(mixtral), tmp_path / "first")
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), rtol=0, atol=1e-5)
    again.save_pretrained(str(tmp_path / "second"))
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    # Folding a scale that is no power of two into B costs a rounding; a checkpoint keeps what it was.
    model.save_live_factors(tmp_path / "first")
    again.load_adapter(str(tmp_path / "first"), "default")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_adopted_adapter_goes_on_training(loaded: LoadedModel, saved: Path, mixtral: Path, ids: Tensor) -> None:
    model = adopt(load_tiny(mixtral), saved, dropout=0.1).train()
    model(ids, labels=ids).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * (2 * 4 + 2 * 3 + 1)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "v_proj", "lm_head"]])
def test_adapter_that_stock_peft_saved_is_adopted(
    targets: list[str], mixtral: Path, loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    """With the head among the targets PEFT also writes a copy of the frozen head, which is no part of the adapter."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    stock = get_peft_model(dequantized(loaded, mixtral), config)
    train_a_little(stock)
    stock.save_pretrained(tmp_path)
    model = adopt(loaded, tmp_path)
    torch.testing.assert_close(logits_of(model, ids), logits_of(stock, ids), rtol=0, atol=1e-5)


FUSED: dict[str, dict[str, Any]] = {
    "gate and up share an A": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "down alone": {"target_parameters": ["experts.down_proj"]},
    "with attention, a pattern and rslora": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": ["q_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 5},
        "use_rslora": True,
    },
    "converted by PEFT from per-expert targets": {"target_modules": ["w1", "w2", "w3"]},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("case", FUSED)
def test_adapter_that_stock_peft_saved_in_its_fused_layout_is_adopted(
    case: str, mixtral: Path, loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": [], "task_type": "CAUSAL_LM"} | FUSED[case]))
    stock = get_peft_model(dequantized(loaded, mixtral), config)
    train_a_little(stock)
    stock.save_pretrained(tmp_path)
    model = adopt(loaded, tmp_path)
    with model.disable_adapter():
        assert (logits_of(model, ids) - logits_of(stock, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model, ids), logits_of(stock, ids), rtol=0, atol=1e-5)


def test_read_factors_stacks_the_experts_and_finds_the_linears(loaded: LoadedModel, saved: Path) -> None:
    file = read_adapter(saved)
    found = read_factors(file.config, file.tensors, loaded.names, str(saved))
    assert {name: list(pairs) for name, pairs in found.experts.items()} == {
        f"model.layers.{layer}.mlp.experts": ["gate", "up", "down"] for layer in range(2)
    }
    a, b, _ = found.experts["model.layers.1.mlp.experts"]["gate"]
    assert (a.shape, b.shape) == ((4, 4, 64), (4, 128, 4))
    assert torch.equal(a[2], file.tensors[W1])
    attention = {f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(2) for leaf in "qkvo"}
    assert set(found.linears) == attention | {"lm_head"}


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 8}, r"lora\.r is 8, but the adapter at .* has 4; remove the key"),
    "alpha": ({"alpha": 16}, r"lora\.alpha is 16\.0, but the adapter at .* has 8"),
    "rslora": ({"rslora": True}, r"lora\.rslora is True, but the adapter at .* has False"),
    "a rank pattern": ({"rank_pattern": {"w1": 2}}, r"lora\.rank_pattern is .* has \{\}"),
    "fewer targets": ({"targets": ["attention"]}, r"lora\.targets is \['attention'\], but the adapter at"),
    "more targets": ({"targets": [*EVERYTHING, "router"]}, r"lora\.targets is .*'router'"),
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_run_file_that_contradicts_the_adapter_is_refused(key: str, saved: Path, mixtral: Path) -> None:
    lora, message = CONFLICTS[key]
    with pytest.raises(ConfigError, match=message):
        adopt(load_tiny(mixtral), saved, **lora)


def test_run_file_that_repeats_the_adapters_values_is_taken(saved: Path, mixtral: Path) -> None:
    adopt(load_tiny(mixtral), saved, r=4, alpha=8, rslora=False, targets=EVERYTHING)


# ---- damage


def break_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def break_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(config_of(folder) | changes), encoding="utf-8")

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), r"no adapter_config\.json here"),
    "config that is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "damaged: not valid JSON"),
    "config that is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "expected a mapping, got list"),
    "another kind of adapter": (break_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (break_config(use_dora=True), "use_dora is set"),
    "whole modules saved": (break_config(modules_to_save=["lm_head"]), "modules_to_save is set"),
    "trained biases": (break_config(bias="lora_only"), "bias is 'lora_only'"),
    "targets as an expression": (break_config(target_modules=".*w1"), "target_modules must be a list"),
    "no rank": (break_config(r=None), "r must be a number"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"no adapter_model\.safetensors here"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "pickled adapters"),
    "truncated weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
        r"adapter_model\.safetensors: damaged",
    ),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), r"adapter_model\.safetensors: damaged"),
    "a missing tensor": (break_weights(lambda tensors: tensors.pop(W1)), f"1 missing adapter tensors, .* {W1}"),
    "an unknown tensor": (
        break_weights(lambda tensors: tensors.update({W1.replace("experts.2", "experts.9"): tensors[W1].clone()})),
        "1 unknown adapter tensors, the first is .*experts.9.w1",
    ),
    "another shape": (
        break_weights(lambda tensors: tensors.update({W1: torch.zeros(5, 64)})),
        rf"{W1} has shape \(5, 64\), expected \(4, 64\)",
    ),
    "NaN": (
        break_weights(lambda tensors: tensors.update({W1: torch.full((4, 64), torch.nan)})),
        f"{W1} holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapter_is_refused(damage: str, saved: Path, mixtral: Path) -> None:
    apply, message = DAMAGE[damage]
    apply(saved)
    with pytest.raises(CheckpointError, match=message):
        adopt(load_tiny(mixtral), saved)


def test_refused_tensors_leave_the_live_adapter_to_the_byte(loaded: LoadedModel, saved: Path) -> None:
    live = loaded.model
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    file = read_adapter(saved)
    tensors = {key: tensor + 1 for key, tensor in file.tensors.items()}
    file.tensors = tensors | {max(tensors): torch.full_like(tensors[max(tensors)], torch.inf)}
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_adapter_tensors(live, loaded.names, "default", file.per_expert(loaded.names))
    assert changed(before, dict(live.state_dict())) == []


def test_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is it an adapter folder"):
        read_adapter_config(tmp_path / "nowhere")


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
