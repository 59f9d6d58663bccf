"""LoRA on every expert: separate factors for each projection, and the arithmetic of a model of separate linears."""

import copy
import math

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from expertune.errors import ExportError
from expertune.experts.lora import ExpertLoraConfig, ExpertsLora, Ranks
from expertune.experts.module import Nf4Experts
from tests.experts.families import build_experts, random_routing

NAME = "layers.0.experts"
ALL: Ranks = {"gate": (4, 8.0), "up": (4, 8.0), "down": (4, 8.0)}


def config_of(ranks: Ranks, r: int = 4, dropout: float = 0.0, rslora: bool = False) -> ExpertLoraConfig:
    config = ExpertLoraConfig(r=r, lora_alpha=8, lora_dropout=dropout, use_rslora=rslora, target_modules=[NAME])
    config.expert_ranks = {NAME: ranks}
    return config


def filled_experts(class_name: str = "MixtralExperts") -> Nf4Experts:
    original = build_experts(class_name)
    experts = Nf4Experts(copy.deepcopy(original))
    for expert in range(experts.num_experts):
        for projection in experts.spec.projections:
            rows, columns = experts.spec.shape(projection)
            experts.write(expert, projection, torch.randn(rows, columns) / columns**0.5)
    return experts


def adapted(ranks: Ranks = ALL, r: int = 4, dropout: float = 0.0, rslora: bool = False) -> ExpertsLora:
    return ExpertsLora(filled_experts(), "default", config_of(ranks, r, dropout, rslora), target_name=NAME)


def fill_b(layer: ExpertsLora, adapter: str = "default") -> None:
    """Factors as after some training: B starts at zero, where nothing could go wrong."""
    for factor in layer.lora_B[adapter].parameters():
        nn.init.normal_(factor, std=0.2)


def naive(layer: ExpertsLora, scales: dict[tuple[str, str], float], hidden: Tensor, index: Tensor, weights: Tensor):
    """One token and one expert at a time, W + scale * B @ A written out, for SwiGLU experts."""
    experts = layer.base_layer

    def weight(expert: int, projection: str) -> Tensor:
        matrix = experts.dequantize(expert, projection, torch.float32)
        for (adapter, adapted_projection), scale in scales.items():
            if adapted_projection == projection:
                factor_a = layer.lora_A[adapter][projection][expert]
                factor_b = layer.lora_B[adapter][projection][expert]
                matrix = matrix + scale * factor_b @ factor_a
        return matrix

    outputs = []
    for token in range(hidden.shape[0]):
        total = torch.zeros(hidden.shape[1])
        for choice, expert in enumerate(index[token].tolist()):
            gate = nn.functional.silu(weight(expert, "gate") @ hidden[token])
            inner = gate * (weight(expert, "up") @ hidden[token])
            total = total + weights[token, choice] * (weight(expert, "down") @ inner)
        outputs.append(total)
    return torch.stack(outputs)


def inputs(num_tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(num_tokens, 64), *random_routing(num_tokens, 4))


def assert_equals_naive(layer: ExpertsLora, scales: dict[tuple[str, str], float]) -> None:
    hidden, index, weights = inputs()
    leaves = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    output, expected = layer(hidden, index, weights), naive(layer, scales, hidden, index, weights)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    if leaves:
        pairs = zip(
            torch.autograd.grad(output.square().sum(), leaves, allow_unused=True),
            torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True),
            strict=True,
        )
        for gradient, plain in pairs:
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-4)


def test_adapter_equals_lora_on_separate_linears_with_its_gradients() -> None:
    layer = adapted()
    fill_b(layer)
    assert_equals_naive(layer, {("default", projection): 2.0 for projection in ALL})


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_single_projection_is_adapted_alone(projection: str) -> None:
    layer = adapted({projection: (4, 8.0)})
    fill_b(layer)
    assert set(layer.lora_A["default"]) == {projection}
    assert_equals_naive(layer, {("default", projection): 2.0})


def test_each_projection_has_its_own_rank_and_alpha() -> None:
    layer = adapted({"gate": (2, 8.0), "up": (4, 8.0), "down": (6, 3.0)})
    fill_b(layer)
    shapes = {name: tuple(factor.shape) for name, factor in layer.lora_A["default"].items()}
    assert shapes == {"gate": (4, 2, 64), "up": (4, 4, 64), "down": (4, 6, 128)}
    assert_equals_naive(layer, {("default", "gate"): 4.0, ("default", "up"): 2.0, ("default", "down"): 0.5})


