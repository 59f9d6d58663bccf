"""Which 4-bit base of a source an adapter says it belongs to: what is written is read back, and nothing else is."""

import time
from typing import Any, get_args

import pytest

from expertune.checkpoint.formats.nf4_folder import FITS
from expertune.checkpoint.held import Held
from expertune.checkpoint.load import fingerprint_of
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError
from tests.tiny_models import FAMILIES, FolderOf

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_of_a_base_is_read_back(family: str, family_folder: FolderOf) -> None:
    for layers in ({}, {"attention": 16}, {r".*layers\.1\..*": 16}):
        asked = QuantizationConfig.model_validate({"layers": layers, "fit": "mse"})
        held = fingerprint_of(family_folder(family), quantization=asked).held
        assert bool(held.layers) == bool(layers)
        assert Held.from_json(held.to_json(), "here") == held
    for held in (Held(), Held("mxfp4", {}, "absmax"), Held("nf4", {}, "calibrated", DIGEST)):
        assert Held.from_json(held.to_json(), "here") == held


def test_every_fit_of_a_run_file_is_one_of_a_base() -> None:
    assert set(get_args(QuantizationConfig.model_fields["fit"].annotation)) == set(FITS)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"scheme": 4}, "scheme"),
        ({"scheme": "int4"}, "scheme"),
        ({"fit": "foo"}, "fit"),
        ({"fit": ["mse"]}, "fit"),
        ({"layers": ["q_proj"]}, "layers"),
        ({"layers": {"q_proj": 8}}, "layers"),
        ({"layers": {"(": 16}}, "layers"),
        ({"layers": {"(([a-z_.0-9])+)+X": 16}}, "layers"),
        ({"layers": {".*": 16}}, "layers"),
        ({"layers": {"": 16}}, "layers"),
        ({"layers": {f"layers.{number}.q_proj": 16 for number in range(5000)}}, "layers"),
        ({"fit": "calibrated", "calibration": "ab"}, "calibration"),
        ({"fit": "calibrated", "calibration": {}}, "calibration"),
        ({"calibration": DIGEST}, "calibration"),
    ],
)
def test_what_no_base_says_of_itself_is_refused_by_file_and_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^adapter_model\.safetensors: damaged at {key}: .*take the file as"):
        Held.from_json(values, "adapter_model.safetensors")


def test_no_name_of_linears_takes_long_to_check() -> None:
    started = time.monotonic()
    for key in ("a" * 200_000 + "(", "a(" + "1|" * 100_000, "(" * 200_000):
        with pytest.raises(CheckpointError):
            Held.from_json({"layers": {key: 16}}, "here")
    assert time.monotonic() - started < 5
