"""The benchmark of a full-size step, at a size that a test can afford: the folder that it writes is one that runs."""

from pathlib import Path

import pytest
from benchmarks.workload import Shape

from benchmarks import full_mixtral_step


@pytest.mark.slow
def test_written_folder_takes_a_step_from_disk_and_says_what_it_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(full_mixtral_step, "MIXTRAL", Shape(hidden=512, intermediate=64, layers=2, experts=4, top_k=2))
    monkeypatch.setattr(full_mixtral_step, "TOKENS", 64)
    full_mixtral_step.write_folder(tmp_path / "model", full_mixtral_step.MIXTRAL)
    result = full_mixtral_step.run_step(tmp_path / "model")
    assert result["tokens"] == 64
    assert set(result["placement"]["places"].values()) == {"disk"}
    assert 0 < result["seconds"] < result["run_seconds"]
    assert result["peak_rss_bytes"] > 0
    assert 5 < result["loss"] < 20
