"""Nf4Experts computes what transformers' own experts compute over the dequantized weights, for every family."""

import copy

import pytest
import torch
from torch import Tensor, nn

from expertune.experts import layout
from expertune.experts.module import Nf4Experts, keep_inner
from expertune.kernels.amounts import kept_bytes_per_routed_token
from tests.experts.families import build_experts, experts_classes, from_matrices, random_routing


@torch.no_grad()
def fill(experts: Nf4Experts, original: nn.Module) -> None:
    """Quantize the original's weights into place, and put what they dequantize to back into the original."""
    spec = experts.spec
    for weight in spec.weight_names:
        stack = original.get_parameter(weight)
        for expert, live in enumerate(stack):
            projections = layout.fused_projections(spec, weight)
            for projection, matrix in zip(projections, layout.to_matrices(spec, weight, live), strict=True):
                experts.write(expert, projection, matrix.contiguous())
            dequantized = [experts.dequantize(expert, projection, torch.float32) for projection in projections]
            stack[expert] = from_matrices(spec, weight, dequantized)
    for name, parameter in experts.named_parameters():
        if name.endswith("_bias"):
            parameter.copy_(experts.arrange(name, original.get_parameter(name)))


def quantized_pair(class_name: str) -> tuple[Nf4Experts, nn.Module]:
    """Our experts, and the family's own over the dequantized weights."""
    original = build_experts(class_name)
    experts = Nf4Experts(copy.deepcopy(original))
    fill(experts, original)
    return experts, original


def outputs_and_gradients(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = (hidden.clone().requires_grad_(), weights.clone().requires_grad_())
    output = experts(leaves[0], index, leaves[1])
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("class_name", experts_classes())
def test_experts_of_each_family_are_computed_alike(class_name: str) -> None:
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
        (expert, name): experts.dequantize(expert, name, torch.float32)
        for expert in range(4)
        for name in experts.spec.projections
    }
    matrix = torch.randn(128, 64)
    experts.write(2, "up", matrix)
    for (expert, name), dequantized in before.items():
        same = torch.equal(experts.dequantize(expert, name, torch.float32), dequantized)
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


def test_norm_after_each_expert_and_biases_keep_the_names_that_the_family_gives_them() -> None:
    original = build_experts("MuseSparkExperts")
    normed = Nf4Experts(copy.deepcopy(original))
    kept = {name for name in original.state_dict() if name.startswith("post_expert_norm.")}
    assert kept
    assert kept <= normed.state_dict().keys()
    biased = Nf4Experts(build_experts("GptOssExperts"))
    assert {"gate_up_proj_bias", "down_proj_bias"} <= dict(biased.named_parameters()).keys()


def test_copied_experts_hold_tensors_of_their_own() -> None:
    experts, original = quantized_pair("GptOssExperts")
    copied = copy.deepcopy(experts)
    hidden = torch.randn(5, 64)
    index, weights = random_routing(5, 4)
    with torch.no_grad():
        copied.get_parameter("down_proj_bias").add_(1)
    torch.testing.assert_close(experts(hidden, index, weights), original(hidden, index, weights), rtol=1e-5, atol=1e-5)
    moved = copied(hidden, index, weights) - original(hidden, index, weights)
    torch.testing.assert_close(moved, weights.sum(1, keepdim=True).expand(5, 64), rtol=1e-4, atol=1e-4)


def test_as_many_of_the_last_layers_as_asked_for_keep_what_their_first_gemm_gave_and_copies_do_too() -> None:
    model = torch.nn.ModuleList(Nf4Experts(build_experts("MixtralExperts")) for _ in range(3))

    def keeping() -> list[bool]:
        return [module.layer.keeps for module in copy.deepcopy(model)]

    assert keeping() == [False, False, False]
    keep_inner(model, 2)
    assert keeping() == [False, True, True]
    keep_inner(model, 1)
    assert keeping() == [False, False, True]
    keep_inner(model, 4)
    assert keeping() == [True, True, True]


def test_bytes_that_a_routed_token_keeps_are_those_of_all_parts_in_the_tokens_dtype() -> None:
    assert kept_bytes_per_routed_token(7168, 2, torch.float32) == 57_344
    assert kept_bytes_per_routed_token(7168, 1, torch.bfloat16) == 14_336
