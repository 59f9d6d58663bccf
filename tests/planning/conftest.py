"""Configs of published models, without weights, and run files on them."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from expertune.config import RunConfig, parse_config
from expertune.planning import reading

FILES = Path(__file__).parent / "files"
TINY_MIXTRAL = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"

TUTORIAL_LORA = {
    "r": 8,
    "alpha": 16,
    "dropout": 0.05,
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "lm_head"],
}


@pytest.fixture(autouse=True, scope="session")
def _models_are_built_and_run_once() -> Iterator[None]:
    """The configs here are built on the meta device, and run to see what they cache, once for all plans.

    Plans read models and change nothing.
    """
    build, count = reading.build_meta_model, reading.cached_numbers
    built = functools.cache(build)
    counted: dict[str, int | None] = {}

    def build_once(folder: Path, *settings: Any, **named: Any) -> Any:
        return (built if folder.parent == FILES else build)(folder, *settings, **named)

    def count_once(model: PreTrainedModel, specs: Any) -> int | None:
        folder = Path(model.config.name_or_path)
        if folder.parent != FILES:
            return count(model, specs)
        if folder.name not in counted:
            counted[folder.name] = count(model, specs)
        return counted[folder.name]

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(reading, "build_meta_model", build_once)
        changed.setattr(reading, "cached_numbers", count_once)
        yield


@pytest.fixture
def run_of() -> Callable[..., RunConfig]:
    """A run file on one of the models here, or on any other folder or hub id; keyword arguments are its sections."""

    def build(model: str | Path, **sections: Any) -> RunConfig:
        known = isinstance(model, str) and (FILES / model).is_dir()
        values = {
            "model": str(FILES / model if known else model),
            "data": {"train": "rows.jsonl", "max_length": 320},
            "training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "memory_budget": "80GB",
            "placement": "device",
            "output_dir": "run",
        }
        return parse_config({**values, **sections})

    return build


@pytest.fixture
def tiny_mixtral(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to damage."""
    return shutil.copytree(TINY_MIXTRAL, tmp_path / "tiny-mixtral")
