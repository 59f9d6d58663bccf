"""New adapters by a stock LoraConfig on an NF4 folder: which matrices it means, and what cannot be."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, TaskType, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.errors import ConfigError
from expertune.experts.module import Nf4Experts
from tests.adapt.conftest import FolderOf, logits_of, stock_peft, train_a_little
from tests.adapt.stock.conftest import by_transformers, experts_of, linears_of, lora
from tests.checkpoint.nf4_folders import quantized
from tests.families import build
from tests.tiny_models import changed, dequantized, frozen_bytes, load_tiny, random_rows, save_random

# PEFT asks transformers by a renamed property, and tells that a head among the targets is copied into the file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

ALL = ("gate", "up", "down")
QKV = {"q_proj", "k_proj", "v_proj"}


def shown(value: object) -> str:
    """A parameter in a test's name; a set has no order of its own."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(
    ("settings", "projections", "linears"),
    [
        ({"target_modules": ["w1", "w2", "w3"]}, ALL, set()),
        ({"target_modules": ["gate_proj", "down_proj"]}, ("gate", "down"), set()),
        ({"target_modules": ["gate_up_proj", "q_proj"]}, ("gate", "up"), {"q_proj"}),
        ({"target_modules": ["mlp.experts"]}, ALL, set()),
        ({"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}, ("gate", "up"), set()),
        ({"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}, ("down",), {"o_proj"}),
        ({"target_modules": "all-linear"}, ALL, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["w2", "o_proj"]}, ALL[:2], QKV),
        ({"target_modules": r".*\.experts\.\d+\.w3"}, ("up",), set()),
        ({"target_modules": r".*\.(v_proj|w1)"}, ("gate",), {"v_proj"}),
        ({"target_modules": ["w1", "gate"], "lora_dropout": 0.1}, ("gate",), {"gate"}),
        ({"target_modules": ["w1", "embed_tokens"]}, ("gate",), {"embed_tokens"}),
    ],
    ids=shown,
)  # fmt: skip
def test_get_peft_model_adapts_the_experts_that_a_lora_config_names(
    settings: dict[str, Any], projections: tuple[str, ...], linears: set[str], model: PreTrainedModel
) -> None:
    found = get_peft_model(model, lora(**settings))
    ranks = experts_of(found)
    assert len(ranks) == 2
    assert all(each == dict.fromkeys(projections, (4, 8)) for each in ranks.values())
    assert linears_of(found) == linears


def test_patterns_and_layers_of_a_lora_config_hold_for_experts(model: PreTrainedModel) -> None:
    config = lora(rank_pattern={"w1": 2}, alpha_pattern={"w2": 5}, layers_to_transform=[1])
    assert experts_of(get_peft_model(model, config)) == {
        "base_model.model.model.layers.1.mlp.experts": {"gate": (2, 8), "up": (4, 8), "down": (4, 5)}
    }


def test_all_linear_means_linears_that_compute_as_one(tmp_path: Path) -> None:
    folder = quantized(save_random(tmp_path / "source", build.tiny_config("deepseek_v4")), tmp_path / "nf4")
    base = by_transformers(folder)
    found = get_peft_model(base, lora(target_modules="all-linear"))
    assert logits_of(found, torch.arange(3, 14)[None]).isfinite().all()
    assert len(experts_of(found)) == sum(isinstance(module, Nf4Experts) for module in base.modules())


def test_all_linear_leaves_out_a_linear_whose_weight_the_16_bit_model_uses_without_calling_it(tmp_path: Path) -> None:
    source = save_random(tmp_path / "source", build.tiny_config("jamba"))
    folder = quantized(source, tmp_path / "nf4")
    found = get_peft_model(by_transformers(folder), lora(target_modules="all-linear"))
    assert "in_proj" in linears_of(found)
    assert "dt_proj" not in linears_of(found)
    train_a_little(found)
    found.save_pretrained(tmp_path / "adapter")
    ids = random_rows(2, 12)
    stock = stock_peft(dequantized(load_tiny(folder), source), tmp_path / "adapter")
    assert torch.allclose(logits_of(stock, ids), logits_of(found, ids), atol=1e-4)


def test_get_peft_model_with_experts_named_as_modules_and_as_stacks_does_not_warn(nf4_of: FolderOf) -> None:
    """As the files of families do that stock PEFT reads by both names."""
    config = lora(target_modules=["q_proj", "down_proj"], target_parameters=["experts.down_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="target_parameters: nothing in this model")
        found = get_peft_model(by_transformers(nf4_of("qwen2_moe")), config)
    assert all(set(ranks) == {"down"} for ranks in experts_of(found).values())


def test_a_name_that_fits_nothing_is_told(model: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match=r"nothing in this model is called 'wi_0'.* are called w1, w3, w2"):
        get_peft_model(model, lora(target_modules=["q_proj", "wi_0"]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True, "target_modules": ["w1", "embed_tokens"]}, "use_dora cannot be had on .*embed_tokens"),
        ({"lora_bias": True}, "lora_bias=True cannot be had"),
        ({"bias": "all"}, "bias='all' cannot be had"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' cannot be had"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' cannot be had"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' cannot be had"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' cannot be had"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"modules_to_save": ["experts"]}, "'experts' names 4-bit experts"),
        ({"modules_to_save": ["w1"], "target_modules": ["q_proj"]}, "'w1' names 4-bit experts"),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "'mlp' names 4-bit experts or a block"),
        ({"target_modules": r".*experts\.0\.w1"}, "takes 1 of the 4 experts"),
        ({"rank_pattern": {r"experts\.0\.w1": 2}}, "the experts of .* share a rank"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
@pytest.mark.filterwarnings("ignore:lora with eva initialization")
def test_what_experts_cannot_have_is_refused_by_name(
    settings: dict[str, Any], told: str, model: PreTrainedModel
) -> None:
    with pytest.raises(ConfigError, match=told):
        get_peft_model(model, lora(**settings))
    assert not any(isinstance(layer, LoraLayer) for layer in model.modules())


def test_attention_alone_may_have_what_experts_cannot(model: PreTrainedModel) -> None:
    found = get_peft_model(model, lora(target_modules=["q_proj"], use_dora=True))
    assert linears_of(found) == {"q_proj"}


def test_other_methods_are_refused_on_experts(model: PreTrainedModel) -> None:
    settings = {"task_type": TaskType.CAUSAL_LM, "feedforward_modules": []}
    with pytest.raises(ConfigError, match=r"IA3 .* cannot adapt 4-bit experts"):
        get_peft_model(model, IA3Config(target_modules=["k_proj", "w2"], **settings))
    with pytest.warns(UserWarning, match="all-linear does not mean the 4-bit experts with IA3"):
        get_peft_model(model, IA3Config(target_modules="all-linear", **settings))


def test_get_peft_model_on_a_peft_model_is_refused_by_name(model: PreTrainedModel) -> None:
    found = get_peft_model(model, lora())
    with (
        pytest.warns(UserWarning, match=r"second time|Already found"),
        pytest.raises(ConfigError, match="is a PeftModel already"),
    ):
        get_peft_model(found, lora(target_modules=["w2"]))


def test_inject_adapter_in_model_by_the_names_of_a_state_dict(model: PreTrainedModel, written: Any) -> None:
    adapter, _, _ = written("mixtral", "w1", "q_proj")
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = inject_adapter_in_model(lora(target_modules=["k_proj"]), model, state_dict=tensors)
    assert linears_of(found) == {"q_proj"}
    assert all(set(ranks) == {"gate"} for ranks in experts_of(found).values())


def step(model: nn.Module, ids: Tensor) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return loss.item()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_prepared_for_kbit_training_every_factor_moves_and_no_frozen_byte(
    reentrant: bool, model: PreTrainedModel, ids: Tensor
) -> None:
    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    before = frozen_bytes(prepared)
    found = get_peft_model(prepared, lora(target_modules="all-linear")).train()
    train_a_little(found)
    factors = {name: p.detach().clone() for name, p in found.named_parameters() if p.requires_grad}
    assert step(found, ids) > step(found, ids)
    after = dict(found.named_parameters())
    assert [name for name, old in factors.items() if torch.equal(after[name], old)] == []
    names = {name.replace(".base_layer", ""): tensor for name, tensor in frozen_bytes(prepared).items()}
    assert changed(before, {name: names[name] for name in before}) == []
