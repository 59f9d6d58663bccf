"""The router is found by shape and place."""

import pytest
from torch import nn

from expertune.experts.contract import ExpertsSpec
from expertune.experts.router import find_router, router_block

SPEC = ExpertsSpec(num_experts=8, hidden_size=64, intermediate_size=128)


def block(**children):
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.Module()
    for name, child in children.items():
        setattr(model.mlp, name, child)
    return model


def wrapped(child):
    return nn.Sequential(child)


@pytest.mark.parametrize(
    ("children", "found"),
    [
        ({"gate": nn.Linear(64, 8)}, "mlp.gate"),
        ({"router": wrapped(nn.Linear(64, 8))}, "mlp.router.0"),
        ({"shared": nn.Linear(64, 128)}, None),
        ({}, None),
    ],
    ids=["beside", "within", "another shape", "nothing"],
)
def test_router_is_the_module_with_one_row_per_expert(children, found):
    assert find_router("mlp.experts", block(**children), SPEC) == found


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    shared = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 64))
    assert find_router("mlp.experts", block(shared_expert=shared, gate=nn.Linear(64, 8)), SPEC) == "mlp.gate"


def test_a_router_in_a_smaller_width_is_a_block_without_a_target():
    model = block(gate=nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 8)), shared=nn.Linear(64, 128))
    assert router_block("mlp.experts", model, SPEC) == "mlp.gate"
    assert find_router("mlp.experts", model, SPEC) is None
