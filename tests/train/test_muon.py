"""Muon over stacked factors against torch.optim.Muon on each expert's matrix; what it leaves to AdamW."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.planning import make_plan
from expertune.train.muon import StackedMuon
from expertune.train.optimizers import MuonSettings

SHAPES = {"A": (5, 4, 33), "B": (5, 27, 4), "square": (3, 7, 7), "of a linear": (4, 33)}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_updates_of_a_stack_are_those_of_torchs_muon_on_each_matrix(shape: tuple[int, ...], adjust: str) -> None:
    stacked = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(each.clone()) for each in stacked.detach().reshape(-1, *shape[-2:])]
    start = stacked.detach().clone()
    settings = MuonSettings(momentum=0.9, adjust_lr_fn=adjust)
    optimizer = StackedMuon([{"params": [stacked], "muon": True, "weight_decay": 0.1}], 0.02, settings)
    reference = torch.optim.Muon(alone, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust)
    for _ in range(3):
        stacked.grad = torch.randn(shape)
        gradients = stacked.grad.reshape(-1, *shape[-2:])
        if len(shape) == 3:
            gradients[1] = 0  # an expert without tokens
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        reference.step()
    wanted = torch.stack([each.detach() for each in alone]).reshape(shape)
    for found, each, begun in zip(
        *(t.reshape(-1, *shape[-2:]) for t in (stacked.detach(), wanted, start)), strict=True
    ):
        # Products in bfloat16 are rounded otherwise in a batch than alone.
        assert relative(found - begun, each - begun) < 0.02


def test_what_is_no_matrix_of_a_layer_is_updated_as_by_torchs_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    optimizer = StackedMuon([{"params": [ours], "weight_decay": 0.1}], 0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(6, 5)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_muon_without_a_factor_to_update_is_refused_before_the_model_is_loaded(run_values: dict[str, Any]) -> None:
    run_values["lora"]["targets"] = ["router", "lm_head"]
    run_values["training"]["optim"] = "muon"
    with pytest.raises(ConfigError, match="muon, and the adapter has no factor that it updates"):
        make_plan(parse_config(run_values), torch.device("cpu"), memory="8GB")
    run_values["training"]["optim_args"] = "momentm=0.9"
    with pytest.raises(ConfigError, match="muon has no setting 'momentm'"):
        make_plan(parse_config(run_values), torch.device("cpu"), memory="8GB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("momentm=0.9", r"muon has no setting 'momentm'; it has momentum, nesterov, ns_steps, adjust_lr_fn"),
        ("momentum=nan", "momentum has to be a number from 0 to below 1, got 'nan'"),
        ("nesterov=1", "nesterov has to be true or false"),
        ("ns_steps=0", "ns_steps has to be a number from 1 to 99"),
        ("adjust_lr_fn", "adjust_lr_fn has to be match_rms_adamw or original, got ''"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MuonSettings.parse(text)


def test_settings_are_read_as_transformers_writes_them() -> None:
    assert MuonSettings.parse("momentum=0.9, nesterov=false,adjust_lr_fn=original") == MuonSettings(
        0.9, False, adjust_lr_fn="original"
    )
