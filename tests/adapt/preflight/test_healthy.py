"""The preflight check passes a healthy model, counts what it has seen, and leaves all as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.load import LoadedModel
from expertune.errors import PreflightError
from expertune.experts.lora import ExpertsLora
from tests.adapt.conftest import FolderOf, train_a_little
from tests.adapt.preflight.conftest import Batch, batch_of, check, concatenated_batch, padded_batch, prepared
from tests.tiny_models import FAMILIES, changed, load_tiny


@pytest.mark.parametrize("make", [batch_of, concatenated_batch, padded_batch])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_healthy_model_passes(make: Any, dropout: float, loaded: LoadedModel, order: str) -> None:
    batch = make()
    model, base = prepared(loaded, batch, dropout=dropout)
    forwards = count_forwards(loaded)
    report = check(model, batch, base)
    # With gradients, as a step computes it; with the adapter, twice; without it.
    assert forwards == ([False, False, False, True] if order == "in turns" else [True, False, False, False])
    assert report["passed"]
    assert report["learning"]["factors_learning"] + report["learning"]["factors_without_tokens"] == 2 * (
        2 * 4 * 3 + 2 * 4 + 2 + 1
    )
    assert report["learning"]["factors_without_tokens"] <= 12
    assert report["effective"]["largest_logit_change"] > 0
    assert report["effective"]["disabled_equals_base"]


def count_forwards(loaded: LoadedModel) -> list[bool]:
    """Whether it was in training, of each forward of a model from now on."""
    forwards: list[bool] = []
    loaded.model.register_forward_pre_hook(lambda module, inputs: forwards.append(module.training))
    return forwards


def test_family_that_computes_otherwise_in_training_is_compared_in_evaluation(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    norm = loaded.model.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.1, module.training))
    assert check(model, batch, base)["repeatable"]


def _order(pair: tuple[ExpertPeftModel, Tensor], batch: Batch) -> tuple[ExpertPeftModel, Batch, Tensor]:
    return pair[0], batch, pair[1]


def test_four_bit_figures_follow_from_the_sizes(loaded: LoadedModel) -> None:
    batch = batch_of()
    bits = check(*_order(prepared(loaded, batch), batch))["four_bit"]
    weights = 2 * 4 * 3 * 64 * 128
    assert bits["expert_weights"] == weights
    # A byte of absmax for 64 weights; per matrix of 128 blocks one nested absmax and one offset of 4 bytes.
    assert bits["expert_bytes"] == weights // 2 + weights // 64 + 2 * 4 * 3 * 8
    assert bits["bits_per_expert_weight"] == round(8 * bits["expert_bytes"] / weights, 4)
    assert bits["linear_weights"] == 2 * (2 * 64 * 64 + 2 * 64 * 32)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_healthy_models_of_other_families_pass(family: str, family_folder: FolderOf) -> None:
    loaded, batch = load_tiny(family_folder(family)), batch_of(8, 32)
    assert check(*_order(prepared(loaded, batch), batch))["passed"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_healthy_half_precision_model_passes(dtype: torch.dtype, mixtral: Path) -> None:
    loaded, batch = load_tiny(mixtral, dtype), batch_of()
    assert check(*_order(prepared(loaded, batch, dtype="bfloat16"), batch))["passed"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_healthy_model_passes_under_activation_checkpointing(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert check(model, batch, base)["passed"]


def test_experts_that_the_rows_do_not_reach_are_counted_not_blamed(loaded: LoadedModel) -> None:
    batch = batch_of(1, 3)
    report = check(*_order(prepared(loaded, batch), batch))
    assert report["learning"]["factors_without_tokens"] > 0


def test_factors_mode_gradients_and_random_state_are_as_before(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch, dropout=0.1)
    train_a_little(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    check(model, batch, base)
    assert changed(before, dict(model.state_dict())) == []
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, ExpertsLora))


def test_factors_are_restored_when_a_check_fails(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PreflightError):
        check(model, batch, base + 1)
    assert changed(before, dict(model.state_dict())) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_second_check_gives_the_same_report(loaded: LoadedModel) -> None:
    batch = batch_of()
    model, base = prepared(loaded, batch)
    first, second = check(model, batch, base), check(model, batch, base)
    assert first["four_bit"] == second["four_bit"]
    assert first["learning"] == second["learning"]


def test_the_errors_older_name_still_catches_it():
    from expertune.errors import ProofError

    assert ProofError is PreflightError
