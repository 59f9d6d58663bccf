"""A base model is known again by its fingerprint, in 16 bits or as an NF4 folder, and no other is taken for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.load import fingerprint_of
from expertune.config import QuantizationConfig
from tests.checkpoint.conftest import FolderOf, Rewrite
from tests.checkpoint.nf4_folders import quantized
from tests.tiny_models import load_tiny, save_tiny_model

KINDS = ["embeddings", "experts", "linears", "norms", "output_head", "routers"]


@pytest.fixture(scope="module")
def of_mixtral(mixtral: Path) -> Fingerprint:
    return fingerprint_of(mixtral)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "float16", "quantization": QuantizationConfig(double_quantization=False)}]
)
def test_fingerprint_of_an_nf4_folder_is_that_of_its_source(
    family: str, settings: dict[str, Any], family_folder: FolderOf, tmp_path: Path
) -> None:
    source = family_folder(family)
    out = quantized(source, tmp_path / "out", **settings)
    expected = fingerprint_of(source)
    assert sorted(expected.weights) == KINDS
    assert fingerprint_of(out) == expected
    for folder in (source, out):
        assert load_tiny(folder, torch.bfloat16).fingerprint == expected


def test_fingerprint_survives_other_shards_dtypes_and_config_keys_without_meaning(
    rewrite: Rewrite, of_mixtral: Fingerprint
) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.float() for key, tensor in tensors.items()})

    changed = {"use_cache": False, "transformers_version": "9", "dtype": "float32", "eos_token_id": [2, 3]}
    other = fingerprint_of(rewrite(widen, shard_of=lambda key: len(key) % 3, **changed))
    assert other == of_mixtral


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "output head"),
        ("model.layers.1.input_layernorm.weight", "norms"),
        ("model.layers.1.block_sparse_moe.gate.weight", "routers"),
        ("model.layers.0.self_attn.o_proj.weight", "linears"),
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "experts"),
    ],
)
def test_fingerprint_distinguishes_weights_that_one_tensor_sets_apart(
    key: str, kind: str, rewrite: Rewrite, of_mixtral: Fingerprint
) -> None:
    other = fingerprint_of(rewrite(lambda tensors: tensors.update({key: tensors[key] * -1.25})))
    assert of_mixtral.differences(other) == [f"other weights ({kind})"]


def test_fingerprint_names_the_config_value_that_differs(tmp_path: Path, of_mixtral: Fingerprint) -> None:
    other = fingerprint_of(save_tiny_model(tmp_path, "mixtral", num_hidden_layers=3, rms_norm_eps=1e-4))
    differences = of_mixtral.differences(other)
    assert "num_hidden_layers was 2 and is 3" in differences
    assert any(difference.startswith("rms_norm_eps was ") for difference in differences)


def test_fingerprint_is_compared_by_what_both_sides_have(of_mixtral: Fingerprint) -> None:
    kept = Fingerprint.from_json(json.loads(json.dumps(of_mixtral.to_json())), "here")
    assert kept == of_mixtral
    assert Fingerprint().differences(of_mixtral) == of_mixtral.differences(Fingerprint()) == []
    for unknown in (None, [], {}, {"version": 99}, {"version": 1, "config": 3}):
        assert Fingerprint.from_json(unknown, "here") is None


def test_a_fingerprint_of_an_earlier_release_says_nothing_of_layers_scheme_and_calibration(mixtral: Path) -> None:
    asked = QuantizationConfig(layers={"attention": 16})
    now = fingerprint_of(mixtral, quantization=asked)
    earlier = {key: value for key, value in now.to_json().items() if key not in ("layers", "scheme", "calibration")}
    before = Fingerprint.from_json(earlier, "here")
    assert before is not None
    assert before.differences(now) == now.differences(before) == []
    assert before.differences(fingerprint_of(mixtral, quantization=QuantizationConfig(fit="mse"))) == [
        "quantization.fit was absmax and is mse"
    ]
