"""`torch.inference_mode()` before, around and after a run changes nothing in it: what the process keeps is usable."""

from pathlib import Path
from typing import Any

import pytest
import torch

import expertune
from expertune.checkpoint.load import load_model
from expertune.config import QuantizationConfig
from expertune.kernels import workspace
from expertune.kernels.nf4 import reference
from tests.train.scarce import adapter_bytes, run


@pytest.fixture
def short(run_values: dict[str, Any]) -> dict[str, Any]:
    values = run_values | {"data": run_values["data"] | {"eval": None}}
    values["training"] |= {"max_steps": 2, "save_steps": 2, "eval_strategy": "no", "gradient_checkpointing": False}
    return values


def forget() -> None:
    """What a process keeps between products, as if it were a new one."""
    workspace.clear()
    for kept in (reference.codebook, reference.nf4_bounds, reference.dynamic_codebook):
        kept.cache_clear()


def test_training_after_and_within_inference_mode_is_the_same_training(short: dict[str, Any], tmp_path: Path) -> None:
    run(short, tmp_path / "plain")
    expected = adapter_bytes(tmp_path / "plain")
    forget()
    with torch.inference_mode():
        expertune.generate(tmp_path / "plain", "What is 1 plus 2?", max_new_tokens=2)
    run(short, tmp_path / "after")
    assert adapter_bytes(tmp_path / "after") == expected
    forget()
    with torch.inference_mode():
        run(short, tmp_path / "within")
    assert adapter_bytes(tmp_path / "within") == expected
    with torch.no_grad():
        run(short, tmp_path / "without gradients")
    assert adapter_bytes(tmp_path / "without gradients") == expected


def test_model_loaded_in_inference_mode_can_be_trained(small_mixtral: Path) -> None:
    with torch.inference_mode():
        model = load_model(small_mixtral, QuantizationConfig(), torch.float32, "cpu").model
    assert [name for name, tensor in model.state_dict().items() if tensor.is_inference()] == []
    model.get_input_embeddings().requires_grad_(True)
    ids = torch.randint(3, 90, (1, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()
