"""Several runs beside each other, on a page and on the terminal."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from expertune.cli import app
from expertune.report.compare import compare, render_comparison, short_keys, write_comparison
from tests.report.pages import CHROMIUM, browse, require_contained


def sweep(record: dict[str, Any], count: int = 10) -> list[tuple[str, dict[str, Any]]]:
    """Runs that differ in learning rate, and come out worse one after another."""
    runs = []
    for place in range(count):
        run = copy.deepcopy(record)
        run["config"]["training"]["learning_rate"] = (place + 1) / 1000
        run["config"]["output_dir"] = f"sweep/{place}"
        run["task"]["after"]["slot_f1"] = 0.9 - place / 20
        run["eval"]["after"] = 0.25 + place / 10
        runs.append((f"sweep/run-{place}", run))
    return runs


def shown(comparison: Any, width: int = 120) -> str:
    written = io.StringIO()
    Console(width=width, file=written).print(render_comparison(comparison))
    return written.getvalue()


def test_comparison_names_what_differs_what_is_alike_and_what_is_best(run_record: dict[str, Any]) -> None:
    compared = compare(sweep(run_record))
    assert compared.names == [f"run-{place}" for place in range(10)]
    assert list(compared.settings) == ["training.learning_rate"]
    assert ("lora.r", "16") in compared.alike
    best = {column.label: column.best for column in [*compared.scores, *compared.cost]}
    assert best["slot F1"] == best["evaluation loss"] == {0}
    assert best["exact match"] == best["peak memory"] == frozenset()  # all alike
    assert [len(chart.lines) for chart in compared.charts] == [10, 10, 10, 10]


def test_setting_that_one_run_leaves_out_is_compared_by_its_default(run_record: dict[str, Any]) -> None:
    other = copy.deepcopy(run_record)
    del other["config"]["lora"]
    compared = compare([("a", run_record), ("b", other)])
    assert compared.settings == {"lora.r": ["16", "8"]}
    run_record["config"]["data"]["max_length"] = 256
    other["config"]["data"].pop("max_length", None)
    unlike = compare([("a", run_record), ("b", other)])
    assert unlike.settings["data.max_length"] == ["256", "1024"]
    text = " ".join(shown(unlike).split())
    assert "the runs differ in data.max_length: their scores and losses are not of the same text" in text
    other["config"]["data"]["max_length"] = 256
    other["config"]["training"]["warmup_steps"] = 5
    assert compare([("a", run_record), ("b", other)]).settings["training.warmup_steps"] == ["not set", "5"]


def test_headers_are_the_keys_last_words_where_these_say_which_setting_it_is() -> None:
    keys = ["lora.r", "training.learning_rate", "quantization.layers.attention", "data.format", "task.format", "seed"]
    assert list(short_keys(keys).values()) == [
        *("r", "learning rate", "quantization.layers attention", "data.format", "task.format", "seed")
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(run_record: dict[str, Any]) -> None:
    runs = [("x/run", run_record), ("y/run", run_record), ("y/run", run_record)]
    assert compare(runs[:2]).names == ["x/run", "y/run"]
    assert len(set(compare(runs).names)) == 3


def test_run_that_is_not_finished_or_has_an_old_record_is_compared_too(run_record: dict[str, Any]) -> None:
    compared = compare([("a", run_record), ("b", {}), ("c", {"run": {"status": "running"}})])
    assert [column.shown[1] for column in compared.scores] == ["-", "-", "-"]
    text = shown(compared, 200)
    assert "b (not started)" in text
    assert "c (running)" in text
    assert "1 more settings differ; the page has them" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_table_of_ten_runs_cuts_no_name_and_no_figure_in_a_narrow_terminal(
    width: int, run_record: dict[str, Any]
) -> None:
    runs = sweep(run_record)
    runs[3][1]["config"]["lora"] |= {"targets": ["attention", "experts", "router", "lm_head"], "dropout": 0.05}
    compared = compare(runs)
    lines = shown(compared, width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for column in [*compared.scores, *compared.cost]:
        assert all(value in text for value in column.shown)
    for values in compared.settings.values():
        assert all(set(value.split(", ")) <= set(text.replace(",", "").split()) for value in values)
    assert all(any(name in line for line in lines) for name in compared.names)


@pytest.mark.parametrize("width", range(40, 100, 4))
def test_each_line_of_a_comparison_names_its_run_in_any_terminal(width: int, run_record: dict[str, Any]) -> None:
    lines = shown(compare([("first", run_record), ("second", run_record)]), width).splitlines()
    assert max(map(len, lines)) <= width
    named = [line.split()[0] for line in lines if line.split() and line.split()[0] in ("first", "second")]
    assert named == ["first", "second"] * (len(named) // 2)
    assert named


def test_figures_stay_beside_their_units_on_a_terminal_of_eighty_columns(run_record: dict[str, Any]) -> None:
    compared = compare(sweep(run_record, 2))
    time = next(column for column in compared.cost if column.label == "time")
    assert time.shown[0] == "12 min 34 s"
    assert shown(compared, 80).count(time.shown[0]) == 2
    assert len(shown(compared, 80).splitlines()) < len(shown(compared, 60).splitlines())  # in one table, or in three


def test_page_of_a_comparison_shows_a_line_for_each_run_and_hostile_names_as_text(
    run_record: dict[str, Any], tmp_path: Path
) -> None:
    runs = sweep(run_record)
    runs[0] = ("<script>alert(1)\u202e", runs[0][1])
    runs[1][1]["config"]["training"]["<b onclick=x>"] = "</td><script>"
    write_comparison(compare(runs), tmp_path / "page.html")
    page = require_contained((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "run-9 0.01 not set 0.450" in page.text
    assert "<script>alert(1)\\u202e" in page.text
    assert "training.<b onclick=x>" in [attributes.get("title") for _, attributes in page.tags]
    assert "10 runs compared" in page.text


def test_command_prints_the_table_and_names_the_page(
    run_record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, record in sweep(run_record, 3):
        Path(name).mkdir(parents=True)
        (Path(name) / "record.json").write_text(json.dumps(record), encoding="utf-8")
    folders = [name for name, _ in sweep(run_record, 3)]
    done = CliRunner().invoke(app, ["compare", *folders])
    assert "run-2" in done.stdout
    assert done.stderr == f"page: {Path.cwd() / 'comparison.html'}\n"
    assert "3 runs compared" in Path("comparison.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", *folders, "--json", "--out", "other.html"])
    assert [run["settings"] for run in json.loads(done.stdout)] == [
        {"training.learning_rate": value} for value in ("0.001", "0.002", "0.003")
    ]
    assert Path("other.html").is_file()
    assert CliRunner().invoke(app, ["compare", folders[0]]).exit_code == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_runs_the_page_of_a_comparison_on_a_phone(run_record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_comparison(compare(sweep(run_record)), path)
    probe = "return {wide: document.documentElement.scrollWidth, inner: window.innerWidth};"
    seen, messages = browse(path.read_text(encoding="utf-8"), tmp_path, 400, probe)
    assert messages == []
    assert seen["inner"] == 400
    assert seen["wide"] <= 400


def test_scores_alone_are_of_other_examples_where_only_the_rows_of_the_task_differ(run_record: dict[str, Any]) -> None:
    other = copy.deepcopy(run_record)
    run_record["config"]["task"] = {"metric": "exact-match", "rows": 100}
    other["config"]["task"] = {"metric": "exact-match", "rows": 20}
    assert compare([("a", run_record), ("b", other)]).note == (
        "the runs differ in task.rows: their scores are not of the same examples"
    )
    del other["task"]
    assert compare([("a", run_record), ("b", other)]).note == ""


def test_losses_of_two_objectives_are_said_to_be_two_things(run_record: dict[str, Any]) -> None:
    other = copy.deepcopy(run_record)
    run_record["config"]["objective"], other["config"]["objective"] = "dpo", "kto"
    compared = compare([("a", run_record), ("b", other)])
    assert compared.note == "the runs differ in objective (dpo, kto): their losses do not measure the same"
    assert compared.note in " ".join(shown(compared).split())
