"""Names on disk and live names, by transformers' own mapping, both ways."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import Destination, NameMap, read_names
from expertune.checkpoint.reader import INDEX_NAME
from tests.checkpoint.conftest import FolderOf
from tests.tiny_models import FAMILIES, tiny_config

REAL = Path(__file__).parents[1] / "planning" / "files" / "mixtral-8x7b-v0.1"


def names_of(family: str) -> NameMap:
    with torch.device("meta"):
        return read_names(AutoModelForCausalLM.from_config(tiny_config(family)))


def test_every_one_of_mixtral_8x7bs_995_names_has_a_place_in_the_live_model() -> None:
    model = build_meta_model(REAL, torch.bfloat16)
    names = read_names(model)
    keys = list(json.loads((REAL / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
    assert len(keys) == 995
    destinations = [names.locate(key) for key in keys]
    assert len(set(destinations)) == 995
    live = {name for name, _ in model.named_parameters()}
    plain = {destination.name for destination in destinations if destination.projection is None}
    experts = {(d.name, d.projection, d.expert) for d in destinations if d.projection is not None}
    assert plain == {name for name in live if ".experts." not in name}
    assert experts == {
        (f"model.layers.{layer}.mlp.experts", projection, expert)
        for layer in range(32)
        for projection in ("gate", "up", "down")
        for expert in range(8)
    }


def test_mixtrals_w1_is_the_gate_w3_is_up_and_w2_is_down() -> None:
    names = names_of("mixtral")
    assert names.projection_names == {"gate": "w1", "up": "w3", "down": "w2"}
    located = names.locate("model.layers.1.block_sparse_moe.experts.3.w3.weight")
    assert located == Destination("model.layers.1.mlp.experts", "up", 3)
    assert names.expert_on_disk("model.layers.1.mlp.experts", 3, "up") == "model.layers.1.block_sparse_moe.experts.3.w3"


def test_experts_that_are_fused_on_disk_have_no_index() -> None:
    located = names_of("mixtral").locate("model.layers.0.mlp.experts.gate_up_proj")
    assert located == Destination("model.layers.0.mlp.experts", "gate_up", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_saved_name_has_its_own_place_in_the_live_model(family: str, family_folder: FolderOf) -> None:
    folder = family_folder(family)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    names = read_names(model)
    live = model.state_dict().keys()
    destinations = [names.locate(key) for key in keys]
    assert len(set(destinations)) == len(keys)
    for destination in destinations:
        assert destination.name in (names.specs if destination.projection else live)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "granitemoe"])
def test_names_written_for_experts_are_the_checkpoints_own(family: str, family_folder: FolderOf) -> None:
    folder = family_folder(family)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    names = names_of(family)
    for module, spec in names.specs.items():
        for projection in spec.projections:
            for expert in range(spec.num_experts):
                assert f"{names.expert_on_disk(module, expert, projection)}.weight" in keys


@pytest.mark.parametrize("family", FAMILIES)
def test_live_names_lead_back_to_the_checkpoints_own(family: str, family_folder: FolderOf) -> None:
    with safe_open(family_folder(family) / "model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    names = names_of(family)
    for key in keys:
        destination = names.locate(key)
        if destination.projection is None:
            assert names.on_disk(destination.name) == key


def test_names_of_a_base_model_without_its_head_are_found_too() -> None:
    located = names_of("mixtral").locate("layers.0.self_attn.q_proj.weight")
    assert located == Destination("model.layers.0.self_attn.q_proj.weight")
