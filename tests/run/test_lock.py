"""One process per run directory, and what is left when that process is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertune.errors import ConfigError
from expertune.run.lock import LOCK_NAME, hold_run_directory

HOLD = """
import os, sys, time
from pathlib import Path
from expertune.run.lock import hold_run_directory
with hold_run_directory(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        print(os.getpid(), flush=True)  # as a data loader's worker, which outlives the process that is killed
        time.sleep(600)
    if sys.argv[2] != "fork":
        print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds `run`, and the line that it printed."""
    how = getattr(request, "param", "alone")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), how], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line
        yield process, line
        process.kill()


def test_second_run_is_refused_by_host_and_process_of_the_first(
    holder: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error, hold_run_directory(tmp_path / "run"):
        pass
    assert f"process {holder[0].pid} on {os.uname().nodename} is writing a run here" in str(error.value)
    assert json.loads((tmp_path / "run" / LOCK_NAME).read_text(encoding="utf-8"))["pid"] == holder[0].pid


@pytest.mark.parametrize("holder", ["alone", "fork"], indirect=True)
def test_lock_of_a_killed_process_is_recognized_as_stale(
    holder: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, line = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert (tmp_path / "run" / LOCK_NAME).exists()
        with hold_run_directory(tmp_path / "run"):
            said = json.loads((tmp_path / "run" / LOCK_NAME).read_text(encoding="utf-8"))
            assert said["pid"] == os.getpid()
        assert list((tmp_path / "run").iterdir()) == []
    finally:
        if line.isdigit():
            os.kill(int(line), signal.SIGKILL)


def test_second_run_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with hold_run_directory(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):  # noqa: SIM117
        with hold_run_directory(tmp_path):
            pass
    with hold_run_directory(tmp_path):
        pass


def test_folders_that_were_made_for_a_run_that_wrote_nothing_are_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "some" / "where"
    with pytest.raises(ZeroDivisionError), hold_run_directory(run_dir):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with hold_run_directory(run_dir):
        (run_dir / "record.json").touch()
    assert list(run_dir.iterdir()) == [run_dir / "record.json"]


@pytest.mark.parametrize("where", ["/proc/x", "file/run", "file"])
def test_output_folder_that_cannot_be_made_is_named(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"output_dir .*{where}: a run cannot be written here"):  # noqa: SIM117
        with hold_run_directory(tmp_path / where):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_relative_output_folder_is_held_where_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with hold_run_directory(Path("run")), pytest.raises(ConfigError, match="is writing a run here"):  # noqa: SIM117
        with hold_run_directory(tmp_path / "run"):
            pass


def test_link_in_the_place_of_the_lock_is_refused_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"\.lock\.json: a link, and .*remove the link"):  # noqa: SIM117
        with hold_run_directory(tmp_path / "run"):
            pass
    assert (tmp_path / "mine").read_text() == "kept"