def test_rank_stabilised_scale_divides_by_the_root_of_the_rank() -> None:
    layer = adapted({"gate": (4, 8.0), "down": (9, 8.0)}, rslora=True)
    fill_b(layer)
    assert_equals_naive(layer, {("default", "gate"): 4.0, ("default", "down"): 8 / 3})


def test_fresh_adapter_changes_nothing() -> None:
    layer = adapted()
    hidden, index, weights = inputs()
    assert torch.equal(layer(hidden, index, weights), layer.base_layer(hidden, index, weights))


def test_first_factors_start_as_pefts_own_do() -> None:
    """Kaiming uniform with a = sqrt(5) is uniform within 1 / sqrt(in_features)."""
    layer = adapted({"gate": (64, 8.0), "down": (64, 8.0)})
    for projection, columns in (("gate", 64), ("down", 128)):
        factor = layer.lora_A["default"][projection].detach()
        linear = nn.Linear(columns, 64 * 4, bias=False)
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        assert float(factor.abs().max()) <= columns**-0.5
        assert float(factor.std()) == pytest.approx(float(linear.weight.detach().std()), rel=0.03)
        assert not layer.lora_B["default"][projection].any()


def test_mixtral_8x7b_has_the_recipes_number_of_expert_parameters() -> None:
    config = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8)
    with torch.device("meta"):
        experts = Nf4Experts(MixtralExperts(config), device="meta")
    ranks: Ranks = dict.fromkeys(("gate", "up", "down"), (8, 16.0))
    layer = ExpertsLora(experts, "default", config_of(ranks, r=8), target_name=NAME)
    assert 32 * sum(p.numel() for p in layer.parameters() if p.requires_grad) == 113_246_208


def test_dropout_acts_in_training_only_and_every_factor_still_learns() -> None:
    layer = adapted(dropout=0.5)
    fill_b(layer)
    hidden, index, weights = inputs(40)
    layer.train()
    first, second = layer(hidden, index, weights), layer(hidden, index, weights)
    assert not torch.equal(first, second)
    first.square().sum().backward()
    for factor in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        assert factor.grad is not None
        assert factor.grad.isfinite().all()
        assert all(expert.any() for expert in factor.grad)
    layer.eval()
    assert torch.equal(layer(hidden, index, weights), layer(hidden, index, weights))
    assert_equals_naive(layer, {("default", projection): 2.0 for projection in ALL})


def test_dropout_of_the_adapters_input_keeps_its_mean() -> None:
    layer = adapted({"down": (4, 8.0)}, dropout=0.5)
    fill_b(layer)
    hidden, index, weights = inputs(4)
    layer.eval()
    expected = layer(hidden, index, weights)
    layer.train()
    with torch.no_grad():
        many = layer(hidden.repeat(600, 1), index.repeat(600, 1), weights.repeat(600, 1))
        spread = (expected - layer.base_layer(hidden, index, weights)).std()
    assert (many.view(600, 4, 64).mean(dim=0) - expected).abs().mean() < 0.1 * spread


def two_adapters() -> ExpertsLora:
    layer = adapted()
    second: Ranks = {"gate": (2, 8.0), "down": (3, 3.0)}
    layer.update_layer("second", 2, 8, config_of(second, r=2), target_name=NAME)
    fill_b(layer)
    fill_b(layer, "second")
    return layer


FIRST = {("default", projection): 2.0 for projection in ALL}
SECOND = {("second", "gate"): 4.0, ("second", "down"): 1.0}


def test_a_second_adapter_waits_until_it_is_set() -> None:
    layer = two_adapters()
    assert_equals_naive(layer, FIRST)
    layer.set_adapter("second")
    assert_equals_naive(layer, SECOND)
    layer.set_adapter(["default", "second"])
    assert_equals_naive(layer, FIRST | SECOND)


def test_only_the_active_adapter_is_trainable() -> None:
    layer = two_adapters()
    layer.set_adapter("second")
    assert not any(parameter.requires_grad for parameter in layer.lora_A["default"].parameters())
    assert all(parameter.requires_grad for parameter in layer.lora_A["second"].parameters())


