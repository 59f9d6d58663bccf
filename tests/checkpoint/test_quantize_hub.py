"""Quantizing a model of the hub: shard by shard, never on the disk as a whole, and gone on with where it stopped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.reader import INDEX_NAME
from expertune.checkpoint.shards import HubShards
from expertune.checkpoint.store import hash_file
from expertune.errors import CheckpointError
from tests.checkpoint.conftest import write_shards
from tests.checkpoint.nf4_folders import contents, quantized, weights
from tests.tiny_models import save_tiny_model


class Hub:
    """A repository in a folder: downloads are copies; what lies in the target folder at once is counted."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.downloads: list[str] = []
        self.most_at_once = 0

    def download(self, repository: str, shard: str, revision: str | None, local_dir: Path) -> str:
        assert (repository, revision) == ("owner/name", "c0ffee")
        local_dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.repository / shard, local_dir / shard)
        self.downloads.append(shard)
        self.most_at_once = max(self.most_at_once, len(list(local_dir.glob("*.safetensors"))))
        return str(local_dir / shard)

    def shards(self, files: Path, folder: Path) -> HubShards:
        return HubShards("owner/name", "c0ffee", files, folder, self.download, cached=lambda shard: None)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers in eight shards, cut where the bytes ended: a layer may begin in one and end in the next."""
    folder = tmp_path_factory.mktemp("hub")
    whole = save_tiny_model(folder / "whole", "mixtral", num_hidden_layers=6)
    tensors = load_file(whole / "model.safetensors")
    order = ["model.embed_tokens.weight", *sorted(key for key in tensors if ".layers." in key)]
    order += [key for key in tensors if key not in order]
    repository = folder / "repository"
    repository.mkdir()
    per_shard = -(-len(order) // 8)
    write_shards(repository, {key: tensors[key] for key in order}, lambda key: order.index(key) // per_shard)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(whole / name, repository / name)
    return repository


@pytest.fixture(scope="module")
def local(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes of the repository where it is a folder of this machine."""
    return weights(quantized(repository, tmp_path_factory.mktemp("quantized") / "local"))


@pytest.fixture
def hub(repository: Path) -> Hub:
    return Hub(repository)


def small_files(repository: Path, folder: Path) -> Path:
    """What the hub's snapshot has without its weights."""
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_hub_model_is_never_on_the_disk_as_a_whole(hub: Hub, local: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    # The first shard has the embeddings, which wait for the end; beside it the layer's one or two.
    assert hub.most_at_once <= 3
    assert len(hub.downloads) == 8 == len(set(hub.downloads))
    assert not (out / ".source").exists()
    assert weights(out) == local
    manifest = json.loads((out / "expertune.json").read_text(encoding="utf-8"))
    assert {name: record["sha256"] for name, record in manifest["source"]["shards"].items()} == {
        path.name: hash_file(path).sha256 for path in hub.repository.glob("*.safetensors")
    }


def test_hub_model_that_was_interrupted_fetches_only_what_is_still_needed(
    hub: Hub, local: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")

    def stop(file: str, done: int, total: int) -> None:
        if file == "layer-00004.safetensors":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(str(files), out, progress=stop, shards=hub.shards(files, out / ".source"))
    first = list(hub.downloads)
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    again = hub.downloads[len(first) :]
    assert len(again) < 6
    assert weights(out) == local


def test_hub_model_of_one_shard_needs_no_index(mixtral: Path, tmp_path: Path) -> None:
    hub, out = Hub(mixtral), tmp_path / "out"
    files = small_files(mixtral, tmp_path / "files")
    assert not (files / INDEX_NAME).exists()
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    assert hub.downloads == ["model.safetensors"]
    assert weights(out) == weights(quantized(mixtral, tmp_path / "local"))


def test_hub_that_fails_half_way_is_told_and_gone_on_with(hub: Hub, local: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")
    shards = hub.shards(files, out / ".source")

    def fail(*args: Any, **kwargs: Any) -> str:
        if len(hub.downloads) == 4:
            raise ConnectionError("Name or service not known")
        return hub.download(*args, **kwargs)

    shards._download = fail
    with pytest.raises(CheckpointError, match=r"the hub did not give model-0000\d.* \(Name or service not known\)"):
        quantize(str(files), out, shards=shards)
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    assert weights(out) == local


def test_shard_of_the_hubs_cache_is_read_there_and_stays(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")
    cached = HubShards(
        "owner/name", "c0ffee", files, out / ".source", hub.download, cached=lambda shard: hub.repository / shard
    )
    quantize(str(files), out, shards=cached)
    assert hub.downloads == []
    assert len(list(hub.repository.glob("*.safetensors"))) == 8


OFFLINE = """
import sys
from expertune.checkpoint.quantize import quantize
from expertune.errors import CheckpointError
try:
    print(quantize("owner/name", sys.argv[1]).manifest["source"]["revision"])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("cached", ["all", "all but a shard"])
def test_hub_model_in_the_cache_needs_no_connection_and_leaves_the_cache_as_it_is(
    cached: str, hub: Hub, local: dict[str, bytes], tmp_path: Path
) -> None:
    """With the hub's own client, offline."""
    commit, out = "0123456789abcdef0123456789abcdef01234567", tmp_path / "out"
    repository = tmp_path / "home" / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    snapshot = Path(shutil.copytree(hub.repository, repository / "snapshots" / commit))
    if cached != "all":
        (snapshot / "model-00005.safetensors").unlink()
    before = contents(repository)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(out)], capture_output=True, text=True, check=True, env=environment
    )
    assert contents(repository) == before
    if cached == "all":
        assert done.stdout == f"{commit}\n"
        assert weights(out) == local
        assert not (out / ".source").exists()
    else:
        assert "owner/name: the hub did not give model-00005.safetensors (" in done.stdout
