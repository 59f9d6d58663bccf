"""Planned bytes are the bytes that a load holds, whatever the family and however its checkpoint is packed."""

import pytest
import torch

from expertune.checkpoint.load import load_model
from expertune.checkpoint.quantize import quantize
from expertune.config import QuantizationConfig
from expertune.planning import make_plan
from tests.families.build import model_types, tiny_config
from tests.planning.test_counts import resident_bytes
from tests.tiny_models import FAMILIES, save_random, save_tiny_model

# Fills blocks of noise, and cannot be built at this size.
NO_LANGUAGE_MODEL = ("diffusion_gemma",)


def held(folder, dtype="float32", **quantization) -> int:
    loaded = load_model(folder, QuantizationConfig(**quantization), getattr(torch, dtype), "cpu")
    return resident_bytes(loaded.model)


def planned(run_of, folder, dtype="float32", **quantization) -> int:
    run = run_of(folder, quantization={"compute_dtype": dtype, **quantization}, lora={"targets": ["experts"]})
    return make_plan(run, device="cpu").weights.frozen_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_bytes_of_a_family_are_those_that_a_load_holds(run_of, tmp_path, family):
    folder = save_tiny_model(tmp_path, family)
    assert planned(run_of, folder, "bfloat16") == held(folder, "bfloat16")


@pytest.mark.parametrize("family", [family for family in model_types() if family not in NO_LANGUAGE_MODEL])
def test_planned_bytes_of_every_familys_tiny_model_are_those_that_a_load_holds(run_of, tmp_path, family):
    folder = save_random(tmp_path, tiny_config(family))
    assert planned(run_of, folder) == held(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_of_linears_that_stay_in_16_bits_are_those_that_a_load_holds(run_of, tmp_path, dtype):
    folder, layers = save_tiny_model(tmp_path, "mixtral"), {"o_proj": 4, "attention": 16}
    assert planned(run_of, folder, dtype, layers=layers) == held(folder, dtype, layers=layers)
    assert planned(run_of, folder, dtype, layers=layers) > planned(run_of, folder, dtype)


def test_linears_that_stay_in_16_bits_are_planned_so_from_a_config_alone(run_of, tmp_path):
    folder, layers = save_tiny_model(tmp_path, "mixtral"), {"attention": 16}
    known = planned(run_of, folder, layers=layers)
    (folder / "model.safetensors").unlink()
    assert planned(run_of, folder, layers=layers) == known


@pytest.mark.parametrize("double_quantization", [True, False])
def test_planned_bytes_of_an_nf4_folder_are_those_that_a_load_holds(run_of, tmp_path, double_quantization):
    source, folder = save_tiny_model(tmp_path / "source", "mixtral"), tmp_path / "nf4"
    quantize(str(source), folder, QuantizationConfig(double_quantization=double_quantization))
    assert planned(run_of, folder) == held(folder)
    assert make_plan(run_of(folder), device="cpu").disk.download_bytes is not None
