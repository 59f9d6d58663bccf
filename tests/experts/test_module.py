"""Nf4Experts computes what transformers' own experts compute over the decoded weights, for every family."""

import copy

import pytest
import torch
from torch import Tensor, nn

from expertune.errors import UnsupportedModelError
from expertune.experts.module import Nf4Experts
from tests.experts.families import build_experts, experts_classes, random_routing

# Biases, transposed weights or a norm after each expert, in transformers 5.23.
REFUSED = {"AriaExperts", "GptOssExperts", "MuseSparkExperts", "OpenAIPrivacyFilterExperts"}


def fill(experts: Nf4Experts, original: nn.Module) -> None:
    """Quantize the original's weights into place, and put what they decode to back into the original."""
    with torch.no_grad():
        for expert in range(experts.num_experts):
            down = original.get_parameter("down_proj")
            experts.write(expert, "down", down[expert])
            down[expert] = experts.decode(expert, "down", torch.float32)
            first = original.get_parameter("gate_up_proj" if experts.spec.has_gate else "up_proj")
            inner = experts.spec.projections[:-1]
            for projection, rows in zip(inner, first[expert].chunk(len(inner)), strict=True):
                experts.write(expert, projection, rows)
            first[expert] = torch.cat([experts.decode(expert, name, torch.float32) for name in inner])


def quantized_pair(class_name: str) -> tuple[Nf4Experts, nn.Module]:
    """Our experts, and the family's own over the decoded weights."""
    original = build_experts(class_name)
    experts = Nf4Experts(copy.deepcopy(original))
    fill(experts, original)
    return experts, original


def outputs_and_gradients(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = (hidden.clone().requires_grad_(), weights.clone().requires_grad_())
    output = experts(leaves[0], index, leaves[1])
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("class_name", experts_classes())
def test_experts_of_each_family_are_computed_alike_or_refused_by_name(class_name: str) -> None:
    if class_name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=r"^experts: experts with "):
            quantized_pair(class_name)
        return
    experts, original = quantized_pair(class_name)
    hidden = torch.randn(11, 64)
    index, weights = random_routing(11, experts.num_experts)
    for ours, theirs in zip(
        outputs_and_gradients(experts, hidden, index, weights),
        outputs_and_gradients(original, hidden, index, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_experts_stay_within_the_rounding_of_their_dtype(dtype: torch.dtype) -> None:
    experts, original = quantized_pair("MixtralExperts")
    hidden = torch.randn(11, 64)
    index, weights = random_routing(11, 4)
    output = experts(hidden.to(dtype), index, weights)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), original(hidden, index, weights), rtol=2**-5, atol=2**-5)


def test_no_sixteen_bit_copy_of_the_weights_is_left() -> None:
    experts, _ = quantized_pair("MixtralExperts")
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.uint8}
    assert not any(parameter.requires_grad for parameter in experts.parameters())


def test_swapping_reads_no_weight() -> None:
    with torch.device("meta"):
        original = build_experts("MixtralExperts")
    experts = Nf4Experts(original, device="cpu")
    assert {parameter.device.type for parameter in experts.parameters()} == {"cpu"}


def test_one_expert_and_projection_is_written_without_touching_the_others() -> None:
    experts, _ = quantized_pair("MixtralExperts")
    before = {
        (expert, name): experts.decode(expert, name, torch.float32)
        for expert in range(4)
        for name in experts.spec.projections
    }
    matrix = torch.randn(128, 64)
    experts.write(2, "up", matrix)
    for (expert, name), decoded in before.items():
        same = torch.equal(experts.decode(expert, name, torch.float32), decoded)
        assert same == ((expert, name) != (2, "up"))


def test_tokens_that_no_expert_of_a_group_serves_leave_it_idle() -> None:
    experts, original = quantized_pair("MixtralExperts")
    hidden, index = torch.randn(5, 64), torch.full((5, 1), 3)
    weights = torch.ones(5, 1)
    torch.testing.assert_close(experts(hidden, index, weights), original(hidden, index, weights), rtol=1e-5, atol=1e-5)


def test_two_forwards_give_identical_bytes() -> None:
    experts, _ = quantized_pair("MixtralExperts")
    hidden = torch.randn(11, 64, dtype=torch.bfloat16)
    index, weights = random_routing(11, 4)
    assert torch.equal(experts(hidden, index, weights), experts(hidden, index, weights))


def test_state_dict_round_trip_gives_the_same_output() -> None:
    experts, _ = quantized_pair("MixtralExperts")
    again = Nf4Experts(build_experts("MixtralExperts"))
    again.load_state_dict(experts.state_dict())
    hidden = torch.randn(3, 64)
    index, weights = random_routing(3, 4)
    assert torch.equal(again(hidden, index, weights), experts(hidden, index, weights))
