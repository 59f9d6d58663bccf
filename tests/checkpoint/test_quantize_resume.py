"""Quantizing that was killed, interrupted or out of room: it resumes to the files of an uninterrupted run."""

import errno
import json
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expertune.checkpoint import shards
from expertune.checkpoint.model_folder import FOLDER_MARK
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.writer import HashedFile
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError
from expertune.storage import FileRecord
from tests.checkpoint.conftest import Rewrite
from tests.checkpoint.nf4_folders import contents, interrupt, quantized, stop_after, weights
from tests.processes import run_program


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of the tiny Mixtral when nothing goes wrong."""
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixtral")


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


def test_finished_files_are_kept_and_not_written_again(mixtral: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(mixtral, out)
    before = (out / "layer-00000.safetensors").stat().st_mtime_ns
    started: list[str] = []
    quantize(str(mixtral), out, progress=lambda file, done, total: started.append(file))
    assert started == ["layer-00001.safetensors", "rest.safetensors", "expertune.json"]
    assert (out / "layer-00000.safetensors").stat().st_mtime_ns == before
    assert contents(out) == contents(folder)


def test_file_whose_shard_cannot_be_hashed_is_noted_without_the_hash_which_is_taken_later(
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
    notes = json.loads((out / "expertune.partial.json").read_text(encoding="utf-8"))
    assert notes["shards"] == {}
    assert all(record["unhashed"].keys() == {"model.safetensors"} for record in notes["files"].values())
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


def endless(ended: list[str]) -> Callable[..., FileRecord]:
    """Hashes a shard that never comes to its end."""

    def hashed(path: Path, passed: Callable[[int], None]) -> FileRecord:
        while True:
            try:
                passed(path.stat().st_size)
            except CancelledError:
                ended.append(path.name)
                raise

    return hashed


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> list[str]:
    """Ctrl-C before this file, in the midst of the shard; the shards that were left unread."""
    ended: list[str] = []

    def stop(file: str, done: int, total: int) -> None:
        if file == before:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "hash_file", endless(ended))
        with pytest.raises(KeyboardInterrupt):
            quantize(str(source), out, progress=stop)
    return ended


@pytest.mark.parametrize("before", ["layer-00001.safetensors", "rest.safetensors"])
def test_ctrl_c_keeps_finished_files_without_waiting_for_the_hash_of_a_large_shard(
    before: str, mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert interrupted(mixtral, out, monkeypatch, before) == ["model.safetensors"]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("layer-*.safetensors")}
    assert len(kept) == 1 + (before == "rest.safetensors")
    started: list[str] = []
    quantize(str(mixtral), out, progress=lambda file, done, total: started.append(file))
    assert started[0] == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(folder)


def test_files_of_a_shard_that_has_changed_before_it_was_hashed_are_written_again(
    rewrite: Rewrite, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = rewrite(), tmp_path / "out"
    interrupted(source, out, monkeypatch, "rest.safetensors")
    shard = next(source.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, shard, {"format": "pt"})
    quantize(str(source), out)
    quantize(str(source), tmp_path / "at-once")
    assert weights(out) == weights(tmp_path / "at-once") != weights(folder)


def test_hash_of_a_shard_that_nothing_else_is_made_of_is_taken_at_the_end(
    rewrite: Rewrite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shard_of(key: str) -> int:
        return int(key.split(".")[2]) if ".layers." in key else 2

    source, out = rewrite(shard_of=shard_of), tmp_path / "out"
    quantize(str(source), tmp_path / "at-once")
    [left] = interrupted(source, out, monkeypatch, "layer-00001.safetensors")
    started: list[str] = []
    quantize(str(source), out, progress=lambda file, done, total: started.append(file))
    assert "layer-00000.safetensors" not in started
    assert left in json.loads((out / FOLDER_MARK).read_text(encoding="utf-8"))["source"]["shards"]
    assert contents(out) == contents(tmp_path / "at-once")


def test_full_disk_does_not_wait_for_the_hash_of_a_large_shard(
    mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ended = tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(shards, "hash_file", endless(ended))
        patch.setattr(HashedFile, "write", stop_after(1, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CheckpointError):
            quantize(str(mixtral), out)
    assert ended == ["model.safetensors"]
    quantize(str(mixtral), out)
    assert contents(out) == contents(folder)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_finished_file_that_is_no_longer_whole_is_written_again(
    damage: str, mixtral: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(mixtral, out)
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
def started(request: pytest.FixtureRequest, mixtral: Path, tmp_path: Path) -> Path:
    """A folder with work of the tiny Mixtral in it."""
    out = tmp_path / "out"
    if request.param == "finished":
        return quantized(mixtral, out)
    interrupt(mixtral, out)
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, 'with dtype: "auto", and "float32" is asked for; '),
        (
            {"quantization": QuantizationConfig(double_quantization=False)},
            r"with quantization\.double_quantization: true, and false is asked for; ",
        ),
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
    with pytest.raises(CheckpointError, match=r"was made with model: .*choose another folder, or delete this one"):
        quantize(str(rewrite()), started)


def test_source_that_has_changed_meanwhile_is_named(rewrite: Rewrite, tmp_path: Path) -> None:
    source, out = rewrite(), tmp_path / "out"
    interrupt(source, out)
    shard = next(source.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: has changed since this NF4 folder was started"):
        quantize(str(source), out)


@pytest.mark.parametrize("count", COUNTS)
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
