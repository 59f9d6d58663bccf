"""Bars and figures in a notebook."""

import re

import pytest

from expertune.notebook.progress import NotebookProgress
from expertune.run.progress import Estimate
from tests.report.pages import Page

pytest.importorskip("IPython", reason="without it there is no notebook")


@pytest.fixture
def progress() -> NotebookProgress:
    return NotebookProgress(lambda task: f"{task.description} {int(task.completed)}/{int(task.total or 0)}")


def test_bars_come_and_go_and_the_table_stays(progress: NotebookProgress) -> None:
    step = progress.add_task("step", total=40, completed=0, figures="", estimate=Estimate(40), unit="")
    scoring = progress.add_task("scoring", total=0, completed=0, figures="", estimate=Estimate(0), unit="")
    progress.update(step, total=40, completed=10, figures="loss 1.5")
    assert Page(progress.html).text.startswith("step 10/40 loss 1.5 0:00:00 scoring 0/0")
    assert [bar for tag, bar in Page(progress.html).tags if tag == "progress"] == [{"value": "10", "max": "40"}, {}]
    progress.remove_task(scoring)
    progress.add_figures("10", {"training loss": "1.5", "evaluation loss": "", "score": ""})
    progress.add_figures("10", {"training loss": "", "evaluation loss": "1.6"})
    progress.remove_task(step)
    assert Page(progress.html).text == "step training loss evaluation loss 10 1.5 1.6"


def test_table_of_a_long_run_has_the_first_and_the_newest_rows(progress: NotebookProgress) -> None:
    for step in range(0, 1001, 10):
        progress.add_figures(str(step), {"training loss": "1.0"})
    steps = re.findall(r'<tr class=""><td class="number">([^<]*)<', progress.html)
    assert steps == ["0", "...", *map(str, range(810, 1001, 10))]


def test_display_of_which_nothing_stays_is_empty(progress: NotebookProgress) -> None:
    progress.remove_task(progress.add_task("loading", total=1, completed=0, figures="", estimate=Estimate(1), unit=""))
    assert progress.html == ""
