"""Numbers of parameters and exact bytes."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from expertune.checkpoint.load import load_model
from expertune.config import QuantizationConfig
from expertune.kernels.nf4 import Nf4Stack
from expertune.planning import make_plan

from .conftest import TINY_MIXTRAL, TUTORIAL_LORA


def test_plan_of_mixtral_recipe_gives_the_tutorials_line(run_of):
    parameters = make_plan(run_of("mixtral-8x7b-v0.1", lora=TUTORIAL_LORA)).parameters
    assert parameters.total == 46_702_792_704
    assert parameters.trainable == 120_350_720
    assert parameters.packed == 23_602_952_192
    assert parameters.line == (
        "trainable params: 120350720 || all params: 23602952192 || trainable%: 0.5098968934945001"
    )


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [(["w1", "w2", "w3"], 113_246_208), (["attention"], 6_815_744), (["lm_head"], 288_768), (["router"], 1_050_624)],
)
def test_parts_of_the_mixtral_recipe(run_of, targets, trainable):
    plan = make_plan(run_of("mixtral-8x7b-v0.1", lora={"r": 8, "targets": targets}))
    assert plan.parameters.trainable == trainable


@pytest.mark.parametrize(("model", "total"), [("qwen3-30b-a3b", 30_532_122_624), ("deepseek-v2-lite", 15_706_484_224)])
def test_plan_counts_other_families_from_their_config_alone(run_of, model, total):
    plan = make_plan(run_of(model))
    assert plan.parameters.total == total
    # All but embeddings and head is linear, and counts half.
    assert 0.5 < (plan.parameters.packed - plan.parameters.trainable) / total < 0.53


def test_deepseek_shared_and_dense_layers_are_adapted_with_the_routed_experts_of_the_same_name(run_of):
    routed = 26 * 64 * 8 * (2048 + 1408)
    shared = 26 * 8 * (2048 + 2816)
    dense = 8 * (2048 + 10944)
    plan = make_plan(run_of("deepseek-v2-lite", lora={"r": 8, "targets": ["gate_proj"]}))
    assert plan.parameters.trainable == routed + shared + dense


def test_rank_pattern_changes_the_count(run_of):
    lora = {"r": 8, "targets": ["w1", "w2"], "rank_pattern": {"w2": 16}}
    one = 32 * 8 * (4096 + 14336)
    assert make_plan(run_of("mixtral-8x7b-v0.1", lora=lora)).parameters.trainable == one * (8 + 16)


def test_dora_adds_a_number_for_each_output_feature(run_of):
    lora = {"r": 8, "targets": ["w1", "w2", "lm_head"]}
    plain, dora = (
        make_plan(run_of("mixtral-8x7b-v0.1", lora=lora | {"use_dora": on}, kernels={"keep": 0}))
        for on in (False, True)
    )
    magnitudes = 32 * 8 * (14336 + 4096) + 32000
    assert dora.parameters.trainable == plain.parameters.trainable + magnitudes
    assert dora.memory.peak_bytes > plain.memory.peak_bytes
    assert dora.time.seconds > plain.time.seconds


def test_tied_embeddings_count_once(run_of, tmp_path):
    from transformers import GraniteMoeConfig

    GraniteMoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    experts, attention, router, norms = 4 * 3 * 64 * 64, 4 * 64 * 64, 4 * 64, 3 * 64
    parameters = make_plan(run_of(tmp_path, lora={"r": 1, "targets": ["lm_head"]})).parameters
    assert parameters.total == 512 * 64 + experts + attention + router + norms
    assert parameters.packed == 512 * 64 + (experts + attention + router) // 2 + norms + (512 + 64)


def test_experts_of_mixtral_take_four_bits_and_their_scales(run_of):
    weights = make_plan(run_of("mixtral-8x7b-v0.1", quantization={"compute_dtype": "bfloat16"})).weights
    one = 4096 * 14336
    assert weights.experts_bytes == 32 * 8 * 3 * (one // 2 + one // 64 + one // 64 // 256 * 4 + 4)
    assert weights.unquantized_bytes == 2 * (2 * 32000 * 4096 + 32 * (8 * 4096 + 2 * 4096) + 4096)
    assert weights.buffers_bytes == 2 * 64 * 4


@pytest.mark.parametrize(("double_quantization", "scales"), [(True, 128 + 4 + 4), (False, 128 * 4)])
def test_one_absmax_in_float32_without_double_quantization(run_of, tmp_path, double_quantization, scales):
    from transformers import GraniteMoeConfig

    GraniteMoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    weights = make_plan(run_of(tmp_path, quantization={"double_quantization": double_quantization})).weights
    assert weights.experts_bytes == 4 * 3 * (64 * 128 // 2 + scales)


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_planned_bytes_are_the_bytes_that_a_load_holds(run_of, double_quantization, dtype):
    quantization = {"double_quantization": double_quantization, "compute_dtype": dtype}
    plan = make_plan(run_of(TINY_MIXTRAL, quantization=quantization), device="cpu")
    loaded = load_model(TINY_MIXTRAL, QuantizationConfig(**quantization), getattr(torch, dtype), "cpu")
    stacks = [module for module in loaded.model.modules() if isinstance(module, Nf4Stack)]
    assert plan.weights.experts_bytes == sum(stack.nbytes for stack in stacks)
    assert plan.weights.frozen_bytes == resident_bytes(loaded.model)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of every tensor that a loaded model holds, codebooks aside."""
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            total += state.absmax.nbytes
            if state.nested:
                total += state.offset.nbytes + state.state2.absmax.nbytes
    return total
