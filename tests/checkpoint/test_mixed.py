"""`quantization.layers`: linears that stay in 16 bits, in a load and in a folder; what it refuses."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open

from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
from expertune.checkpoint.load import LoadedModel, load_model
from expertune.checkpoint.quantize import quantize
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError
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


def test_a_folder_computes_what_the_load_computes_and_is_the_same_base(mixtral: Path, mixed: Path) -> None:
    loaded, stored = load(mixtral, layers={"attention": 16}), load(mixed)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.model(ids).logits, stored.model(ids).logits)
    assert not torch.equal(loaded.model(ids).logits, load(mixtral).model(ids).logits)
    assert loaded.fingerprint == stored.fingerprint == load(mixtral).fingerprint
    assert read_nf4_folder(mixed).index.tensors["model.layers.0.self_attn.q_proj.weight"].dtype != torch.uint8


def test_a_folder_keeps_the_layers_that_it_was_written_with(mixtral: Path, mixed: Path) -> None:
    load(mixed, layers={"attention": 16})
    with pytest.raises(ConfigError, match=r"quantization\.layers: .*mixed has .*self_attn\.k_proj in 16 bits; remove"):
        load(mixed, layers={"o_proj": 16})
    with pytest.raises(CheckpointError, match="was started with quantization"):
        quantize(str(mixtral), mixed)


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
