"""The step benchmark on a model of a few megabytes: every stack runs, and ours is held against the tutorial's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_every_stack_is_measured(tmp_path: Path, legacy_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTUNE_LEGACY_PYTHON", str(legacy_python))
    sizes = ["--hidden", "512", "--intermediate", "128", "--layers", "1", "--experts", "4", "--tokens", "64"]
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "run.py"), "step", *sizes, "--rounds", "1"),
            *("--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "step.json")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    result = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert set(result["peers"]) == {"legacy", "tutorial", "stock5"}
    assert result["gate"]["held_to_ours"] == ["legacy", "tutorial"]
    for stack in (result["ours"], *result["peers"].values()):
        assert stack["tokens_per_second"] > 0
        assert stack["peak_bytes"] > 0
        assert stack["check"]["factors_without_gradient"] == 0
    trained = {name: stack["trainable_parameters"] for name, stack in result["peers"].items()}
    assert trained["legacy"] == trained["tutorial"] == result["ours"]["trainable_parameters"] < trained["stock5"]
    assert result["floor"]["tokens_per_second"] > 0
    assert str(tmp_path) not in json.dumps(result["model"])
