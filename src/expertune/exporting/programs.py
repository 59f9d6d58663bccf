"""Programs of `exporting/engines`, run in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertune.errors import ConfigError, ExportError

_PROGRAMS = Path(__file__).parent / "engines"

TIMEOUT = "EXPERTUNE_ENGINE_TIMEOUT"
"""Names the seconds that an engine's process may take, where the usual ones are too few or too many."""

# Half an hour, and for each billion of weights eight minutes more: a CPU scores 64 examples in that.
_SECONDS, _SECONDS_PER_WEIGHT = 1800.0, 480e-9


class ProgramError(ExportError):
    """A program did not answer its request; the message has the last line that it wrote."""


class BrokenOffError(ProgramError):
    """A program was ended from outside, took too long, or was not started: nothing is known of what it was given."""


def run_program(
    program: str, request: dict[str, Any], path: Path, what: str, num_weights: int, python: str = sys.executable
) -> None:
    """Run a program on a request; its answers lie beside it.

    Args:
        program: its file name.
        request: see the program.
        path: where the request is written.
        what: start of the message where it fails.
        num_weights: of the model, for the time that it may take.
        python: the interpreter that runs it.

    Raises:
        ProgramError: it failed.
    """
    path.write_text(json.dumps(request), encoding="utf-8")
    seconds = _timeout(num_weights)
    try:
        status, errors = start([python, str(_PROGRAMS / program), str(path)], seconds)
    except subprocess.TimeoutExpired:
        raise BrokenOffError(
            f"{what}: not done after {seconds:.0f} seconds, and ended; {TIMEOUT} gives it more"
        ) from None
    except OSError as error:
        raise BrokenOffError(f"{what}: {python} cannot be started: {error.strerror}") from None
    if status < 0:
        raise BrokenOffError(f"{what}: ended by signal {-status}")
    if status:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        raise ProgramError(f"{what}: {lines[-1][:400] if lines else f'exit status {status}'}")


def start(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Run a command, out of reach of the hub; its exit status, and what it wrote to stderr."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)
    return done.returncode, done.stderr


def _timeout(num_weights: int) -> float:
    asked = os.environ.get(TIMEOUT)
    try:
        return float(asked) if asked else _SECONDS + num_weights * _SECONDS_PER_WEIGHT
    except ValueError:
        raise ConfigError(f"{TIMEOUT}: {asked} is no number of seconds") from None
