"""Adapters for stock PEFT: one rank and scale for all, and in its own process what base and adapter compute."""

import copy
import json
from pathlib import Path

import pytest
import torch

from expertune.exporting.formats import Options, make_format
from expertune.exporting.source import ExportSource
from tests.adapt.conftest import logits_of, stock_peft
from tests.exporting.conftest import base_and_adapter, nothing, source_of
from tests.families import build
from tests.tiny_models import FolderOf, load_tiny, random_rows, save_random, stock_model


def exported(name: str, source: ExportSource, folder: Path) -> Path:
    form = make_format(name, Options())
    form.require(source)
    folder.mkdir()
    form.write(source, folder, nothing)
    assert form.nbytes(source) <= (folder / "adapter_model.safetensors").stat().st_size
    return folder


@pytest.mark.parametrize("name", ["peft", "peft-fused"])
def test_stock_peft_computes_what_base_and_adapter_do(name: str, mixtral_source: ExportSource, tmp_path: Path) -> None:
    folder = exported(name, mixtral_source, tmp_path / "out")
    model, ids = stock_model(mixtral_source.base.folder), random_rows(2, 16)
    expected = logits_of(base_and_adapter(mixtral_source, copy.deepcopy(model), torch.float32), ids)
    assert not torch.allclose(expected, logits_of(model, ids), atol=1e-2)
    torch.testing.assert_close(logits_of(stock_peft(model, folder), ids), expected, atol=2e-5, rtol=0)


def test_scales_are_in_b_and_no_pattern_is_left(mixtral_source: ExportSource, tmp_path: Path) -> None:
    config = json.loads((exported("peft", mixtral_source, tmp_path / "out") / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)


def test_ranks_and_scales_that_differ_become_one_rank_and_none(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", build.tiny_config("qwen3_moe"))
    patterns = {"rank_pattern": {"down_proj": 2, "q_proj": 6}, "alpha_pattern": {"gate_proj": 3}}
    source = source_of(load_tiny(folder), folder, tmp_path / "run", targets=["experts", "attention"], **patterns)
    out = exported("peft", source, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    model, ids = stock_model(folder), random_rows(2, 16)
    expected = logits_of(base_and_adapter(source, copy.deepcopy(model), torch.float32), ids)
    torch.testing.assert_close(logits_of(stock_peft(model, out), ids), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["peft", "peft-fused"])
def test_experts_without_an_adapter_are_zeros_to_stock_peft(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    folder = family_folder("mixtral")
    layers = {"model.layers.0.mlp.experts": [1], "model.layers.1.mlp.experts": [3, 0]}
    source = source_of(load_tiny(folder), folder, tmp_path / "run", experts={"share": 0.2, "layers": layers})
    out = exported(name, source, tmp_path / "out")
    model, ids = stock_model(folder), random_rows(2, 16)
    expected = logits_of(base_and_adapter(source, copy.deepcopy(model), torch.float32), ids)
    assert not torch.allclose(expected, logits_of(model, ids), atol=1e-3)
    torch.testing.assert_close(logits_of(stock_peft(model, out), ids), expected, atol=2e-5, rtol=0)
