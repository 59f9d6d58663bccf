"""What is kept on a machine is kept, and believed, where nobody else can write."""

import json
import logging
import os
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from expertune import doctor
from expertune.kernels import cache

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="another system's rights")


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Stands for the folder of temporary files: open to all, and sticky."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(folder))
    cache._tell_once.cache_clear()
    cache._own_folder.cache_clear()
    yield folder
    cache._own_folder.cache_clear()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home" / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_folder_is_made_private_whatever_the_umask_is(home: Path) -> None:
    before = os.umask(0)
    try:
        assert cache.find_cache() == (home / "expertune", "")
    finally:
        os.umask(before)
    for made in (home.parent, home, home / "expertune"):
        assert made.stat().st_mode & 0o077 == 0


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What has been logged in a test; `caplog` is missing where pytest runs without its plugin for it."""
    handler = BufferingHandler(100)
    logging.getLogger().addHandler(handler)
    yield handler.buffer
    logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
@pytest.mark.parametrize("which", ["the folder", "XDG_CACHE_HOME"])
def test_folder_that_others_may_write_gives_way_to_a_private_one_and_is_told_once(
    which: str, mode: int, home: Path, temporary: Path, logged: list[logging.LogRecord]
) -> None:
    cache.cache_folder()
    opened = home if which == "XDG_CACHE_HOME" else home / "expertune"
    opened.chmod(mode)
    if which == "XDG_CACHE_HOME" and mode == 0o1777:  # as /tmp: nobody can take our folder's place in it
        assert cache.cache_folder() == home / "expertune"
        return
    for _ in range(2):
        folder, reason = cache.find_cache()
        assert folder == temporary / f"expertune-{os.geteuid()}"
        assert folder.stat().st_mode & 0o077 == 0
        assert reason.startswith(f"{opened} can be written by others")
    assert [record.getMessage() for record in logged] == [f"cache: {reason}; using {folder}"]


def test_nothing_is_made_in_a_folder_that_others_may_write(home: Path) -> None:
    home.mkdir(parents=True)
    home.chmod(0o777)
    cache.cache_folder()
    assert list(home.iterdir()) == []


def test_folder_of_another_user_is_not_used(home: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.cache_folder()
    owner = os.geteuid()
    monkeypatch.setattr(cache.os, "geteuid", lambda: owner + 1)
    folder, reason = cache.find_cache()
    assert reason.startswith(f"{home / 'expertune'} belongs to another user (uid {owner})")
    assert folder.parent != home


def test_where_the_private_folder_is_squatted_the_process_has_one_of_its_own(home: Path, temporary: Path) -> None:
    home.parent.mkdir()
    home.touch()
    squatted = temporary / f"expertune-{os.geteuid()}"
    squatted.mkdir()
    squatted.chmod(0o777)
    folder, reason = cache.find_cache()
    assert folder.parent == temporary
    assert folder != squatted
    assert cache.why_not_private(folder) == ""
    assert f"{squatted} can be written by others" in reason
    assert cache.cache_folder() == folder


def test_measurement_that_others_may_have_written_is_not_believed(home: Path) -> None:
    kept = cache.cache_folder() / "rates.json"
    kept.write_text(json.dumps({"flops_per_second": 1.0}))
    kept.chmod(0o644)
    assert cache.read_kept(kept) == {"flops_per_second": 1.0}
    kept.chmod(0o666)
    with pytest.raises(PermissionError, match="can be written by others"):
        cache.read_kept(kept)


def test_what_killed_processes_left_goes_and_so_do_the_oldest_of_many(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_MOST_KEPT", 3)
    folder = cache.cache_folder()
    other = folder / "native-0.so"
    other.touch()
    left, written = folder / ".rates-0.json.12ab.tmp", folder / ".rates-1.json.34cd.tmp"
    half_built = folder / ".native-1.so.56ef.tmp"
    half_built.mkdir()
    (half_built / "gemv4.o").touch()
    written.touch()
    left.touch()
    for path in (left, half_built):
        os.utime(path, (0, path.stat().st_mtime - 7200))
    for age in range(5):
        path = cache.path_of("rates", [age])
        cache.keep(path, "{}")
        os.utime(path, (0, age))
    kept = {cache.path_of("rates", [age]) for age in (2, 3, 4)}
    assert set(folder.iterdir()) == {other, written, *kept}
    for age in range(1, 4):
        path = folder / f"native-{age}.so"
        path.touch()
        os.utime(path, (0, other.stat().st_mtime + age))
        cache.tidy(path)
    assert {path.name for path in folder.glob("native-*")} == {"native-1.so", "native-2.so", "native-3.so"}


def test_what_was_made_is_kept_and_made_again_where_its_file_is_not_what_was_written(home: Path) -> None:
    path, made = cache.path_of("numbers", ["a"], "within"), []

    def remembered(may_keep: bool = True) -> list[int]:
        return cache.remember(path, lambda: made.append(1) or [len(made)], json.dumps, json.loads, lambda _: may_keep)

    assert [remembered(may_keep=False), remembered(), remembered()] == [[1], [2], [2]]
    path.write_text(path.read_text().replace("[2]", "[7]"))
    assert [remembered(), remembered()] == [[3], [3]]
    path.chmod(0o666)
    assert remembered() == [4]


def test_link_is_judged_by_where_it_leads(home: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere").chmod(0o777)
    home.mkdir(parents=True)
    (home / "expertune").symlink_to(tmp_path / "elsewhere")
    assert cache.find_cache()[1].startswith(f"{tmp_path / 'elsewhere'} can be written by others")


def test_doctor_shows_the_folder_and_why_it_is_another(home: Path) -> None:
    def shown() -> doctor.Finding:
        return next(finding for finding in doctor._devices() if finding["name"] == "cache")

    assert (shown()["value"], shown()["status"]) == (str(home / "expertune"), "ok")
    (home / "expertune").chmod(0o777)
    assert shown()["status"] == "warning"
    assert "can be written by others" in shown()["value"]
