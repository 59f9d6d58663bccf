"""Every write of a run fails once: one clear error, a record that does not say `running`, and a run that resumes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT
from tests.train.conftest import nine_steps

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES)


class Faults:
    """Runs of two steps in which one write fails, beside the same run undisturbed.

    Args:
        folder: an empty folder.
        values: the run file.
    """

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder, self.values = folder, values
        self.library = folder / "faults.so"
        source = Path(__file__).parents[1] / "write_faults.c"
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None or os.uname().sysname != "Linux":
            pytest.skip("write faults are injected by a preloaded library, which takes a C compiler on Linux")
        subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(self.library), str(source), "-ldl"], check=True)

    def walk(self, points: list[tuple[float, int, bool]]) -> list[dict[str, Any]]:
        """How the run ended in which each of these writes failed, and its resume; an undisturbed run first."""
        task = {"values": self.values, "folder": str(self.folder), "points": points}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("walk_faults.py"))],
            input=json.dumps(task),
            env=os.environ | {"LD_PRELOAD": str(self.library), "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results: list[dict[str, Any]] = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        assert results[0]["ended"] == "finished"
        assert results[0]["writes"] > 100, "files are written by calls that are not looked at"
        return results

    def sites(self) -> list[int]:
        """Of an undisturbed run: the first, middle and last of all changes of one kind to one file, as numbers."""
        self.walk([])
        lines = (self.folder / "trace").read_text(encoding="utf-8").splitlines()
        kinds: dict[str, list[int]] = {}
        for number, line in enumerate(lines):
            kind = re.sub(r"\.[a-z0-9_]{8}$|\.\d+$", "", line.strip())
            kinds.setdefault(kind, []).append(number)
        return sorted({held[place] for held in kinds.values() for place in (0, len(held) // 2, -1)})


@pytest.fixture(scope="module")
def faults(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    values = nine_steps(small_mixtral, rows_file, Path("set by each"))
    values["training"] |= {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "save_total_limit": 1, "logging_steps": 1}
    values["training"] |= {"load_best_model_at_end": True}
    return Faults(tmp_path_factory.mktemp("faults"), values)


def problems_of(result: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """What is wrong with how a run and its resume ended."""
    found = []
    if result["ended"] == "traceback":
        found.append(f"ended in a traceback: {result['said'][-1500:]}")
    elif result["ended"] == "error":
        # torch's writer keeps the system's reason to itself.
        reasons = [os.strerror(number) for number in ERRORS] + ["could not be written to its end"]
        if "\n" in result["said"] or not any(reason in result["said"] for reason in reasons):
            found.append(f"is not told clearly: {result['said']}")
        if result["status"] not in ("stopped", None):
            found.append(f"left a record that says {result['status']}")
        if result["resumed"] != "finished":
            found.append(f"does not resume: {result['resumed_said'][-1500:]}")
    for key in ("adapter", "losses", "final"):
        if result[key] != whole[key]:
            found.append(f"ends with another {key} than the undisturbed run")
    return [f"write {result['at']} ({result['what']}): {problem}" for problem in found]


def found_in(faults: Faults, points: list[tuple[float, int, bool]]) -> list[str]:
    whole, *results = faults.walk(points)
    return [problem for result in results for problem in problems_of(result, whole)]


def test_failed_write_anywhere_in_a_run_is_one_error_and_resumes_to_the_same(faults: Faults) -> None:
    # Spread over the run; the slow test below walks every kind. A disk that is full stays full for the rest of the run.
    found = found_in(faults, [(0.3, errno.EIO, False), (0.7, errno.ENOSPC, True)])
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_every_kind_of_write_of_a_run_that_fails_is_one_error_and_resumes_to_the_same(faults: Faults) -> None:
    found = found_in(faults, [(at, ERRORS[number % 4], False) for number, at in enumerate(faults.sites()) if at])
    assert not found, "\n".join(found)
