"""Experts are recognized by transformers' contract; what cannot be packed is refused by the module's name."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

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
    ("class_name", "switches"),
    [
        ("MixtralExperts", set()),
        ("AriaExperts", {"is_transposed"}),
        ("GptOssExperts", {"is_transposed", "has_bias", "alternates"}),
        ("OpenAIPrivacyFilterExperts", {"is_transposed", "has_bias"}),
        ("MuseSparkExperts", {"has_post_expert_norm"}),
    ],
)
def test_sizes_are_read_whatever_the_layout(class_name: str, switches: set[str]) -> None:
    experts = build_experts(class_name, hidden_size=64, intermediate_size=128)
    spec = read_spec("experts", experts)
    assert (spec.num_experts, spec.hidden_size, spec.intermediate_size) == (4, 64, 128)
    found = {name for name in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(spec, name)}
    assert found | (set() if spec.is_concatenated else {"alternates"}) == switches
    for weight in spec.weight_names:
        assert spec.stack_shape(weight) == tuple(experts.get_parameter(weight).shape)


def test_bias_of_another_shape_is_refused() -> None:
    experts = build_experts("GptOssExperts")
    experts.down_proj_bias = nn.Parameter(torch.zeros(4, 128))
    with pytest.raises(UnsupportedModelError, match=r"^e: down_proj_bias has shape \(4, 128\), expected \(4, 64\)$"):
        read_spec("e", experts)


def test_biases_that_are_promised_and_not_there_are_refused() -> None:
    experts = build_experts("MixtralExperts")
    experts.has_bias = True  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"^e: experts are held otherwise.*gate_up_proj_bias"):
        read_spec("e", experts)


def test_norm_that_is_promised_and_not_there_is_refused() -> None:
    experts = build_experts("MixtralExperts")
    experts.has_post_expert_norm = True  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"^e: has_post_expert_norm is set, but there is no module"):
        read_spec("e", experts)


def test_stack_that_is_a_matrix_is_refused() -> None:
    experts = build_experts("MixtralExperts")
    experts.gate_up_proj = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(
        UnsupportedModelError, match=r"^e: gate_up_proj has shape \(64, 64\), expected three dimensions"
    ):
        read_spec("e", experts)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 96}, r"model\.layers\.0\.mlp\.experts: hidden size 96 is no multiple of 64.*plain PEFT"),
        (
            {"intermediate_size": 100},
            r"model\.layers\.0\.mlp\.experts: intermediate size 100 is no multiple of 64.*plain PEFT",
        ),
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
