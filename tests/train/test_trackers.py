"""Trackers receive the run through their own real clients, offline."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertune.record import RunRecord


@pytest.fixture
def run_offline(run_values: dict[str, Any], run_file: Callable[..., Path], tmp_path: Path) -> Callable[..., RunRecord]:
    """Train by the command line in a process of its own, as trackers hold on to theirs until it ends."""

    def run(tracker: str, **training: Any) -> RunRecord:
        settings = run_values["training"] | {"report_to": tracker, "max_steps": 4, "save_strategy": "no", **training}
        path = run_file(run_values | {"training": settings})
        environment = os.environ | {
            "WANDB_MODE": "offline",
            "WANDB_PROJECT": "viggo-finetune",
            "TRACKIO_DIR": str(tmp_path / "trackio"),
        }
        subprocess.run(
            [sys.executable, "-m", "expertune", "train", str(path)],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            timeout=240,
        )
        return RunRecord.load(run_values["output_dir"])

    return run


def logged_means(record: RunRecord) -> list[float]:
    """Means over the two steps between logs."""
    losses = [loss for _, loss in record["train"]["loss"]]
    return [sum(losses[at : at + 2]) / 2 for at in range(0, len(losses), 2)]


def test_weights_and_biases_holds_project_run_name_and_losses(
    run_offline: Callable[..., RunRecord], tmp_path: Path
) -> None:
    record = run_offline("wandb")
    content = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    assert b"viggo-finetune" in content
    assert re.search(rb"run-\d{4}-\d{2}-\d{2}-\d{2}-\d{2}", content)  # <output folder>-%Y-%m-%d-%H-%M
    assert b"train/loss" in content
    for mean in logged_means(record):
        assert json.dumps(mean).encode() in content


def test_trackio_database_holds_the_losses(run_offline: Callable[..., RunRecord], tmp_path: Path) -> None:
    record = run_offline("trackio", run_name="named")
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    database.close()
    assert {name for name, _ in rows} == {"named"}
    losses = [metrics["train/loss"] for metrics in (json.loads(row) for _, row in rows) if "train/loss" in metrics]
    assert losses == pytest.approx(logged_means(record))
