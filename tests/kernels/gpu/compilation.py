"""`tools/compile_kernels.py` in a process of its own, which may be begun before the test of what it finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
BY_DEFAULT = ("--shapes", "mixtral-8x7b", "--tokens", "320", "--quick", "--once", "--targets", "90")
"""Each kernel of Mixtral's layer in one variant, for one target."""


class Compilation:
    """A compilation under way.

    Args:
        folder: an empty folder.
        arguments: the tool's.
        triton: where another Triton than the environment's own is installed.
    """

    def __init__(self, folder: Path, arguments: tuple[str, ...], triton: Path | None = None) -> None:
        self.found, self.said = folder / "kernels.json", folder / "said"
        variables = {
            name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")
        }
        variables["TRITON_CACHE_DIR"] = str(folder / "cache")
        if triton is not None:
            variables["PYTHONPATH"] = str(triton)
        # The status comes through a pipe: a copy of the process that has begun it cannot wait for it.
        shell = ["sh", "-c", '"$@" >"$0" 2>&1; echo $?', str(self.said)]
        command = [*shell, sys.executable, "tools/compile_kernels.py", "--json", str(self.found), *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def result(self) -> dict[str, object]:
        """What the tool found, once it has ended."""
        status, _ = self.process.communicate()
        assert status.strip() == "0", self.said.read_text(encoding="utf-8")[-6000:]
        return json.loads(self.found.read_text(encoding="utf-8"))


AHEAD: list[Compilation] = []
"""The compilation by default, where the run of the tests has begun it (tools/run_tests.py)."""
