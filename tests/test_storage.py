"""A file is written whole or not at all; what a failed write is called, whichever library wrote."""

import errno
import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expertune import storage
from expertune.cli import app
from expertune.errors import StorageError
from expertune.storage import hash_file, notify_if_it_fails, storage_errors_named, write_whole


class FullDisk:
    """A file that takes no byte."""

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        pass


TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 46 vs 0")


def named(folder: Path, error: Exception) -> str:
    with pytest.raises(StorageError) as said, storage_errors_named(folder):
        raise error
    return str(said.value)


def test_error_of_torchs_archive_names_the_last_file_and_what_a_write_meets_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optimizer.pt").touch()
    assert "optimizer.pt: could not be written to its end" in named(tmp_path, TORCH)
    monkeypatch.setattr(storage, "_error_of_a_write", lambda folder: errno.ENOSPC)
    assert "optimizer.pt: No space left on device; make room on this disk, then give" in named(tmp_path, TORCH)


def test_error_that_torchs_archive_raises_today_is_known(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, OSError)) as raised:
        torch.save({"a": torch.ones(100)}, FullDisk())
    assert isinstance(raised.value, OSError) or storage._OF_TORCH.search(str(raised.value))


def test_systems_error_in_a_message_of_safetensors_is_read(tmp_path: Path) -> None:
    error = ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert f"{tmp_path}: {os.strerror(errno.ENOSPC)}; make room" in named(tmp_path, error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("own words"), ConnectionError(111, "x")])
def test_other_errors_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as said, storage_errors_named(tmp_path):
        raise error
    assert said.value is error


def test_picture_that_cannot_be_written_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    notified: list[str] = []
    notify_if_it_fails("summary.png", (tmp_path / "missing" / "summary.png").touch, notified.append)
    assert notified == ["summary.png could not be written (No such file or directory); the run continues without it"]


@pytest.mark.parametrize("arguments", [["evaluate", "runs/a"], ["generate", "runs/a", "--prompt", "x"]])
def test_disk_that_fails_under_any_command_is_one_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(run_dir: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", f"{run_dir}/record.json")

    monkeypatch.setattr("expertune.run.record.RunRecord.load", load)
    ended = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ended.exit_code == 2
    assert (
        ended.stderr
        == "expertune: error: runs/a/record.json: Input/output error; check the disk, or take another one\n"
    )


def test_file_that_cannot_be_made_is_named_and_not_the_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr(storage.os, "open", refuse)
    with pytest.raises(PermissionError) as error, write_whole(Path("page.html")):
        pass
    assert error.value.filename == "page.html"


def test_file_whose_writer_stops_half_way_is_the_old_one_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "summary.png"
    path.write_bytes(b"old")

    def write_half() -> None:
        with write_whole(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("summary.png", b"old")]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o644), (0o077, 0o600)])
def test_file_is_never_writable_by_a_group_and_no_more_readable_than_the_umask_allows(
    umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        with write_whole(tmp_path / "new" / "record.json") as file:
            file.write(b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "record.json").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("num_bytes", [0, 1, 2**16 + 1, 2**22, 2**22 + 1, 2**23 + 5])
def test_hash_is_that_of_the_whole_file(num_bytes: int, tmp_path: Path) -> None:
    content = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(content)
    passed: list[int] = []
    found = hash_file(tmp_path / "file", passed.append)
    assert (found.sha256, found.nbytes) == (hashlib.sha256(content).hexdigest(), num_bytes)
    assert passed[-1:] == [num_bytes][: bool(num_bytes)]


def test_hash_of_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    tracemalloc.start()
    try:
        hash_file(tmp_path / "file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
