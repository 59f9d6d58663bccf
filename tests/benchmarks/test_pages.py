"""Tables of the documentation that benchmarks write say what their JSON says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers.processes import ROOT

from benchmarks import scaling, suite

RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def write_bench(page: Path) -> None:
    suite.write_table(page, {name: read(name) for name in suite.RUNS})


def write_scaling(page: Path) -> None:
    scaling.write_table(page, read("scaling-avx2"))


@pytest.mark.parametrize(
    ("name", "write"), [("performance.md", write_bench), ("performance-details.md", write_scaling)]
)
def test_a_pages_table_is_that_of_its_results(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    page = ROOT / "docs" / name
    copy = Path(shutil.copy(page, tmp_path))
    write(copy)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_the_sweep_of_the_page_is_whole() -> None:
    assert read("scaling-avx2")["points"].keys() == {
        point.name for curve in scaling.CURVES.values() for point in curve.values()
    }
