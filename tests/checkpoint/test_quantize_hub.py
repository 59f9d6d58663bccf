"""Quantizing a model of the hub: shard by shard, never on the disk as a whole, and gone on with where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from safetensors.torch import load_file

from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.reader import INDEX_NAME
from expertune.checkpoint.shards import HubShards
from expertune.errors import CheckpointError
from expertune.storage import hash_file
from tests.checkpoint.conftest import write_shards
from tests.checkpoint.nf4_folders import contents, quantized, weights
from tests.processes import BENEATH, run_program
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


def test_hub_that_fails_half_way_is_reported_and_resumed(
    hub: Hub, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")
    shards = hub.shards(files, out / ".source")

    def fail(*args: Any, **kwargs: Any) -> str:
        if len(hub.downloads) == 4:
            raise ConnectionError("Name or service not known")
        return hub.download(*args, **kwargs)

    shards._download = fail
    with pytest.raises(CheckpointError, match=r"the hub did not give model-0000\d.* \(there is no connection to it"):
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
from expertune.checkpoint.quantize import quantize
from expertune.errors import CheckpointError

def tell(*arguments):
    try:
        print(quantize(*arguments).manifest["source"]["revision"])
    except CheckpointError as error:
        print(error)
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Offline(NamedTuple):
    """A model of the hub's cache, quantized without a connection: what lay in the cache before, and what was said."""

    cache: Path
    before: dict[str, bytes]
    out: Path
    said: str


@pytest.fixture(scope="module")
def offline(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Offline]:
    """With the hub's own client: a model that is there as a whole, and one that lacks a shard."""
    folder = tmp_path_factory.mktemp("offline")
    caches = {name: folder / "home" / "hub" / f"models--owner--{name}" for name in ("whole", "lacking")}
    for cache in caches.values():
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(COMMIT, encoding="utf-8")
        shutil.copytree(repository, cache / "snapshots" / COMMIT)
    (caches["lacking"] / "snapshots" / COMMIT / "model-00005.safetensors").unlink()
    before = {name: contents(cache) for name, cache in caches.items()}
    places = {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "home" / "hub")}
    found = {}
    for name in caches:
        code = f"{OFFLINE}\ntell('owner/{name}', {str(folder / name)!r})"
        ended = run_program(code, imports=BENEATH, **places)
        assert ended.status == 0, ended.err[-4000:]
        found[name] = Offline(caches[name], before[name], folder / name, ended.out)
    return found


def test_hub_model_in_the_cache_needs_no_connection_and_leaves_the_cache_as_it_is(
    offline: dict[str, Offline], local: dict[str, bytes]
) -> None:
    whole = offline["whole"]
    assert contents(whole.cache) == whole.before
    assert whole.said == f"{COMMIT}\n"
    assert weights(whole.out) == local
    assert not (whole.out / ".source").exists()


def test_hub_model_of_which_the_cache_lacks_a_shard_is_named_by_the_shard(offline: dict[str, Offline]) -> None:
    lacking = offline["lacking"]
    assert contents(lacking.cache) == lacking.before
    assert "owner/lacking: the hub did not give model-00005.safetensors (" in lacking.said
