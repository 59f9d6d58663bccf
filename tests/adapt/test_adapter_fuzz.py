"""Whatever an adapter's two files hold, starting from it ends in one error that names a file, or in a model."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from expertune.checkpoint.load import LoadedModel
from expertune.errors import CheckpointError, ExpertuneError
from tests.adapt.conftest import adapt, adopt, train_a_little
from tests.examples import examples
from tests.tiny_models import load_tiny, save_tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "mixtral", num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes, dict[str, Tensor]]:
    """Config, file and tensors of an adapter."""
    out = tmp_path_factory.mktemp("saved")
    model = adapt(load_tiny(base), targets=["attention", "experts"])
    train_a_little(model)
    model.save_pretrained(str(out))
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    return config, (out / WEIGHTS).read_bytes(), load_file(out / WEIGHTS)


def start_from(base: Path, folder: Path, config: bytes, weights: bytes) -> str:
    """What is said when a run starts from these files; nothing where it can."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    loaded: LoadedModel = load_tiny(base)
    said = ""
    try:
        model = adopt(loaded, folder)
        factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    except ExpertuneError as error:
        said, factors = str(error), []
    assert not said or str(folder) in said
    assert len(said) < 1500
    assert all(torch.isfinite(factor).all() for factor in factors)
    return said


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.sampled_from([10**6, 10**12, 10**30])
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=2)
    | st.dictionaries(st.sampled_from(["q_proj", "(", "w1", ""]), st.integers(-1, 9) | st.just("x"), max_size=2)
)
KEYS = [
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "revision",
]


@examples(25)
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2), bare=st.booleans())
@example(changes={"r": 10**6}, bare=True)
@example(changes={"lora_alpha": 0}, bare=True)
@example(changes={"rank_pattern": {"(": 3}}, bare=True)
@example(changes={"alpha_pattern": {"q_proj": "x"}}, bare=True)
def test_adapter_config_of_any_values_ends_in_one_error_or_a_model(
    base: Path, saved: Any, changes: dict[str, Any], bare: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config, content, tensors = saved
    # Without metadata, as other tools write: then every value of the config counts.
    weights = save(tensors) if bare else content
    start_from(base, tmp_path_factory.mktemp("drawn"), json.dumps(config | changes).encode(), weights)


def test_adapter_config_that_is_no_mapping_is_refused(base: Path, saved: Any, tmp_path: Path) -> None:
    for content in (b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"r": '):
        assert CONFIG in start_from(base, tmp_path, content, saved[1]), content[:9]


def damages(tensors: dict[str, Tensor]) -> dict[str, tuple[bytes, str]]:
    """Weights' files, and what is said of each."""
    key = next(key for key in tensors if "experts.2.w1.lora_A" in key)

    def other(change: Any) -> bytes:
        return save({name: change(tensor) if name == key else tensor for name, tensor in tensors.items()})

    return {
        "NaN": (other(lambda t: t * float("nan")), "NaN or infinite"),
        "infinite": (other(lambda t: t / 0), "NaN or infinite"),
        "integers": (other(Tensor.int), "is no factor of an adapter"),
        "one dimension": (other(lambda t: t.view(-1)), "is no factor of an adapter"),
        "no rows": (other(lambda t: t[:0].clone()), "is no factor of an adapter"),
        "another rank in one expert": (other(lambda t: t[:2].clone()), ""),
        "a tensor missing": (save({name: t for name, t in tensors.items() if name != key}), ""),
        "a module that is not there": (save(tensors | {"base_model.model.foo.lora_A.weight": torch.ones(2, 2)}), ""),
        "no factors": (save({"x": torch.ones(1, 1)}), ""),
    }


def test_adapter_weights_of_odd_content_are_refused_by_the_name_of_a_file(
    base: Path, saved: Any, tmp_path: Path
) -> None:
    config, content, tensors = saved
    for what, (weights, told) in damages(tensors).items():
        said = start_from(base, tmp_path, json.dumps(config).encode(), weights)
        assert said, what
        assert told in said, what
    for damage in (b"", b"\xff" * 8 + content[8:], content[:-5], struct.pack("<Q", 100_000) + b"[" * 100_000):
        assert WEIGHTS in start_from(base, tmp_path, json.dumps(config).encode(), damage)


def test_rank_that_no_tensor_has_is_refused_before_memory_is_taken_for_it(
    base: Path, saved: Any, tmp_path: Path
) -> None:
    config, content, _ = saved
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    kept = json.loads(header["__metadata__"]["expertune.lora"])
    header["__metadata__"]["expertune.lora"] = json.dumps(kept | {"r": 60_000})
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + content[8 + length :]
    assert "has rank 60000 by the adapter's settings" in start_from(
        base, tmp_path, json.dumps(config).encode(), weights
    )


def test_fingerprint_that_is_damaged_counts_as_none(base: Path, saved: Any, tmp_path: Path) -> None:
    config, content, _ = saved
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for kept in ("{", "[]", "[" * 50_000, '{"version": 1, "config": {"a": []}, "weights": {"norms": 3}}'):
        header["__metadata__"]["expertune.base"] = kept
        text = json.dumps(header).encode()
        with contextlib.suppress(CheckpointError):
            start_from(
                base, tmp_path, json.dumps(config).encode(), struct.pack("<Q", len(text)) + text + content[8 + length :]
            )
