"""Programs of `exporting/engines`, run in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from expertune.errors import ExportError

_PROGRAMS = Path(__file__).parent / "engines"


def run_program(program: str, request: dict[str, Any], path: Path, what: str, python: str = sys.executable) -> None:
    """Run a program on a request; its answers lie beside it.

    Args:
        program: its file name.
        request: see the program.
        path: where the request is written.
        what: start of the message where it fails.
        python: the interpreter that runs it.

    Raises:
        ExportError: it failed; gives the last line that it wrote.
    """
    path.write_text(json.dumps(request), encoding="utf-8")
    command = [python, str(_PROGRAMS / program), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise ExportError(f"{what}: {lines[-1].strip()[:400] if lines else ended}")
