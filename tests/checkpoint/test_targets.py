"""`lora.targets` resolved against models: names on disk, aliases, rank patterns, and how a mistake is reported."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import DeepseekV2Config, MixtralConfig, NemotronHConfig, Qwen3NextConfig

from expertune.checkpoint.names import read_names
from expertune.checkpoint.recipe import linears_to_quantize
from expertune.checkpoint.targets import Rank, resolve_targets
from expertune.config import LoraSection
from expertune.errors import ConfigError

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def build(config):
    with torch.device("meta"):
        return Auto.from_config(config)


@pytest.fixture(scope="module")
def mixtral():
    return build(MixtralConfig(**SIZES, num_local_experts=4))


@pytest.fixture(scope="module")
def deepseek():
    """One dense layer, then one with routed and shared experts."""
    return build(
        DeepseekV2Config(
            **{**SIZES, "num_key_value_heads": 4},
            moe_intermediate_size=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=2,
            first_k_dense_replace=1,
            mlp_layer_types=["dense", "sparse"],
            kv_lora_rank=64,
            q_lora_rank=None,
            qk_rope_head_dim=64,
            qk_nope_head_dim=64,
            v_head_dim=64,
        )
    )


@pytest.fixture(scope="module")
def hybrid():
    """Linear attention in one layer, softmax attention in the other, and a gated shared expert."""
    return build(
        Qwen3NextConfig(
            **SIZES,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            head_dim=64,
            shared_expert_intermediate_size=64,
            layer_types=["linear_attention", "full_attention"],
        )
    )


def resolve(model, *targets, **lora):
    return resolve_targets(model, read_names(model), LoraSection(r=8, alpha=16, targets=list(targets), **lora))


def test_names_on_disk_find_linears_experts_and_head(mixtral):
    found = resolve(mixtral, "q_proj", "w2", "w1", "lm_head")
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert list(found.linears) == [*attention, "lm_head"]
    assert found.experts == {
        f"model.layers.{layer}.mlp.experts": {"gate": (8, 16), "down": (8, 16)} for layer in range(2)
    }
    assert found.router == {}


def test_attention_alias_is_all_linears_of_attention_and_nothing_else(mixtral, deepseek):
    leaves = {name.rpartition(".")[2] for name in resolve(mixtral, "attention").linears}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    leaves = {name.rpartition(".")[2] for name in resolve(deepseek, "attention").linears}
    assert leaves == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def test_attention_alias_reaches_the_linear_attention_of_hybrid_models(hybrid):
    assert {name.split(".")[3] for name in resolve(hybrid, "attention").linears} == {"linear_attn", "self_attn"}


def test_a_name_that_fits_routed_shared_and_dense_experts_means_all_of_them(deepseek):
    found = resolve(deepseek, "gate_proj")
    assert list(found.linears) == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj"]
    assert found.experts == {"model.layers.1.mlp.experts": {"gate": (8, 16)}}


def test_experts_alias_is_the_routed_experts_alone(deepseek):
    found = resolve(deepseek, "experts")
    assert found.linears == {}
    assert list(found.experts["model.layers.1.mlp.experts"]) == ["gate", "up", "down"]


def test_router_by_alias_and_by_its_name(mixtral):
    by_alias, by_name = resolve(mixtral, "router"), resolve(mixtral, "gate")
    assert by_alias == by_name
    assert by_alias.router == {f"model.layers.{layer}.mlp.gate": (8, 16) for layer in range(2)}


def test_a_longer_name_narrows_a_target_as_in_peft(deepseek):
    assert list(resolve(deepseek, "shared_experts.gate_proj").linears) == [
        "model.layers.1.mlp.shared_experts.gate_proj"
    ]


def test_experts_without_a_gate_have_two_projections():
    config = NemotronHConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, n_routed_experts=4,
        moe_shared_expert_intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        layers_block_type=["attention", "moe"],
    )  # fmt: skip
    (projections,) = resolve(build(config), "experts").experts.values()
    assert list(projections) == ["up", "down"]


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_rank_pattern_by_name_on_disk(mixtral):
    found = resolve(mixtral, "q_proj", "experts", rank_pattern={"w2": 32, "q_proj": 4}, alpha_pattern={"w2": 64})
    assert found.experts["model.layers.0.mlp.experts"] == {"gate": (8, 16), "up": (8, 16), "down": (32, 64)}
    assert found.linears["model.layers.1.self_attn.q_proj"] == Rank(rank=4, alpha=16)


def test_rank_pattern_as_expression_over_names_on_disk(mixtral):
    found = resolve(mixtral, "experts", rank_pattern={r"layers\.1\.block_sparse_moe\.experts\.\d+\.w[123]": 2})
    assert found.experts["model.layers.0.mlp.experts"]["up"].rank == 8
    assert found.experts["model.layers.1.mlp.experts"]["up"].rank == 2


def test_the_first_pattern_that_fits_wins(mixtral):
    patterns = {r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 4}
    found = resolve(mixtral, "q_proj", rank_pattern=patterns)
    assert [rank.rank for rank in found.linears.values()] == [2, 4]


def test_a_pattern_matches_from_a_dot_on(mixtral):
    with pytest.raises(ConfigError, match="'proj' fits no module"):
        resolve(mixtral, "q_proj", rank_pattern={"proj": 4})


def test_experts_of_one_layer_cannot_differ_in_rank(mixtral):
    with pytest.raises(ConfigError, match=r"share a rank .*experts\.0\.w1 would get 2, 16 and .*experts\.1\.w1 8, 16"):
        resolve(mixtral, "experts", rank_pattern={r"experts\.0\.w1": 2})


@pytest.mark.parametrize("section", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_no_target_is_an_error(mixtral, section):
    with pytest.raises(ConfigError, match=rf"lora.{section}: 'q_prj' fits no module .*did you mean q_proj"):
        resolve(mixtral, "q_proj", **{section: {"q_prj": 4}})


def test_a_pattern_that_is_no_expression_is_an_error(mixtral):
    with pytest.raises(ConfigError, match="not a regular expression"):
        resolve(mixtral, "q_proj", rank_pattern={"(": 4})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "did you mean q_proj"),
        ("expert", "did you mean experts"),
        ("gate_proj", r"this model has .*w1, w2, w3\)"),  # another family's name
        ("experts.0.w1", "no module is called"),  # one expert alone is no target
    ],
)
def test_an_unknown_target_is_named_with_the_names_that_exist(mixtral, target, message):
    with pytest.raises(ConfigError, match=message):
        resolve(mixtral, target)


# --- linears that become 4-bit --------------------------------------------------------------------------------------


def test_linears_of_all_decoder_layers_become_4_bit_but_head_and_router_do_not(deepseek):
    names = linears_to_quantize(deepseek)
    assert "model.layers.0.mlp.down_proj" in names
    assert "model.layers.1.mlp.shared_experts.up_proj" in names
    assert "model.layers.1.self_attn.kv_b_proj" in names
    assert not any("lm_head" in name or name.endswith("mlp.gate") for name in names)


def test_a_linear_whose_inputs_do_not_divide_into_blocks_stays_as_it_is(mixtral):
    model = build(MixtralConfig(**SIZES, num_local_experts=4))
    model.model.layers[0].self_attn.o_proj = nn.Linear(96, 64, device="meta")
    assert "model.layers.0.self_attn.o_proj" not in linears_to_quantize(model)
    assert "model.layers.1.self_attn.o_proj" in linears_to_quantize(model)


def test_linears_are_the_same_once_the_experts_have_been_swapped(mixtral):
    specs = read_names(mixtral).specs
    before = list(linears_to_quantize(mixtral))
    model = build(mixtral.config)
    for layer in model.model.layers:
        layer.mlp.experts = nn.Identity()
    assert list(linears_to_quantize(model, specs)) == before
