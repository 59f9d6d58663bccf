"""Quantizing into a folder: in any order, in little memory, from where it was killed, or one clear sentence why not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertune.checkpoint import quantize as quantize_module
from expertune.checkpoint import store
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.reader import INDEX_NAME
from expertune.checkpoint.shards import HubShards
from expertune.checkpoint.store import hash_file, verify
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.checkpoint.conftest import Rewrite, write_shards
from tests.checkpoint.nf4_folders import contents, quantized, weights

Tensors = dict[str, Tensor]
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of the tiny Mixtral when nothing goes wrong."""
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixtral")


@pytest.mark.parametrize("num_shards", [1, 5])
def test_shards_in_any_order_give_identical_files(num_shards: int, rewrite: Rewrite, folder: Path) -> None:
    def backwards(tensors: Tensors) -> None:
        for key in list(reversed(tensors)):
            tensors[key] = tensors.pop(key)

    source = rewrite(backwards, shard_of=lambda key: sum(map(ord, key)) % num_shards)
    assert weights(quantized(source, source.parent / "out")) == weights(folder)


def test_small_files_come_along_and_code_only_where_it_is_trusted(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "modeling.py",
        "x.bin",
    ):
        (source / name).write_text("{}", encoding="utf-8")
    out = quantized(source, tmp_path / "out")
    copied = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"} < copied
    assert not {"modeling.py", "x.bin"} & copied
    assert (quantized(source, tmp_path / "trusted", trust_remote_code=True) / "modeling.py").is_file()
    assert verify(out) == len(copied) - 1


# ---- going on


class Killed(BaseException):
    """Stands for a signal that no code answers."""