def test_disabled_adapters_leave_the_base_output_to_the_byte() -> None:
    layer = two_adapters()
    hidden, index, weights = inputs()
    base = layer.base_layer(hidden, index, weights)
    layer.enable_adapters(False)
    assert torch.equal(layer(hidden, index, weights), base)
    layer.enable_adapters(True)
    assert not torch.equal(layer(hidden, index, weights), base)


def test_deleted_adapter_leaves_no_trace() -> None:
    layer = two_adapters()
    layer.delete_adapter("second")
    assert not [name for name, _ in layer.named_parameters() if "second" in name]
    assert set(layer.ranks) == set(layer.scaling) == {"default"}
    assert_equals_naive(layer, FIRST)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleting_the_active_adapter_activates_the_other() -> None:
    layer = two_adapters()
    layer.delete_adapter("default")
    assert_equals_naive(layer, SECOND)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_scaling_multiplies_the_adapters_own_scale(rslora: bool) -> None:
    layer = adapted({"gate": (4, 8.0), "up": (2, 8.0)}, rslora=rslora)
    fill_b(layer)
    own = {"gate": 4.0, "up": 8 / math.sqrt(2)} if rslora else {"gate": 2.0, "up": 4.0}

    def scales(factor: float) -> dict[tuple[str, str], float]:
        return {("default", projection): factor * scale for projection, scale in own.items()}

    layer.set_scale("default", 0.5)
    assert_equals_naive(layer, scales(0.5))
    layer.scale_layer(3)
    assert_equals_naive(layer, scales(1.5))
    layer.unscale_layer(3)
    assert_equals_naive(layer, scales(0.5))
    layer.unscale_layer()
    assert_equals_naive(layer, scales(1))


def test_merging_into_four_bits_is_refused_and_unmerging_is_a_no_op() -> None:
    layer = adapted()
    with pytest.raises(ExportError, match="cannot absorb an adapter"):
        layer.merge()
    layer.unmerge()


def test_ungated_experts_are_adapted_too() -> None:
    experts = filled_experts("NemotronHExperts")
    config = config_of({"up": (4, 8.0), "down": (4, 8.0)})
    layer = ExpertsLora(experts, "default", config, target_name=NAME)
    fill_b(layer)
    width = experts.spec.hidden_size
    hidden, (index, weights) = torch.randn(9, width), random_routing(9, 4)
    layer(hidden, index, weights).square().sum().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in layer.lora_A.parameters())


def test_live_config_writes_no_expert_ranks() -> None:
    assert isinstance(config_of(ALL), LoraConfig)
    assert "expert_ranks" not in config_of(ALL).to_dict()


def test_printed_layer_says_that_it_is_lora() -> None:
    assert repr(adapted()).startswith("lora.ExpertsLora")


def test_rank_stabilized_scale_keeps_gradients_and_what_a_step_adds_of_one_size_as_the_rank_grows() -> None:
    """Kalajdzievski 2023, theorem 3.2: with alpha / r both vanish as r grows."""
    (hidden, index, weights), base = inputs(64), filled_experts()
    target = torch.randn(64, 64)

    def first_step(rank: int, rslora: bool) -> tuple[float, float]:
        """Norms of B's gradient, and of what a step of gradient descent on B adds to the output."""
        torch.manual_seed(0)
        config = config_of({"down": (rank, 8.0)}, rank, rslora=rslora)
        layer = ExpertsLora(base, "default", config, target_name=NAME)
        b = layer.lora_B["default"]["down"]
        before = layer(hidden, index, weights)
        (before - target).square().mean().backward()
        of_b = float(b.grad.norm())
        with torch.no_grad():
            b -= 0.1 * b.grad
        return of_b, float((layer(hidden, index, weights) - before).detach().norm())

    # Of ranks 4 and 256, by the root of 64 or that twice; a few random directions of A make up to twice of it.
    for rslora, shrinks in ((True, (1, 1)), (False, (8, 64))):
        small, large = first_step(4, rslora), first_step(256, rslora)
        for one, other, factor in zip(small, large, shrinks, strict=True):
            assert 0.4 < one / other / factor < 2.5
