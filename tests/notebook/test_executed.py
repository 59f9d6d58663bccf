"""Notebooks as they lie in the repository: executed from the first cell to the last, and fit to be published."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pages import ROOT, page_id

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return cells


def code_of(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in cells_of(notebook) if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_cells_ran_in_their_order_without_an_error(notebook: Path) -> None:
    cells = code_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert notebook.stat().st_size < 500_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_outputs_hold_no_path_of_a_machine(notebook: Path) -> None:
    texts = ["".join(output.get("text", "")) for cell in code_of(notebook) for output in cell["outputs"]]
    for cell in code_of(notebook):
        for output in cell["outputs"]:
            texts += ["".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    assert re.findall(r"(?<![\w.<:/*\"-])/\w+/\w\S*", "\n".join(texts)) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_training_is_a_bar_and_a_table_in_one_output_and_one_text(notebook: Path) -> None:
    (training,) = [
        cell for cell in code_of(notebook) if "".join(cell["source"]).endswith("run = expertune.finetune(config)")
    ]
    drawn, written = sorted(training["outputs"], key=lambda output: output["output_type"])
    assert (drawn["output_type"], written["output_type"]) == ("display_data", "stream")
    html = "".join(drawn["data"]["text/html"])
    assert "step 100/100" in html
    assert re.findall(r'<th class="number">([^<]+)</th>', html) == ["step", "training loss", "evaluation loss"]
    assert re.findall(r'<tr class=""><td class="number">(\d+)<', html) == [str(step) for step in range(0, 101, 10)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_training_again_says_how_to_resume(notebook: Path) -> None:
    said = ["".join(output.get("text", "")) for cell in code_of(notebook) for output in cell["outputs"]]
    assert [text for text in said if "already holds a run; continue it with" in text and "resume=True" in text]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page_id)
def test_links_of_a_notebook_lead_to_files_that_exist(notebook: Path) -> None:
    prose = "\n".join("".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)", prose)
    assert links
    assert [link for link in links if not (notebook.parent / link).is_file()] == []