def stop_after(count: int, error: BaseException | Callable[[], None]) -> Callable[..., None]:
    """What writes bytes, until so many writes have been made."""
    write, calls = store._write_all, 0

    def write_some(file: Any, view: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            file.write(view[: len(view) // 2])
            if isinstance(error, BaseException):
                raise error
            error()
        write(file, view)

    return write_some


def kill_in_a_process_of_its_own(source: Path, out: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            store._write_all = stop_after(count, lambda: os._exit(9))
            quantize(str(source), out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork") or sys.version_info >= (3, 12), reason="forks a process with threads")
@pytest.mark.parametrize("count", [0, 9, 40, 80])
def test_killed_and_started_again_gives_the_files_of_an_uninterrupted_run(
    count: int, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    kill_in_a_process_of_its_own(mixtral, out, count, monkeypatch)
    assert [path.name for path in out.glob(".*.tmp")] != []
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


def test_finished_files_are_kept_and_not_written_again(
    mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_all", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(mixtral), out)
    assert sorted(weights(out)) == ["layer-00000.safetensors"]
    before = (out / "layer-00000.safetensors").stat().st_mtime_ns
    started: list[str] = []
    quantize(str(mixtral), out, progress=lambda file, done, total: started.append(file))
    assert started == ["layer-00001.safetensors", "rest.safetensors", "expertune.json"]
    assert (out / "layer-00000.safetensors").stat().st_mtime_ns == before
    assert contents(out) == contents(folder)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_finished_file_that_is_no_longer_whole_is_written_again(
    damage: str, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_all", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(mixtral), out)
    path = out / "layer-00000.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-1] + b"\0")
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


def test_finished_folder_is_left_as_it_is(mixtral: Path, tmp_path: Path) -> None:
    out = quantized(mixtral, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    quantize(str(mixtral), out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.fixture(params=["unfinished", "finished"])
def begun(request: pytest.FixtureRequest, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with work of the tiny Mixtral in it."""
    out = tmp_path / "out"
    if request.param == "finished":
        return quantized(mixtral, out)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_all", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(mixtral), out)
    return out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "float32"}, 'with dtype "auto", and is asked for with "float32"'),
        ({"quantization": QuantizationConfig(double_quantization=False)}, r'with quantization .*"double_quantization"'),
    ],
)
def test_work_with_other_settings_is_not_gone_on_with(
    settings: dict[str, Any], told: str, begun: Path, mixtral: Path
) -> None:
    before = contents(begun)
    with pytest.raises(CheckpointError, match=rf"{told}.*choose another folder, or delete this one"):
        quantize(str(mixtral), begun, **settings)
    assert contents(begun) == before


def test_work_on_another_source_is_not_gone_on_with(begun: Path, rewrite: Rewrite) -> None:
    with pytest.raises(CheckpointError, match=r"was begun with model .*choose another folder, or delete this one"):
        quantize(str(rewrite()), begun)


def test_source_that_has_changed_meanwhile_is_named(
    rewrite: Rewrite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = rewrite(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_all", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(source), out)
    shard = next(source.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: has changed since this NF4 folder was begun"):
        quantize(str(source), out)


# ---- room


@pytest.mark.parametrize("count", [0, 9, 40, 80])
def test_full_disk_says_what_is_needed_leaves_no_half_file_and_goes_on(
    count: int, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = {name: len(content) for name, content in weights(folder).items()}
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_all", stop_after(count, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"the disk is full; \d+ bytes more are needed") as caught:
            quantize(str(mixtral), out)
    kept = weights(out)
    assert [path.name for path in out.glob(".*")] == []
    assert kept.items() <= weights(folder).items()
    needed = int(str(caught.value).split("full; ")[1].split(" ")[0])
    left = sum(size for name, size in whole.items() if name not in kept)
    assert 0.9 * left < needed < 1.1 * left
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


def test_too_little_room_is_told_before_anything_is_written(
    mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"\d+ bytes are needed \(0\.2 MB\), and 0\.0 MB are free"):
        quantize(str(mixtral), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- places that cannot be written


def test_folder_that_holds_something_else_is_left_alone(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds something else; choose a new or an empty folder"):
        quantize(str(mixtral), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_empty_folder_is_taken(mixtral: Path, folder: Path, tmp_path: Path) -> None:
    assert contents(quantized(mixtral, tmp_path)) == contents(folder)


def test_file_in_place_of_the_folder_is_refused(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="out: a file; choose a folder to write"):
        quantize(str(mixtral), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot be written or read"):
        quantize(str(mixtral), tmp_path / "out" / "below")


def test_folder_that_may_not_be_written_is_named(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refuse(path: Path, values: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(quantize_module, "write_json", refuse)
    with pytest.raises(CheckpointError, match=rf"{out}/.*: cannot be written or read \(Permission denied\)"):
        quantize(str(mixtral), out)


def test_model_and_folder_may_not_be_one(rewrite: Rewrite) -> None:
    source = rewrite()
    with pytest.raises(CheckpointError, match="the model itself lies here"):
        quantize(str(source), source)


def test_nf4_folder_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already an NF4 folder"):
        quantize(str(folder), tmp_path / "out")


# ---- sources that are wrong


@pytest.mark.parametrize("key", [NORM, "model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight"])
def test_missing_tensor_is_named_and_its_file_not_written(key: str, rewrite: Rewrite, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"missing tensors: {key}$"):
        quantize(str(rewrite(lambda tensors: tensors.pop(key))), tmp_path / "out")
    file = "rest.safetensors" if key == "model.norm.weight" else "layer-00001.safetensors"
    assert not (tmp_path / "out" / file).exists()


@pytest.mark.parametrize("key", [NORM, "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weight_that_is_not_finite_is_named_and_nothing_half_written(
    key: str, rewrite: Rewrite, tmp_path: Path
) -> None:
    source = rewrite(lambda tensors: tensors[key].view(-1)[5].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"tensor {key}.* NaN or infinite"):
        quantize(str(source), tmp_path / "out")
    assert list((tmp_path / "out").glob(".*")) == []


def test_source_without_a_config_or_of_another_method_is_refused(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite(quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(awq\)"):
        quantize(str(source), tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json here"):
        quantize(str(source), tmp_path / "out")


# ---- a hub model, shard by shard


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


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """Six layers in eight shards, cut where the bytes ended: a layer may begin in one and end in the next."""
    from tests.tiny_models import save_tiny_model

    whole = save_tiny_model(tmp_path / "whole", "mixtral", num_hidden_layers=6)
    tensors = load_file(whole / "model.safetensors")
    order = ["model.embed_tokens.weight", *sorted(key for key in tensors if ".layers." in key)]
    order += [key for key in tensors if key not in order]
    repository = tmp_path / "repository"
    repository.mkdir()
    per_shard = -(-len(order) // 8)
    write_shards(repository, {key: tensors[key] for key in order}, lambda key: order.index(key) // per_shard)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(whole / name, repository / name)
    return Hub(repository)


def small_files(repository: Path, folder: Path) -> Path:
    """What the hub's snapshot has without its weights."""
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_hub_model_is_never_on_the_disk_as_a_whole(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    # The first shard has the embeddings, which wait for the end; beside it the layer's one or two.
    assert hub.most_at_once <= 3
    assert len(hub.downloads) == 8 == len(set(hub.downloads))
    assert not (out / ".source").exists()
    assert weights(out) == weights(quantized(hub.repository, tmp_path / "local"))
    manifest = json.loads((out / "expertune.json").read_text(encoding="utf-8"))
    assert {name: record["sha256"] for name, record in manifest["source"]["shards"].items()} == {
        path.name: hash_file(path).sha256 for path in hub.repository.glob("*.safetensors")
    }


def test_hub_model_that_was_interrupted_fetches_only_what_is_still_needed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    files = small_files(hub.repository, tmp_path / "files")

    def stop(file: str, done: int, total: int) -> None:
        if file == "layer-00004.safetensors":
            raise Killed

    with pytest.raises(Killed):
        quantize(str(files), out, progress=stop, shards=hub.shards(files, out / ".source"))
    first = list(hub.downloads)
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    again = hub.downloads[len(first) :]
    assert len(again) < 6
    assert weights(out) == weights(quantized(hub.repository, tmp_path / "local"))


def test_hub_model_of_one_shard_needs_no_index(mixtral: Path, folder: Path, tmp_path: Path) -> None:
    hub, out = Hub(mixtral), tmp_path / "out"
    files = small_files(mixtral, tmp_path / "files")
    assert not (files / INDEX_NAME).exists()
    quantize(str(files), out, shards=hub.shards(files, out / ".source"))
    assert hub.downloads == ["model.safetensors"]
    assert weights(out) == weights(folder)


def test_hub_that_fails_half_way_is_told_and_gone_on_with(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert weights(out) == weights(quantized(hub.repository, tmp_path / "local"))


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
    cached: str, hub: Hub, tmp_path: Path
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
        assert weights(out) == weights(quantized(hub.repository, tmp_path / "local"))
        assert not (out / ".source").exists()
    else:
        assert "owner/name: the hub did not give model-00005.safetensors (" in done.stdout


# ---- memory

MEASURE = """
import re, sys
from pathlib import Path
from expertune.checkpoint.quantize import quantize

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

quantize(sys.argv[1], sys.argv[2] + "-warm")  # imports, pools and code pages are not weights
before = peak()
quantize(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak resident memory is read from /proc")
def test_quantizing_never_holds_more_than_one_layer_and_one_tensor(mixtral: Path, tmp_path: Path) -> None:
    """Two layers of 25 MiB in 4 bits, of matrices of 4 MiB, and embeddings and head of 32 MiB each."""
    source = tmp_path / "large"
    source.mkdir()
    values = json.loads((mixtral / "config.json").read_text(encoding="utf-8"))
    values |= {"hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 8, "num_hidden_layers": 2}
    (source / "config.json").write_text(json.dumps(values | {"vocab_size": 16384}), encoding="utf-8")
    noise = torch.randn(16384 * 1024).bfloat16()
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16384, 1024),
        "lm_head.weight": (16384, 1024),
        "model.norm.weight": (1024,),
    }
    for number in range(2):
        layer = f"model.layers.{number}"
        heads = 1024 // values["num_attention_heads"] * values["num_key_value_heads"]
        shapes |= {f"{layer}.input_layernorm.weight": (1024,), f"{layer}.post_attention_layernorm.weight": (1024,)}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (1024, 1024) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (heads, 1024) for name in "kv"}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (8, 1024)
        for expert in range(8):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.w1.weight": (2048, 1024), f"{name}.w2.weight": (1024, 2048)}
            shapes[f"{name}.w3.weight"] = (2048, 1024)
    tensors = {key: noise[: torch.Size(shape).numel()].view(shape) for key, shape in shapes.items()}
    for number in range(4):  # every layer is spread over all four shards
        from safetensors.torch import save_file

        part = {key: tensor.clone() for key, tensor in list(tensors.items())[number::4]}
        save_file(part, source / f"model-{number}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(mixtral), str(tmp_path / "out"), str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    layer = 8 * 3 * 1024 * 2048 * (0.5 + 1 / 64)
    # Both layers, or embeddings and head, would be more. Beyond one layer: a matrix, tiles of 4 MiB, and what the
    # allocator keeps back of them.
    assert layer <= int(done.stdout) <= layer + 48 * 2**20
