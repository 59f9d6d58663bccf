"""`quantization.fit`: the same bytes in a load and a folder, known by the fingerprint, refused where it is too late."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
from expertune.checkpoint.load import fingerprint_of, load_model
from expertune.checkpoint.quantize import quantize
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError
from tests.checkpoint.nf4_folders import assert_same_bytes, quantized

MSE = QuantizationConfig(fit="mse")


@pytest.fixture(scope="module")
def by_error(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixtral", quantization=MSE)


def test_a_load_and_a_folder_have_the_same_bytes_and_the_same_fingerprint(mixtral: Path, by_error: Path) -> None:
    loaded = load_model(mixtral, MSE, torch.bfloat16, "cpu")
    assert_same_bytes(loaded, load_model(by_error, QuantizationConfig(), torch.bfloat16, "cpu"))
    assert loaded.fingerprint == fingerprint_of(by_error) == fingerprint_of(mixtral, quantization=MSE)
    assert loaded.fingerprint is not None
    assert Fingerprint.from_json(loaded.fingerprint.to_json(), "here") == loaded.fingerprint
    assert read_nf4_folder(by_error).fit == "mse"


def test_weights_come_nearer_to_the_source_in_experts_and_linears(mixtral: Path) -> None:
    with safe_open(mixtral / "model.safetensors", framework="pt") as file:
        linear, expert = (
            file.get_tensor(f"model.layers.0.{name}.weight").float()
            for name in ("self_attn.o_proj", "block_sparse_moe.experts.1.w2")
        )
    errors = []
    for asked in (QuantizationConfig(), MSE):
        layer = load_model(mixtral, asked, torch.float32, "cpu").model.model.layers[0]
        held = (
            layer.self_attn.o_proj(torch.eye(linear.shape[1])).T,
            layer.mlp.experts.dequantize(1, "down", torch.float32),
        )
        errors.append(
            [float((ours - theirs).pow(2).sum()) for ours, theirs in zip(held, (linear, expert), strict=True)]
        )
    assert all(after < 0.95 * before for before, after in zip(*errors, strict=True))


def test_an_adapter_of_one_fit_is_not_put_on_another(mixtral: Path) -> None:
    found = fingerprint_of(mixtral, quantization=MSE).differences(fingerprint_of(mixtral))
    assert found == ["quantization.fit was mse and is absmax"]


def test_what_is_in_4_bits_already_gets_no_other_scales(by_error: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.fit is absmax, but .* was quantized with mse"):
        load_model(by_error, QuantizationConfig(fit="absmax"), torch.bfloat16, "cpu")
    load_model(by_error, MSE, torch.bfloat16, "cpu")


def test_a_folder_that_was_started_with_one_fit_is_not_finished_with_another(mixtral: Path, by_error: Path) -> None:
    with pytest.raises(CheckpointError, match=r'was made with quantization\.fit: "mse", and "absmax" is asked for'):
        quantize(str(mixtral), by_error)


def test_a_folder_without_a_fit_of_its_own_is_said_to_have_the_one_that_this_means(
    mixtral: Path, tmp_path: Path
) -> None:
    quantize(str(mixtral), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r'was made with quantization\.fit: "absmax", and "mse" is asked for'):
        quantize(str(mixtral), tmp_path / "out", MSE)
    with pytest.raises(CheckpointError, match=r"was made with quantization\.layers: \{\}, and \{.* is asked for"):
        quantize(str(mixtral), tmp_path / "out", QuantizationConfig(layers={"attention": 16}))
