"""Quantizing into a folder: in any order, in little memory, from where it was killed, or one clear sentence why not."""

import errno
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from expertune.checkpoint import quantize as quantize_module
from expertune.checkpoint import shards
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.verified import verify
from expertune.checkpoint.writer import FileRecord, HashedFile
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.checkpoint.conftest import Rewrite
from tests.checkpoint.nf4_folders import contents, quantized, weights
from tests.processes import run_program

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
    assert verify(out) == len(copied) - 2  # the manifest, and what people may write to: README.md


# ---- resuming


class Killed(BaseException):
    """Stands for a signal that no code answers."""


def stop_after(count: int, error: BaseException) -> Callable[..., None]:
    """What writes bytes, until so many writes have been made."""
    write, calls = HashedFile.write, 0

    def write_some(file: HashedFile, view: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls > count:
            file.file.write(view[: len(view) // 2])
            raise error
        write(file, view)

    return write_some


KILL = """
import os
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.writer import HashedFile

def quantize_until_killed(source, out, count):
    write, calls = HashedFile.write, 0

    def write_some(file, view):
        nonlocal calls
        calls += 1
        if calls > count:
            file.file.write(view[: len(view) // 2])
            file.file.flush()
            os._exit(9)
        write(file, view)

    HashedFile.write = write_some
    quantize(source, out)
"""
COUNTS = [0, 9, 40, 80]


@pytest.fixture(scope="module")
def killed(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders whose writers were killed in the midst of a write, by the number of writes that they had made."""
    folder = tmp_path_factory.mktemp("killed")
    outs = {count: folder / f"after-{count}" for count in COUNTS}
    for count, out in outs.items():
        ended = run_program(f"{KILL}\nquantize_until_killed({str(mixtral)!r}, {str(out)!r}, {count})")
        assert ended.status == 9, ended.err[-4000:]
    return outs


@pytest.mark.parametrize("count", COUNTS)
def test_killed_and_started_again_gives_the_files_of_an_uninterrupted_run(
    count: int, killed: dict[int, Path], mixtral: Path, folder: Path
) -> None:
    out = killed[count]
    assert [path.name for path in out.glob(".*.tmp")] != []
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


def test_finished_files_are_kept_and_not_written_again(
    mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(mixtral), out)
    assert sorted(weights(out)) == ["layer-00000.safetensors"]
    before = (out / "layer-00000.safetensors").stat().st_mtime_ns
    started: list[str] = []
    quantize(str(mixtral), out, progress=lambda file, done, total: started.append(file))
    assert started == ["layer-00001.safetensors", "rest.safetensors", "expertune.json"]
    assert (out / "layer-00000.safetensors").stat().st_mtime_ns == before
    assert contents(out) == contents(folder)


def test_file_is_not_noted_before_the_hashes_of_its_shards_are(
    mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def hashed(path: Path, passed: Callable[[int], None]) -> FileRecord:
        passed(path.stat().st_size)
        while not (out / "layer-00000.safetensors").exists():
            time.sleep(0.001)  # the first file is in place before the hash is there
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "hash_file", hashed)
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: cannot be written or read \(Input/output error\)"
        ):
            quantize(str(mixtral), out)
    assert json.loads((out / "expertune.partial.json").read_text(encoding="utf-8"))["files"] == {}
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


@pytest.mark.parametrize("way", ["interrupt", "full disk"])
def test_call_that_ends_early_does_not_wait_for_the_hash_of_a_large_shard(
    way: str, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ended = tmp_path / "out", []

    def hashed(path: Path, passed: Callable[[int], None]) -> FileRecord:
        while True:  # a shard without an end
            try:
                passed(path.stat().st_size)
            except CancelledError:
                ended.append(path.name)
                raise

    def stop(file: str, done: int, total: int) -> None:
        if file == "layer-00001.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "hash_file", hashed)
        if way == "full disk":
            patch.setattr(HashedFile, "write", stop_after(1, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            quantize(str(mixtral), out, progress=stop)
    assert ended == ["model.safetensors"]
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_finished_file_that_is_no_longer_whole_is_written_again(
    damage: str, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", stop_after(40, Killed()))
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
def started(request: pytest.FixtureRequest, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with work of the tiny Mixtral in it."""
    out = tmp_path / "out"
    if request.param == "finished":
        return quantized(mixtral, out)
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(mixtral), out)
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, 'with dtype "auto", and is asked for with "float32"'),
        ({"quantization": QuantizationConfig(double_quantization=False)}, r'with quantization .*"double_quantization"'),
    ],
)
def test_work_with_other_settings_is_not_resumed(
    settings: dict[str, Any], message: str, started: Path, mixtral: Path
) -> None:
    before = contents(started)
    with pytest.raises(CheckpointError, match=rf"{message}.*choose another folder, or delete this one"):
        quantize(str(mixtral), started, **settings)
    assert contents(started) == before


def test_work_on_another_source_is_not_resumed(started: Path, rewrite: Rewrite) -> None:
    with pytest.raises(CheckpointError, match=r"was started with model .*choose another folder, or delete this one"):
        quantize(str(rewrite()), started)


def test_source_that_has_changed_meanwhile_is_named(
    rewrite: Rewrite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = rewrite(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", stop_after(40, Killed()))
        with pytest.raises(Killed):
            quantize(str(source), out)
    shard = next(source.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: has changed since this NF4 folder was started"):
        quantize(str(source), out)


# ---- room


@pytest.mark.parametrize("count", [0, 9, 40, 80])
def test_full_disk_says_what_is_needed_leaves_no_half_file_and_goes_on(
    count: int, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = {name: len(content) for name, content in weights(folder).items()}
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", stop_after(count, OSError(errno.ENOSPC, "No space left on device")))
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


def test_too_little_room_is_refused_before_anything_is_written(
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
    with pytest.raises(
        CheckpointError, match=rf"missing tensors: {key}\. \d finished files? (is|are) kept in .*out, and"
    ):
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


# ---- memory

MEASURE = """
import sys
from expertune.checkpoint.quantize import quantize
from tests.memory import Peak

quantize(sys.argv[1], sys.argv[2] + "-warm")  # imports and pools are not weights
with Peak() as peak:
    quantize(sys.argv[3], sys.argv[2])
print(peak.bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
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
        part = {key: tensor.clone() for key, tensor in list(tensors.items())[number::4]}
        save_file(part, source / f"model-{number}.safetensors")
    ended = run_program(MEASURE, str(mixtral), str(tmp_path / "out"), str(source))
    assert ended.status == 0, ended.err[-4000:]
    layer = 8 * 3 * 1024 * 2048 * (0.5 + 1 / 64)
    # Both layers, or embeddings and head, would be more. Beyond one layer: a matrix, tiles of 4 MiB, and what the
    # allocator keeps back of them.
    assert layer <= int(ended.out) <= layer + 48 * 2**20
