"""No byte of an NF4 folder changes unnoticed, and a folder that has been found whole is not read again."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertune.checkpoint import verified
from expertune.checkpoint.load import fingerprint_of
from expertune.checkpoint.verified import require_verified, verify
from expertune.errors import CheckpointError
from expertune.storage import hash_file
from tests.checkpoint.nf4_folders import quantized
from tests.tiny_models import load_tiny


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(shutil.copytree(mixtral, tmp_path_factory.mktemp("source") / "mixtral"))
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    return quantized(source, tmp_path_factory.mktemp("quantized") / "mixtral")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of the test's own, and the names of the files that are hashed from now on."""
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    monkeypatch.setattr(verified, "hash_file", lambda path: names.append(path.name) or hash_file(path))  # type: ignore[func-returns-value]
    return names


def settle() -> None:
    """Let the clock of the file system go on."""
    time.sleep(2 * verified._STEP_NS / 1e9)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damage_anywhere_in_any_file_is_noticed_before_the_folder_is_used(folder: Path, copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        if path.name in ("README.md", "expertune.json"):
            continue
        size = path.stat().st_size
        for at in {0, 9, size // 3, size // 2, size - 2}:
            if at >= size:
                continue
            flip(path, at)
            with pytest.raises(CheckpointError, match=str(copy)):
                load_tiny(copy)
            flip(path, at)
    load_tiny(copy)


def changes(values: Any) -> list[Callable[[], Any]]:
    """What changes one value, or one key's name, of JSON, and gives what undoes it."""
    found: list[Callable[[], Any]] = []

    def set_to(holder: Any, key: Any, value: Any) -> Callable[[], Any]:
        before = holder[key]
        holder[key] = value
        return lambda: holder.__setitem__(key, before)

    def rename(holder: Any, key: str) -> Callable[[], Any]:
        holder[key[:-1] + chr(ord(key[-1]) ^ 1)] = holder.pop(key)
        return lambda: holder.__setitem__(key, holder.pop(key[:-1] + chr(ord(key[-1]) ^ 1)))

    def walk(holder: Any) -> None:
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(holder, dict):
                found.append(lambda key=key, holder=holder: rename(holder, key))
            if isinstance(value, dict | list):
                walk(value)
            else:
                other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}x"
                found.append(lambda key=key, holder=holder, other=other: set_to(holder, key, other))

    walk(values)
    return found


def test_damage_to_any_field_of_the_manifest_is_noticed(copy: Path) -> None:
    path = copy / "expertune.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    damages = changes(values)
    assert len(damages) > 40
    for damage in damages:
        undo = damage()
        path.write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"expertune\.json|changed since it was written|file is missing"):
            require_verified(copy)
        undo()
    path.write_text(json.dumps(values), encoding="utf-8")
    require_verified(copy)


def test_manifest_without_a_digest_of_its_own_is_one_from_before(copy: Path) -> None:
    path = copy / "expertune.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["sha256"]
    path.write_text(json.dumps(values), encoding="utf-8")
    load_tiny(copy)


def test_folder_is_read_once_and_again_when_a_file_was_written_to(copy: Path, reads: list[str]) -> None:
    settle()
    load_tiny(copy)
    assert sorted(reads) == sorted(
        path.name for path in copy.iterdir() if path.name not in ("README.md", "expertune.json")
    )
    reads.clear()
    load_tiny(copy)
    fingerprint_of(copy)
    assert reads == []
    path = copy / "rest.safetensors"
    times = path.stat()
    flip(path, -100)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copying tool sets them
    with pytest.raises(CheckpointError, match=r"changed since it was written: rest\.safetensors"):
        load_tiny(copy)


def test_folder_that_was_written_this_moment_is_not_yet_taken_for_whole(copy: Path, reads: list[str]) -> None:
    """Times of files advance in steps: within one, a second change would leave no trace."""
    path = copy / "config.json"
    path.write_bytes(path.read_bytes())
    monotonic = time.time_ns()
    require_verified(copy)
    if time.time_ns() - monotonic < verified._STEP_NS:
        reads.clear()
        require_verified(copy)
        assert "config.json" in reads


def test_damaged_memory_of_what_was_verified_is_no_memory(copy: Path, reads: list[str], tmp_path: Path) -> None:
    settle()
    require_verified(copy)
    memory = tmp_path / "cache" / "expertune" / "verified-folders.json"
    assert memory.is_file()
    for content in ("{", "[]", "[" * 100_000, json.dumps({str(copy): 3})):
        memory.write_text(content, encoding="utf-8")
        reads.clear()
        require_verified(copy)
        assert reads, content[:20]


def test_verify_reads_every_file_whatever_is_remembered(copy: Path, reads: list[str]) -> None:
    settle()
    require_verified(copy)
    reads.clear()
    assert verify(copy) == len(reads) > 0
