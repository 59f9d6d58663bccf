"""The picture and the last words of a run."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from expertune.report.plots import plot_summary
from expertune.report.summary import render_summary


@pytest.fixture
def record() -> dict[str, Any]:
    example = {"prompt": "Sentence: It is fun.\nMeaning:", "expected": "inform(name[X])", "answered": "inform(name[Y])"}
    return {
        "train": {"loss": [[step, 3.0 / step] for step in range(1, 31)]},
        "eval": {"loss": [[0, 3.2], [30, 0.4]]},
        "task": {
            "before": {"rows": 5, "slot_f1": 0.0, "exact_match": 0.0, "examples": []},
            "after": {"rows": 5, "slot_f1": 0.75, "exact_match": 0.5, "examples": [example | {"right": False}]},
        },
        "throughput": {"tokens_per_second": 1234.5},
        "memory": {"peak_bytes": 2_500_000_000},
    }


def test_summary_shows_scores_before_and_after_beside_the_losses(record: dict[str, Any]) -> None:
    written = io.StringIO()
    Console(width=100, file=written).print(render_summary(record, "runs/demo"))
    text = written.getvalue()
    assert "slot F1" in text
    assert "0.750" in text
    assert "3.200" in text
    assert "1,234" in text or "1,235" in text
    assert "answered: inform(name[Y])  (wrong)" in text
    assert "expertune chat runs/demo" in text


def test_picture_of_a_run_is_a_png_and_nothing_is_left_beside_it(record: dict[str, Any], tmp_path: Path) -> None:
    plot_summary(record, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.png"]


def test_run_without_a_task_is_drawn_and_summarised_too(record: dict[str, Any], tmp_path: Path) -> None:
    del record["task"]
    plot_summary(record, tmp_path / "summary.png")
    render_summary(record, "runs/x")
    assert (tmp_path / "summary.png").stat().st_size > 1000
