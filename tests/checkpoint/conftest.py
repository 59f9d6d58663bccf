"""Tiny checkpoints, and ways to lay their tensors out again or damage them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.reader import INDEX_NAME
from tests.tiny_models import FolderOf, load_tiny

Rewrite = Callable[..., Path]


@pytest.fixture(scope="session")
def mixtral(family_folder: FolderOf) -> Path:
    return family_folder("mixtral")


@pytest.fixture(scope="session")
def loaded_mixtral(mixtral: Path) -> LoadedModel:
    """Loaded once; tests must not change it."""
    return load_tiny(mixtral)


def write_shards(folder: Path, tensors: dict[str, Tensor], shard_of: Callable[[str], int], index: bool = True) -> Path:
    """Write tensors into shards, each key into the one that `shard_of` says, with or without an index."""
    shards: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        shards.setdefault(shard_of(key), {})[key] = tensor.contiguous()
    names = {number: f"model-{number:05d}.safetensors" for number in shards}
    for number, content in shards.items():
        save_file(content, folder / names[number], metadata={"format": "pt"})
    if index:
        weight_map = {key: names[shard_of(key)] for key in tensors}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


@pytest.fixture
def rewrite(mixtral: Path, tmp_path: Path) -> Rewrite:
    """The Mixtral checkpoint with other tensors, shards or config keys, in a folder of its own."""

    def write(
        change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
        shard_of: Callable[[str], int] = lambda key: 1,
        index: bool = True,
        name: str = "rewritten",
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = load_file(mixtral / "model.safetensors")
        change(tensors)
        write_shards(folder, tensors, shard_of, index)
        values = json.loads((mixtral / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(values | config), encoding="utf-8")
        return folder

    return write
