"""An adapter that is there already: started from, whoever wrote it; or refused, with what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertune.adapt.factors import read_factors
from expertune.adapt.files import read_adapter, read_adapter_config, read_adapter_settings
from expertune.adapt.live import LiveAdapter
from expertune.checkpoint.adapter_folder import LIVE_NAME
from expertune.checkpoint.load import LoadedModel
from expertune.errors import CheckpointError, ConfigError
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
    train_a_little,
)
from tests.tiny_models import changed


def test_saved_adapter_tells_its_runs_own_settings_and_takes_them_back(
    loaded: LoadedModel, load: Load, tmp_path: Path
) -> None:
    own = {"r": 2, "alpha": 6, "rslora": True, "rank_pattern": {"w2": 4}, "alpha_pattern": {"q_proj": 3}}
    adapt(loaded, **own).save_pretrained(str(tmp_path))
    assert read_adapter_settings(tmp_path) == own
    again = adopt(load(), tmp_path, **own)
    before, after = (
        {pair.name: (pair.scale, pair.a.shape) for pair in LiveAdapter(model, loaded.names).pairs()}
        for model in (loaded.model, again.get_base_model())
    )
    assert before == after
    with pytest.raises(ConfigError, match=r"lora\.alpha is 2, but the adapter at .* has 6"):
        adopt(load(), tmp_path, alpha=2)


def test_file_whose_live_factors_are_another_adapters_is_read_by_itself(
    loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded, alpha=6)
    for seed, folder in ((1, tmp_path / "one"), (2, tmp_path / "other")):
        train_a_little(model, seed)
        model.save_pretrained(str(folder))
        model.save_live_factors(folder)
    (tmp_path / "one" / LIVE_NAME).replace(tmp_path / "other" / LIVE_NAME)
    again = adopt(load(), tmp_path / "other")
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), rtol=0, atol=1e-5)


def test_narrow_factors_come_back_to_the_bit_whatever_the_scale(
    loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded, alpha=6, dtype="bfloat16")
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    again = adopt(load(), tmp_path, dtype="bfloat16")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize(
    "scale",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"w2": 3}, "rank_pattern": {}}],
    ids=["plain", "rslora", "own"],
)
def test_file_of_an_earlier_release_with_live_scales_is_adopted_to_the_bit(
    scale: dict[str, Any], loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor
) -> None:
    lora = {"r": 2, "alpha": 3, "rslora": "use_rslora" in scale, "alpha_pattern": scale.get("alpha_pattern", {})}
    model = adapt(loaded, **lora)
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    held = {
        f"base_model.model.{pair.name}.lora_{factor}.weight": tensor.detach().clone()
        for pair in LiveAdapter(loaded.model, loaded.names).pairs()
        for factor, tensor in (("A", pair.a), ("B", pair.b))
    }
    save_file(held, tmp_path / WEIGHTS)
    break_config(r=2, lora_alpha=3, **scale)(tmp_path)
    again = adopt(load(), tmp_path, **lora)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_adopted_adapter_goes_on_training(loaded: LoadedModel, saved: Path, load: Load, ids: Tensor) -> None:
    model = adopt(load(), saved, dropout=0.1).train()
    model(ids, labels=ids).loss.backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * (2 * 4 + 2 * 3 + 1)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trainable)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "v_proj", "lm_head"]])
def test_adapter_that_stock_peft_saved_is_adopted(
    targets: list[str], stock: Stock, loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    """With the head among the targets PEFT also writes a copy of the frozen head, which is no part of the adapter."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(stock(), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    model = adopt(loaded, tmp_path)
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


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
    case: str, stock: Stock, loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": [], "task_type": "CAUSAL_LM"} | FUSED[case]))
    theirs = get_peft_model(stock(), config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    model = adopt(loaded, tmp_path)
    with model.disable_adapter():
        assert (logits_of(model, ids) - logits_of(theirs, ids)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_read_factors_finds_every_expert_and_the_linears(loaded: LoadedModel, saved: Path) -> None:
    file = read_adapter(saved)
    found = read_factors(file.config, file.tensors, loaded.names, str(saved))
    assert {name: list(pairs) for name, pairs in found.experts.items()} == {
        f"model.layers.{layer}.mlp.experts": ["gate", "up", "down"] for layer in range(2)
    }
    pairs = found.experts["model.layers.1.mlp.experts"]["gate"]
    assert {(pair.a.shape, pair.b.shape) for pair in pairs} == {((4, 64), (128, 4))}
    assert len(pairs) == 4
    assert torch.equal(pairs[2].a, file.tensors[W1])
    attention = {f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(2) for leaf in "qkvo"}
    assert set(found.linears) == attention | {"lm_head"}


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "r": (
        {"r": 8},
        r"lora\.r is 8, but the adapter at \S+ has 4; remove the key to take the adapter's "
        r"\(on the command line: lora\.r=null\)$",
    ),
    "half of r": (
        {"r": 2},
        r"lora\.r is 2, but the adapter at \S+ has 4 \(twice that, as files of lora\.init: pissa have\); remove the "
        r"key to take the adapter's \(on the command line: lora\.r=null\)$",
    ),
    "alpha": ({"alpha": 16}, r"lora\.alpha is 16, but the adapter at \S+ has 8; .*lora\.alpha=null\)$"),
    "rslora": ({"rslora": True}, r"lora\.rslora is true, but the adapter at \S+ has false; .*lora\.rslora=null\)$"),
    "a rank pattern": ({"rank_pattern": {"w1": 2}}, r"lora\.rank_pattern is .* has \{\}"),
    "fewer targets": ({"targets": ["attention"]}, r"lora\.targets is \['attention'\], but the .*lora\.targets=null\)$"),
    "more targets": ({"targets": [*EVERYTHING, "router"]}, r"lora\.targets is .*'router'"),
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_run_file_that_contradicts_the_adapter_is_refused(key: str, saved: Path, load: Load) -> None:
    lora, message = CONFLICTS[key]
    with pytest.raises(ConfigError, match=message):
        adopt(load(), saved, **lora)


def test_run_file_that_repeats_the_adapters_values_is_taken(saved: Path, load: Load) -> None:
    adopt(load(), saved, r=4, alpha=8, rslora=False, targets=EVERYTHING)


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
    "DoRA": (break_config(use_dora=True), r"missing adapter tensors, the first is .*lora_magnitude_vector"),
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
def test_damaged_adapter_is_refused(damage: str, saved: Path, load: Load) -> None:
    apply, message = DAMAGE[damage]
    apply(saved)
    with pytest.raises(CheckpointError, match=message):
        adopt(load(), saved)


def test_refused_tensors_leave_the_live_adapter_to_the_byte(loaded: LoadedModel, saved: Path) -> None:
    live = adapt(loaded).get_base_model()
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    file = read_adapter(saved)
    tensors = {key: tensor + 1 for key, tensor in file.tensors.items()}
    file.tensors = tensors | {max(tensors): torch.full_like(tensors[max(tensors)], torch.inf)}
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        LiveAdapter(live, loaded.names).load(file.per_expert(loaded.names))
    assert changed(before, dict(live.state_dict())) == []


def test_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is it an adapter folder"):
        read_adapter_config(tmp_path / "nowhere")


MIXED: dict[str, tuple[dict[str, Any], str]] = {
    "a larger rank in the config": (
        {"r": 8, "lora_alpha": 8},
        r"adapter_config\.json has r 8 for \S+, and its tensors have rank 4: these are files of two adapters",
    ),
    "a smaller one": ({"r": 2, "lora_alpha": 2}, r"adapter_config\.json has r 2 for \S+, and its tensors have rank 4"),
    "one of the attention's": (
        {"rank_pattern": {"q_proj": 2}},
        r"adapter_config\.json has rank_pattern 2 for \S+q_proj, and its tensors have rank 4",
    ),
    "one of a projection's": (
        {"rank_pattern": {r"experts\.\d+\.w2": 16}},
        r"adapter_config\.json has rank_pattern 16 for \S+experts\.0\.w2, and its tensors have rank 4",
    ),
    "an alpha that is not in B": (
        {"lora_alpha": 16},
        r"adapter_config\.json has r 4 and lora_alpha 16, and its tensors were written for an r and a",
    ),
    "targets that are fewer": (
        {"target_modules": ["w1", "w2", "w3", "q_proj", "lm_head"]},
        r"the tensors have factors of \S+k_proj and 5 more modules, which target_modules of adapter_config\.json",
    ),
    "one target fewer": (
        {"target_modules": ["w1", "w2", "w3", "q_proj", "k_proj", "v_proj", "o_proj"]},
        r"the tensors have factors of lm_head, which .*or add lm_head to target_modules$",
    ),
    "rslora": ({"use_rslora": True}, r"adapter_config\.json has use_rslora true, and its tensors were written for"),
}


@pytest.mark.parametrize("case", MIXED)
def test_folder_with_the_files_of_two_adapters_is_refused_with_its_name_and_both_values(
    case: str, saved: Path, load: Load
) -> None:
    changes, message = MIXED[case]
    break_config(**changes)(saved)
    with pytest.raises(CheckpointError, match=rf"^{saved}: {message}"):
        adopt(load(), saved)
    with pytest.raises(CheckpointError, match=message):
        adapt(load()).load_adapter(str(saved), "default")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_ranks_of_a_file_in_pefts_fused_layout_are_held_to_its_config(
    stock: Stock, loaded: LoadedModel, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    get_peft_model(stock(), config).save_pretrained(tmp_path)
    break_config(r=16)(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json has r 16.* for \S+, and its tensors have rank"):
        adopt(loaded, tmp_path)
