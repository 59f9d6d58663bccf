"""The adapted model is a PeftModel in every respect: adapters come, go and mix, and the base is never touched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor

from expertune.checkpoint.load import LoadedModel
from expertune.errors import ConfigError, ExportError
from expertune.experts.lora import ExpertsLora
from tests.adapt.conftest import EVERYTHING, FolderOf, Load, adapt, adopt, logits_of, train_a_little
from tests.tiny_models import changed, frozen_bytes, load_tiny

WEIGHTS = "adapter_model.safetensors"


def trainable(model: PeftModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_parameter_count_is_that_of_separate_linears(loaded: LoadedModel) -> None:
    model = adapt(loaded)
    experts = 2 * 4 * 3 * 4 * (64 + 128)
    attention = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64))
    head = 4 * (64 + 96)
    assert trainable(model) == experts + attention + head
    assert model.get_nb_trainable_parameters()[0] == experts + attention + head


def test_fresh_adapter_changes_no_logit(loaded: LoadedModel, ids: Tensor) -> None:
    base = logits_of(loaded.model, ids)
    assert torch.equal(logits_of(adapt(loaded, dropout=0.1), ids), base)


def test_disabled_adapter_gives_the_bases_logits_to_the_byte(loaded: LoadedModel, ids: Tensor) -> None:
    base = logits_of(loaded.model, ids)
    model = adapt(loaded, targets=[*EVERYTHING, "router"])
    train_a_little(model)
    assert not torch.allclose(logits_of(model, ids), base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), base)
    assert not torch.allclose(logits_of(model, ids), base, atol=1e-2)


def test_a_training_step_moves_every_factor_and_no_frozen_byte(loaded: LoadedModel, ids: Tensor) -> None:
    before = frozen_bytes(loaded.model)
    model = adapt(loaded, dropout=0.1, targets=[*EVERYTHING, "router"]).train()
    train_a_little(model)
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert [name for name, old in factors.items() if torch.equal(after[name], old)] == []
    # PEFT moves a wrapped layer under base_layer; its bytes are the same.
    names = {name.replace(".base_layer", ""): tensor for name, tensor in frozen_bytes(loaded.model).items()}
    assert changed(before, {name: names[name] for name in before}) == []


@pytest.mark.parametrize("targets", [["experts"], ["attention"], ["router"], ["lm_head"], ["w2"], ["q_proj", "w1"]])
def test_only_what_is_targeted_is_adapted(targets: list[str], loaded: LoadedModel) -> None:
    model = adapt(loaded, targets=targets)
    names = {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    kinds = {
        "experts" if ".experts" in name else "attention" if "self_attn" in name else name.rpartition(".")[2]
        for name in names
    }
    expected = {"w2": {"experts"}, "router": {"gate"}, "q_proj": {"attention", "experts"}}
    assert kinds == expected.get(targets[0], {targets[0]})


def test_live_config_keeps_the_dropout_that_the_router_cannot_have(loaded: LoadedModel) -> None:
    """PEFT has no dropout on a wrapped parameter; the other layers of the same adapter have it all the same."""
    model = adapt(loaded, dropout=0.25, targets=[*EVERYTHING, "router"])
    assert model.peft_config["default"].lora_dropout == 0.25
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    rates = [getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers]
    assert sorted(set(rates)) == [0.0, 0.25]
    assert rates.count(0.0) == 2


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_factors_have_the_dtype_asked_for(dtype: str, expected: torch.dtype, mixtral: Path, ids: Tensor) -> None:
    model = adapt(load_tiny(mixtral, torch.bfloat16), dtype=dtype, targets=[*EVERYTHING, "router"]).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_activation_checkpointing_gives_the_same_gradients(loaded: LoadedModel, ids: Tensor) -> None:
    model = adapt(loaded, targets=[*EVERYTHING, "router"]).train()
    train_a_little(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert changed(plain, gradients()) == []


def test_shared_experts_linears_are_adapted_under_names_that_peft_would_rewrite(
    family_folder: FolderOf, tmp_path: Path, ids: Tensor
) -> None:
    """`gate_proj` means routed, shared and dense experts alike; PEFT would turn the name into stacked parameters."""
    for family, shared in (
        ("qwen2_moe", "layers.1.mlp.shared_expert.gate_proj"),
        ("deepseek_v3", "layers.1.mlp.shared_experts.gate_proj"),
        ("deepseek_v3", "layers.0.mlp.gate_proj"),
    ):
        folder = family_folder(family)
        loaded = load_tiny(folder)
        model = adapt(loaded, targets=["gate_proj", "up_proj", "down_proj"]).train()
        layer = model.get_base_model().get_submodule(f"model.{shared}")
        assert isinstance(layer, LoraLayer)
        train_a_little(model)
        model(ids, labels=ids).loss.backward()
        assert layer.lora_A["default"].weight.grad.any()
        out = tmp_path / family
        model.save_pretrained(str(out))
        assert f"base_model.model.model.{shared}.lora_A.weight" in load_file(out / WEIGHTS)
        assert torch.equal(logits_of(adopt(load_tiny(folder), out), ids), logits_of(model, ids))


# ---- several adapters


def two_adapters(loaded: LoadedModel, **second: Any) -> PeftModel:
    model = adapt(loaded, targets=[*EVERYTHING, "router"])
    adapt(loaded, adapter_name="second", onto=model, **({"r": 2, "targets": ["experts", "router", "q_proj"]} | second))
    train_a_little(model)
    return model


def test_second_adapter_waits_until_it_is_set(loaded: LoadedModel, load: Load, ids: Tensor) -> None:
    model = two_adapters(loaded)
    alone = adapt(load(), targets=[*EVERYTHING, "router"])
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if ".second" not in k}, strict=False)
    first = logits_of(model, ids)
    assert torch.equal(first, logits_of(alone, ids))
    model.set_adapter("second")
    assert not torch.allclose(logits_of(model, ids), first, atol=1e-2)
    model.set_adapter("default")
    assert torch.equal(logits_of(model, ids), first)


def test_only_the_active_adapters_factors_are_trainable(loaded: LoadedModel) -> None:
    model = two_adapters(loaded)
    for active, other in (("default", "second"), ("second", "default")):
        model.set_adapter(active)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names
        assert all(f".{active}" in name and f".{other}" not in name for name in names)


def test_both_adapters_are_written_and_come_back(loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor) -> None:
    model = two_adapters(loaded)
    model.save_pretrained(str(tmp_path))
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.set_adapter(name)
        assert torch.equal(logits_of(adopt(load(), folder), ids), logits_of(model, ids))
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["target_modules"]) == (2, ["gate", "q_proj", "w1", "w2", "w3"])


def test_selected_adapter_is_written_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    two_adapters(loaded).save_pretrained(str(tmp_path), selected_adapters=["second"])
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


@pytest.mark.filterwarnings("ignore:Adapter second was active which is now deleted")
def test_deleted_adapter_leaves_the_other_as_it_was(loaded: LoadedModel, tmp_path: Path, ids: Tensor) -> None:
    model = two_adapters(loaded)
    first = logits_of(model, ids)
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, ids), first)
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    model.save_pretrained(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]


def test_adapter_with_other_dropout_and_scale_may_be_added(loaded: LoadedModel, ids: Tensor) -> None:
    model = two_adapters(loaded, dropout=0.5, rslora=True)
    model.set_adapter("second")
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(logits_of(model, ids), logits_of(model, ids))


def test_files_are_read_into_attached_adapters(loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor) -> None:
    model = adapt(loaded)
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    other = adapt(load())
    other.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits_of(other, ids), logits_of(model, ids))


def test_load_adapter_of_a_new_name_attaches_it(loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor) -> None:
    model = adapt(loaded, targets=["experts", "router", "q_proj"])
    train_a_little(model)
    model.save_pretrained(str(tmp_path))
    other = adapt(load(), targets=["attention"])
    before = logits_of(other, ids)
    other.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits_of(other, ids), before)
    other.set_adapter("second")
    assert torch.equal(logits_of(other, ids), logits_of(model, ids))
    other.save_pretrained(str(tmp_path / "again"), selected_adapters=["second"])
    assert torch.equal(logits_of(adopt(load(), tmp_path / "again" / "second"), ids), logits_of(model, ids))


@pytest.mark.parametrize("targets", [["w1", "w2", "w3", "k_proj"], ["k_proj"]])
def test_add_adapter_takes_a_stock_lora_config(
    targets: list[str], loaded: LoadedModel, load: Load, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded)
    model.add_adapter("second", LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    train_a_little(model)
    model.set_adapter("second")
    model.save_pretrained(str(tmp_path), selected_adapters=["second"])
    assert torch.equal(logits_of(adopt(load(), tmp_path / "second"), ids), logits_of(model, ids))


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations")
def test_merging_is_refused_and_changes_nothing_in_the_experts(loaded: LoadedModel) -> None:
    model = adapt(loaded, targets=["experts"])
    train_a_little(model)
    before = frozen_bytes(loaded.model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ExportError, match="cannot absorb an adapter in place"):
            merge()
    assert changed(before, frozen_bytes(loaded.model)) == []


def test_unloading_gives_the_base_back(loaded: LoadedModel, ids: Tensor) -> None:
    base = logits_of(loaded.model, ids)
    model = adapt(loaded, targets=[*EVERYTHING, "router"])
    train_a_little(model)
    unloaded = model.unload()
    assert not [module for module in unloaded.modules() if isinstance(module, LoraLayer)]
    assert torch.equal(logits_of(unloaded, ids), base)


def test_mixed_batches_are_right_and_weighted_adapters_and_hotswap_are_refused(
    loaded: LoadedModel, tmp_path: Path, ids: Tensor
) -> None:
    model = adapt(loaded, targets=["experts", "q_proj"])
    adapt(loaded, adapter_name="second", onto=model, r=2, targets=["experts"])
    train_a_little(model)
    alone = []
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        alone.append(logits_of(model, ids[:2]))
    with torch.no_grad():
        mixed = model(ids[:2], adapter_names=["second", "default"]).logits
    assert torch.allclose(mixed, torch.stack([alone[0][0], alone[1][1]]), atol=1e-5)
    with pytest.raises(ExportError, match="add_weighted_adapter does not mix"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "third")
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="hotswap: "):
        hotswap_adapter(model, str(tmp_path), "default")


def test_generation_goes_through_the_adapter(loaded: LoadedModel, ids: Tensor) -> None:
    model = adapt(loaded).eval()
    train_a_little(model)
    mask = torch.ones_like(ids)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, **settings, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(ids, **settings))


def test_target_that_is_nowhere_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="no module is called 'w4'"):
        adapt(loaded, targets=["w4"])


def test_every_experts_module_is_wrapped_once(loaded: LoadedModel) -> None:
    model = two_adapters(loaded)
    layers = [module for module in model.modules() if isinstance(module, ExpertsLora)]
    assert len(layers) == 2
    assert all(set(layer.lora_A) == {"default", "second"} for layer in layers)
