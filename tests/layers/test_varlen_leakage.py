"""A model that lets one concatenated sequence know of another is found before it is trained."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from expertune.checkpoint.load import swap_experts
from expertune.checkpoint.recipe import Recipe
from expertune.errors import UnsupportedModelError
from expertune.experts.module import experts_passed_by
from expertune.layers.varlen_attention import require_no_leakage
from tests.layers.concatenated import pair


@pytest.fixture
def varlen_and_a_state() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model without leakage, and the same with a layer that hands each token a little of the one before it."""
    varlen, _ = pair()
    mixing, _ = pair()

    def carry(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output + 1e-3 * output.roll(1, dims=1)

    mixing.model.layers[0].mlp.register_forward_hook(carry)
    return varlen, mixing


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "phimoe"])
def test_model_that_keeps_sequences_apart_passes_and_is_left_as_it_was(family: str) -> None:
    varlen, _ = pair(family)
    require_no_leakage(varlen)
    assert all(parameter.grad is None for parameter in varlen.parameters())
    assert varlen.get_input_embeddings()(torch.tensor([[3]])).grad_fn is not None


def test_frozen_model_can_be_tried(varlen_and_a_state: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    varlen, mixing = varlen_and_a_state
    for model in varlen_and_a_state:
        model.requires_grad_(False)
    with torch.no_grad():
        require_no_leakage(varlen)
        with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM does not keep .* apart.*packing=padded"):
            require_no_leakage(mixing)


def test_sequences_that_mix_a_little_in_bfloat16_are_found(
    varlen_and_a_state: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    varlen, mixing = (model.to(torch.bfloat16) for model in varlen_and_a_state)
    require_no_leakage(varlen)
    with pytest.raises(UnsupportedModelError, match="does not keep concatenated sequences apart"):
        require_no_leakage(mixing)


@pytest.mark.parametrize("renormalizes", [True, False])
def test_router_that_reads_the_token_before_is_found_with_its_experts_passed_by(renormalizes: bool) -> None:
    varlen, _ = pair("qwen3_moe", norm_topk_prob=renormalizes)
    swap_experts(varlen, Recipe(), "meta")
    with experts_passed_by(varlen):
        require_no_leakage(varlen)
        router = varlen.model.layers[0].mlp.gate
        router.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1e-2 * inputs[0].roll(1, dims=0),))
        with pytest.raises(UnsupportedModelError, match="does not keep concatenated sequences apart"):
            require_no_leakage(varlen)
