"""The tutorial's own stack beside ours: which interpreter it runs under, and how its scripts are run."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / ".venv-legacy" / "bin" / "python"
VARIABLE = "EXPERTUNE_LEGACY_PYTHON"

RunLegacy = Callable[..., None]


@pytest.fixture(scope="session")
def legacy_python(request: pytest.FixtureRequest) -> Path:
    """The legacy interpreter; without one the tests are skipped, and a line on the terminal says so."""
    python = Path(os.environ.get(VARIABLE) or BUILT)
    if not python.is_file():
        reason = f"{python} is absent: build it with `make test-slow` or tools/legacy_env.sh, or set {VARIABLE}"
        # pytest -q counts skips without their reasons; nobody should take an absent stack for a passed test.
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\nSKIPPED tests/legacy: {reason}")
        pytest.skip(reason)
    return python


@pytest.fixture(scope="session")
def run_legacy(legacy_python: Path) -> RunLegacy:
    """Run one of the scripts beside this file in the legacy environment on a job, a mapping that goes as JSON."""

    def run(script: str, job: dict[str, Any], folder: Path) -> None:
        path = folder / f"{script}.job.json"
        path.write_text(json.dumps(job, default=str), encoding="utf-8")
        done = subprocess.run(
            [str(legacy_python), str(HERE / f"{script}.py"), str(path)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run
