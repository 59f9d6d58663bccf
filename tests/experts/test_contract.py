"""Experts are recognised by transformers' contract; what cannot be packed is refused by the module's name."""

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from expertune.errors import UnsupportedModelError
from expertune.experts.contract import ExpertsSpec, find_experts, is_experts, read_spec, require_experts
from tests.experts.families import build_experts


def tiny_mixtral_on_meta(**sizes: int) -> MixtralForCausalLM:
    config = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(**(config | sizes)))


def test_mixtrals_experts_are_found_in_layer_order_with_their_sizes() -> None:
    specs = require_experts(tiny_mixtral_on_meta())
    assert list(specs) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert set(specs.values()) == {ExpertsSpec(num_experts=4, hidden_size=64, intermediate_size=128)}


def test_spec_of_mixtral_8x7b_counts_45_billion_expert_weights() -> None:
    spec = ExpertsSpec(num_experts=8, hidden_size=4096, intermediate_size=14336)
    assert 32 * spec.num_parameters == 45_097_156_608
    assert spec.shape("gate") == spec.shape("up") == (14336, 4096)
    assert spec.shape("down") == (4096, 14336)


def test_ungated_experts_have_two_projections() -> None:
    spec = read_spec("experts", build_experts("NemotronHExperts"))
    assert spec.projections == ("up", "down")
    assert spec.num_parameters == 4 * 2 * 64 * 128


@pytest.mark.parametrize(
    ("class_name", "what"),
    [
        ("GptOssExperts", "biases"),
        ("AriaExperts", "transposed weights"),
        ("MuseSparkExperts", "a norm after each expert"),
    ],
)
def test_switches_that_cannot_be_packed_are_refused(class_name: str, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"layer.experts: experts with {what} are not supported yet"):
        read_spec("layer.experts", build_experts(class_name))


def test_interleaved_gate_and_up_rows_are_refused() -> None:
    experts = build_experts("MixtralExperts")
    experts.is_concatenated = False  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"layer\.experts: experts with interleaved gate and up rows"):
        read_spec("layer.experts", experts)


def test_gpt_oss_is_refused_with_the_name_of_its_first_experts() -> None:
    config = GptOssConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_local_experts=4, vocab_size=32)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.0\.mlp\.experts: experts with biases"):
        require_experts(model)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 96}, r"model\.layers\.0\.mlp\.experts: hidden size 96 is no multiple of 64"),
        ({"intermediate_size": 100}, r"model\.layers\.0\.mlp\.experts: intermediate size 100 is no multiple of 64"),
    ],
)
def test_sizes_that_cannot_be_cut_into_blocks_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        require_experts(tiny_mixtral_on_meta(**sizes))


def test_dense_model_is_refused_with_what_to_use_instead() -> None:
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=32, num_attention_heads=2
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no experts.*plain PEFT"):
        require_experts(model)


def test_experts_whose_two_stacks_disagree_are_refused() -> None:
    experts = build_experts("MixtralExperts")
    experts.down_proj = nn.Parameter(torch.zeros(4, 64, 64))
    with pytest.raises(UnsupportedModelError, match=r"down_proj has shape \(4, 64, 64\), expected \(4, 64, 128\)"):
        read_spec("experts", experts)


def test_experts_held_as_a_list_of_modules_are_refused() -> None:
    experts = build_experts("MixtralExperts")
    del experts.gate_up_proj
    with pytest.raises(UnsupportedModelError, match="held otherwise than stacked"):
        read_spec("experts", experts)


def test_modules_outside_the_contract_are_no_experts() -> None:
    assert not is_experts(nn.Linear(2, 2))
    assert list(find_experts(nn.Sequential(nn.Linear(2, 2), nn.ModuleList()))) == []
