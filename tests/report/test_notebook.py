"""A run as a notebook shows it."""

from pathlib import Path
from typing import Any

import pytest

from expertune.report.notebook import run_html
from tests.report.pages import Page


def test_outcome_losses_answers_cost_and_report_are_shown(
    run_record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small run").mkdir()
    Path("small run/report.html").touch()
    page = Page(run_html(run_record, Path("small run")))
    assert page.text.startswith("small run : finished , 100 steps before after slot F1 0.000 0.750")
    assert "loss on evaluation examples 3.200 0.250" in page.text
    assert "dashed: the adapter: checkpoint-50" in page.text
    assert "peak memory 1.60 GB" in page.text
    assert "rating[ poor ])" in page.text
    assert ("a", {"href": "small%20run/report.html"}) in page.tags


def test_run_that_stopped_shows_why_and_names_no_report_that_is_not_there(run_record: dict[str, Any]) -> None:
    run_record["run"] = {"status": "stopped", "error": "the loss became NaN at step 7"}
    page = Page(run_html(run_record, Path("runs/small")))
    assert "small : stopped , 100 steps the loss became NaN at step 7" in page.text
    assert "report" not in page.text


def test_record_of_a_run_that_did_nothing_yet_can_be_shown() -> None:
    assert Page(run_html({}, Path("runs/new"))).text == "new : not started , 0 steps"


def test_hostile_text_of_a_record_is_shown_as_text(run_record: dict[str, Any]) -> None:
    hostile = "</style><script>alert(1)</script><img src=x onerror=alert(1)>\u202e"
    run_record["run"]["error"] = hostile
    run_record["model"]["device"] = run_record["adapter"]["checkpoint"] = hostile
    for when in ("before", "after"):
        for key in ("prompt", "expected", "answered"):
            run_record["task"][when]["examples"][0][key] = hostile
    shown = run_html(run_record, Path(hostile.replace("/", "")))
    assert not {tag for tag, _ in Page(shown).tags} & {"script", "img", "a"}
    assert "\u202e" not in shown
