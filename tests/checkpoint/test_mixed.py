"""`quantization.layers`: linears that stay in 16 bits, in a load and in a folder; what it refuses."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
from expertune.checkpoint.hf_quantizer import as_loaded
from expertune.checkpoint.load import LoadedModel, fingerprint_of, load_model
from expertune.checkpoint.quantize import quantize
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError
from tests.checkpoint.conftest import FolderOf
from tests.checkpoint.nf4_folders import quantized

ATTENTION = QuantizationConfig(layers={"attention": 16})


@pytest.fixture(scope="module")
def mixed(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixed", quantization=ATTENTION)


def load(folder: Path, **quantization: object) -> LoadedModel:
    return load_model(folder, QuantizationConfig.model_validate(quantization), torch.bfloat16, "cpu")


def whole_linears(loaded: LoadedModel) -> set[str]:
    layers = loaded.model.model.layers
    return {
        name
        for name, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, Linear4bit)
    }


def test_attention_has_the_weights_of_the_checkpoint_and_experts_stay_in_4_bits(mixtral: Path) -> None:
    loaded = load(mixtral, layers={"attention": 16})
    attention = loaded.model.model.layers[0].self_attn
    with safe_open(mixtral / "model.safetensors", framework="pt") as file:
        source = file.get_tensor("model.layers.0.self_attn.v_proj.weight")
    assert torch.equal(attention.v_proj.weight, source.to(torch.bfloat16))
    assert not attention.v_proj.weight.requires_grad
    assert loaded.model.model.layers[0].mlp.experts.down.scheme == "nf4"


def test_the_first_key_that_fits_decides(mixtral: Path) -> None:
    loaded = load(mixtral, layers={r"layers\.0\..*k_proj": 4, "attention": 16, "o_proj": 4})
    assert "0.self_attn.k_proj" not in whole_linears(loaded)
    assert {"0.self_attn.o_proj", "0.self_attn.q_proj"} <= whole_linears(loaded)


def test_a_folder_computes_what_the_load_computes_and_is_the_same_base_which_plain_nf4_is_not(
    mixtral: Path, mixed: Path
) -> None:
    loaded, stored = load(mixtral, layers={"attention": 16}), load(mixed)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.model(ids).logits, stored.model(ids).logits)
    assert not torch.equal(loaded.model(ids).logits, load(mixtral).model(ids).logits)
    by_transformers = as_loaded(AutoModelForCausalLM.from_pretrained(mixed))
    before = fingerprint_of(mixtral, quantization=ATTENTION)
    assert loaded.fingerprint == stored.fingerprint == by_transformers.fingerprint == before == fingerprint_of(mixed)
    assert before.differences(fingerprint_of(mixtral)) == [
        "quantization.layers was {k_proj: 16, o_proj: 16, q_proj: 16, v_proj: 16} and is {}"
    ]
    assert read_nf4_folder(mixed).index.tensors["model.layers.0.self_attn.q_proj.weight"].dtype != torch.uint8


def test_a_folder_keeps_the_layers_that_it_was_written_with(mixtral: Path, mixed: Path) -> None:
    load(mixed, layers={"attention": 16})
    with pytest.raises(ConfigError, match=r"quantization\.layers: .*mixed has .*self_attn\.k_proj in 16 bits; remove"):
        load(mixed, layers={"o_proj": 16})
    with pytest.raises(CheckpointError, match=r"was made with quantization\.layers: "):
        quantize(str(mixtral), mixed)


@pytest.mark.parametrize(
    ("layers", "canonical"),
    [
        ({"attention": 16}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ({"v_proj": 16, "(q|k)_proj": 16, "o_proj": 16, "attention": 4}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ({r".*\.1\.self_attn\.o_proj": 16}, ["layers.(1).self_attn.o_proj"]),
        ({"o_proj": 4}, []),
        ({}, []),
    ],
)
def test_the_fingerprint_has_the_same_layers_however_they_were_written(
    layers: dict[str, int], canonical: list[str], mixtral: Path
) -> None:
    asked = QuantizationConfig.model_validate({"layers": layers})
    found = fingerprint_of(mixtral, quantization=asked).held.layers
    assert found == dict.fromkeys(canonical, 16)
    # What it says can be asked for, and gives the same again.
    assert fingerprint_of(mixtral, quantization=QuantizationConfig(layers=found)).held.layers == found


def test_layers_of_one_projection_in_two_places_are_told_apart(family_folder: FolderOf) -> None:
    folder = family_folder("deepseek_v3")
    shared = QuantizationConfig(layers={r".*shared_experts\.down_proj": 16})
    found = fingerprint_of(folder, quantization=shared).held.layers
    assert found
    assert all("shared_experts.down_proj" in key for key in found)
    assert fingerprint_of(folder, quantization=QuantizationConfig(layers=found)).held.layers == found


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("experts", "names experts, which are always in 4 bits"),
        ("w1", "names experts, which are always in 4 bits"),
        ("q_prog", r"'q_prog' fits no linear .*; did you mean q_proj\? \(this model has attention, "),
        ("lm_head", "'lm_head' fits no linear that would be in 4 bits"),
        ("(", "is not a regular expression"),
    ],
)
def test_a_key_that_fits_nothing_is_refused(mixtral: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(mixtral, layers={key: 16})


def test_other_numbers_of_bits_are_refused_by_the_run_file() -> None:
    with pytest.raises(ValueError, match="layers"):
        QuantizationConfig.model_validate({"layers": {"attention": 8}})
