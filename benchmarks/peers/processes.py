"""Start drivers and talk to them: the runner's end of `benchmarks.peers.driver`."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LEGACY_PYTHON = "EXPERTUNE_LEGACY_PYTHON"

# Stack -> its module of `benchmarks.peers` and what its command line has in addition.
STACKS: dict[str, tuple[str, list[str]]] = {
    "ours": ("ours", []),
    "kept": ("ours", ["--keep"]),
    "bfloat16": ("ours", []),
    "legacy": ("legacy", []),
    "tutorial": ("legacy", ["--pad-to", "320"]),
    "stock5": ("stock5", []),
    "experts4bit": ("experts4bit", []),
    "unsloth": ("unsloth", []),
    "axolotl": ("axolotl", []),
}

# Stacks that run on a GPU alone, and those of them whose packages lie over ours in a folder of their own.
GPU_STACKS = ("experts4bit", "unsloth", "axolotl")
PINNED_MODULES = ("unsloth", "axolotl")
PINNED_FOLDER = "EXPERTUNE_PINNED_PACKAGES"


class Driver:
    """One stack in its own process.

    Args:
        name: a stack of `STACKS`.
        arguments: the driver's command line.
        limit_s: seconds after which it is ended, whatever it does; None waits for ever.
        stack: its module and arguments, where it is none of `STACKS`.

    Attributes:
        ready: what the driver said when its model was built: versions, threads, load time, notes.

    Raises:
        RuntimeError: the driver ended; its last words are in the message.
        FileNotFoundError: see `interpreter`.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        limit_s: float | None = None,
        stack: tuple[str, list[str]] | None = None,
    ) -> None:
        self.name = name
        module, more = stack or STACKS[name]
        python = interpreter(module)
        # Libraries say much; it is kept in a file, and shown only where the driver dies.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close()
        # No stack may look for kernels or weights elsewhere while it is timed.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | packages(module)
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.peers.{module}", *arguments, *more],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._timer: threading.Timer | None = None
        if limit_s is not None:
            self._timer = threading.Timer(limit_s, self._process.kill)
            self._timer.daemon = True
            self._timer.start()
        try:
            self.ready = self._read()
        except BaseException:
            self._stop_timer()
            raise

    def ask(self, action: str) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a driver that is gone has an end to tell of, which _read does
            self._process.stdin.write(json.dumps({"do": action}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process by closing its stdin; kill it where that does not help."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stop_timer()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            hint = " (killed: out of memory, or over its time?)" if code == -9 else ""
            raise RuntimeError(f"{self.name} ended with code {code}{hint}:\n{self._errors.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def packages(module: str) -> dict[str, str]:
    """What the environment of a module's process has in addition: where its older packages are found before ours.

    Raises:
        FileNotFoundError: the folder is not named, or not there.
    """
    if module not in PINNED_MODULES:
        return {}
    folder = os.environ.get(PINNED_FOLDER)
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"{PINNED_FOLDER} must name the folder of {module}'s packages: benchmarks/README.md")
    behind = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([folder, behind] if behind else [folder])}


def interpreter(module: str) -> Path:
    """The Python that a module of `benchmarks.peers` runs under.

    Raises:
        FileNotFoundError: the legacy environment has not been built.
    """
    if module != "legacy":
        return Path(sys.executable)
    python = Path(os.environ.get(LEGACY_PYTHON) or ROOT / ".venv-legacy" / "bin" / "python")
    if not python.is_file():
        raise FileNotFoundError(
            f"{python}: no such interpreter; build the environment with tools/legacy_env.sh, name another one in "
            f"{LEGACY_PYTHON}, or leave its peers out with --peers stock5"
        )
    return python
