"""The note by which an interrupted `quantize` resumes is data: what it cannot prove is not taken from it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expertune.checkpoint import noted
from expertune.checkpoint.formats.nf4_folder import (
    read_manifest,
    read_progress,
    write_manifest,
    write_progress,
)
from expertune.checkpoint.model_folder import PROGRESS_MARK
from expertune.checkpoint.quantize import quantize
from expertune.errors import CheckpointError
from expertune.storage import hash_file
from tests.checkpoint.conftest import Rewrite
from tests.checkpoint.nf4_folders import contents, interrupt, quantized

FIRST = "layer-00000.safetensors"
SHARD = "model-00000.safetensors"


def shard_of(key: str) -> int:
    return int(key.split(".")[2]) if ".layers." in key else 2


@pytest.fixture
def source(rewrite: Rewrite) -> Path:
    """A checkpoint with a shard for each layer, and one for the rest."""
    return rewrite(shard_of=shard_of)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """An NF4 folder of it with its first layer finished, whose shard has been hashed."""
    interrupt(source, tmp_path / "out")
    return tmp_path / "out"


def note_of(folder: Path) -> dict[str, Any]:
    found = read_progress(folder)
    assert found is not None
    return found


def put(note: dict[str, Any], value: Any, *keys: str) -> None:
    for key in keys[:-1]:
        note = note[key]
    note[keys[-1]] = value


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("keys", "value", "problem"),
    [
        (["files", FIRST], "text", "no sha256 and size"),
        (["files", FIRST, "sha256"], None, "no sha256 and size"),
        (["files", FIRST, "bytes"], "12", "no sha256 and size"),
        (["files", FIRST, "left_out"], None, "no names of tensors"),
        (["files", FIRST, "left_out"], [1], "no names of tensors"),
        (["files", FIRST, "unhashed"], [1], "no sizes and times"),
        (["files", FIRST, "unhashed"], {SHARD: [1]}, "no sizes and times"),
        (["files", FIRST, "unhashed"], {"../other": [1, 2]}, "no sizes and times"),
        (["shards", SHARD], "text", "no sha256, size and time"),
        (["shards", SHARD, "mtime_ns"], None, "no sha256, size and time"),
        (["shards", "../other"], {"sha256": DIGEST, "bytes": 1, "mtime_ns": 1}, "is no shard of the source"),
        (["files"], [], "files is missing"),
    ],
)
def test_note_of_another_form_is_one_error_with_the_way_out(
    keys: list[str], value: Any, problem: str, source: Path, out: Path
) -> None:
    note = note_of(out)
    put(note, value, *keys)
    write_progress(out, note)
    with pytest.raises(
        CheckpointError, match=rf"partial\.json: damaged: .*{problem}; delete this folder, and quantize"
    ):
        quantize(str(source), out)


def test_note_with_a_changed_byte_is_one_error(source: Path, out: Path) -> None:
    path = out / PROGRESS_MARK
    path.write_text(path.read_text(encoding="utf-8").replace('"dtype": "auto"', '"dtype": "autO"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged: its content is not what was written; delete this folder"):
        quantize(str(source), out)


@pytest.mark.parametrize("name", ["alien.safetensors", "../alien.safetensors", "config.json"])
def test_file_that_is_none_of_the_work_is_neither_opened_nor_taken_into_the_manifest(
    name: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(out / FIRST, out / name)
    note = note_of(out)
    note["files"][name] = note["files"][FIRST]
    write_progress(out, note)
    read: list[str] = []
    monkeypatch.setattr(noted, "hash_file", lambda path: read.append(path.name))
    with pytest.raises(CheckpointError, match=f"damaged: '{name}' is no file of this folder's; delete this folder"):
        quantize(str(source), out)
    assert read == []


def test_file_whose_shard_the_note_does_not_know_is_written_again(source: Path, out: Path, tmp_path: Path) -> None:
    note = note_of(out)
    del note["shards"][SHARD]
    write_progress(out, note)
    started: list[str] = []
    quantize(str(source), out, progress=lambda file, done, total: started.append(file))
    assert started[0] == FIRST
    assert contents(out) == contents(quantized(source, tmp_path / "at-once"))


def exchange(shard: Path) -> None:
    tensors = load_file(shard)
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, shard, {"format": "pt"})


def test_shard_of_a_finished_file_that_was_exchanged_is_named_before_anything_is_written(
    source: Path, out: Path
) -> None:
    before, shard = contents(out), source / SHARD
    content = shard.read_bytes()
    exchange(shard)
    with pytest.raises(CheckpointError) as caught:
        quantize(str(source), out)
    assert str(caught.value) == (
        f"{shard}: has changed since this NF4 folder was started; restore it, or start again in another folder"
    )
    assert contents(out) == before
    shard.write_bytes(content)
    quantize(str(source), out)
    shards = read_manifest(out)["source"]["shards"]
    assert shards[SHARD] == hash_file(shard).to_json()


def test_shard_that_was_only_copied_again_is_hashed_again_and_the_work_resumes(source: Path, out: Path) -> None:
    os.utime(source / SHARD, ns=(1, 1))
    started: list[str] = []
    quantize(str(source), out, progress=lambda file, done, total: started.append(file))
    assert FIRST not in started


def test_shard_that_is_exchanged_while_it_is_in_use_is_named(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite()
    [shard] = source.glob("*.safetensors")
    with pytest.raises(CheckpointError, match=rf"{shard.name}: has changed since this NF4 folder was started; restore"):
        quantize(
            str(source),
            tmp_path / "out",
            progress=lambda file, done, total: exchange(shard) if file == "layer-00001.safetensors" else None,
        )


def test_finished_folder_that_does_not_say_its_dtype_is_not_taken_for_the_work(mixtral: Path, tmp_path: Path) -> None:
    out = quantized(mixtral, tmp_path / "out")
    manifest = read_manifest(out)
    write_manifest(out, {key: value for key, value in manifest.items() if key not in ("dtype", "sha256")})
    with pytest.raises(CheckpointError, match='was made with dtype: null, and "auto" is asked for; choose another'):
        quantize(str(mixtral), out)
