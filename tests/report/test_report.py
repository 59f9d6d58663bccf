"""The picture and the last words of a run."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from expertune.report.figures import summary_figure, write_png
from expertune.report.sections import outcome
from expertune.report.summary import render_summary


@pytest.fixture
def record() -> dict[str, Any]:
    score = {"metric": "slot-f1", "rows": 5, "examples": []}
    example = {
        "prompt": "Sentence: It is fun.\nMeaning:",
        "expected": "inform(name[X])",
        "answered": "inform(name[Y])\x1b[A",
    }
    return {
        "train": {"loss": [[step, 3.0 / step] for step in range(1, 31)]},
        "eval": {"loss": [[0, 3.2], [20, 0.25], [30, 0.4]], "before": 3.2, "after": 0.25},
        "adapter": {"step": 20, "checkpoint": "checkpoint-20", "metric": "loss", "value": 0.25},
        "task": {
            "before": score | {"slot_f1": 0.0, "exact_match": 0.0},
            "after": score | {"slot_f1": 0.75, "exact_match": 0.5, "examples": [example | {"right": False}]},
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
    # What was written is the best checkpoint's, not the last evaluation's.
    assert re.search(r"loss +3\.200 +0\.250\n", text)
    assert "0.400" not in text
    assert "that of checkpoint-20, the best by loss (0.2500)" in text
    assert "answered: inform(name[Y])\\x1b[A  (wrong)" in text
    assert "expertune chat runs/demo" in text


@pytest.mark.parametrize("width", [50, 60, 80])
def test_summary_on_a_narrow_terminal_cuts_no_word(record: dict[str, Any], width: int) -> None:
    narrow, wide = io.StringIO(), io.StringIO()
    for file, columns in ((narrow, width), (wide, 200)):
        Console(width=columns, file=file).print(render_summary(record, "runs/demo"))
    assert max(map(len, narrow.getvalue().splitlines())) <= width
    assert narrow.getvalue().split() == wide.getvalue().split()


def test_summary_of_a_single_step_shows_its_loss_once(record: dict[str, Any]) -> None:
    record["train"] = {"loss": [[1, 2.125]]}
    written = io.StringIO()
    Console(width=100, file=written).print(render_summary(record, "runs/demo"))
    assert re.search(r"training loss +2\.125 at step 1 *\n", written.getvalue())
    assert written.getvalue().count("2.125") == 1


@pytest.mark.parametrize(
    ("lora", "losses", "before"),
    [
        ({"init_from": "runs/first/adapter"}, [[0, 3.2], [20, 0.25]], "3.200 at step 0"),
        ({"init": "qera"}, [[0, 3.2], [20, 0.25]], "3.200 at step 0"),
        ({"init_from": "runs/first/adapter"}, [[10, 3.2], [20, 0.25]], "-"),
        ({}, [[10, 3.2], [20, 0.25]], "-"),
    ],
    ids=str,
)
def test_loss_before_training_that_is_not_the_base_models_is_one_at_step_0(
    record: dict[str, Any], lora: dict[str, str], losses: list[list[float]], before: str
) -> None:
    record["eval"] |= {"loss": losses, "before": None}
    record["config"] = {"lora": lora}
    del record["task"], record["adapter"]
    written = io.StringIO()
    Console(width=100, file=written).print(render_summary(record, "runs/demo"))
    assert re.search(rf"loss +{before} +0\.250 *\n", written.getvalue())
    began = " (at step 0: the adapter as it began)" if "step 0" in before else ""
    assert f"evaluation: the base model before{began}, the adapter after" in " ".join(written.getvalue().split())
    (score,) = outcome(record)["scores"]
    assert (score["before"], score["after"]) == (before, 0.25)


def test_summary_of_a_run_that_evaluated_nothing_has_no_table_of_it(record: dict[str, Any]) -> None:
    record["eval"] = {"loss": [], "before": None, "after": None}
    del record["task"], record["adapter"]
    written = io.StringIO()
    Console(width=100, file=written).print(render_summary(record, "runs/demo"))
    assert "evaluation" not in written.getvalue()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"stock_peft": True, "stock_peft_refusal": None}, "runs/demo/adapter  (stock PEFT loads it)\n"),
        ({"stock_peft": False, "stock_peft_refusal": "it loses x"}, "adapter  (not for stock PEFT: it loses x)\n"),
        ({"stock_peft": True, "init": {"how": "loftq"}}, "runs/demo/adapter  (for this run's 4-bit base alone)\n"),
        ({}, "runs/demo/adapter\n"),
    ],
)
def test_summary_says_of_stock_peft_what_was_tried(record: dict[str, Any], adapter: dict[str, Any], said: str) -> None:
    written = io.StringIO()
    Console(width=100, file=written).print(render_summary(record | {"adapter": adapter}, "runs/demo"))
    assert said in "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("width", [60, 120])
def test_summary_says_what_the_run_took_beside_the_plan_and_cuts_nothing(record: dict[str, Any], width: int) -> None:
    phases = {"training": 7200.0, "evaluation": 600.0, "answers": 60.0, "loading": 30.0, "data": 0.2}
    record |= {"run": {"seconds": 7900.0, "phases": phases}, "plan": {"run": {"seconds": 7000.0}}}
    written = io.StringIO()
    Console(width=width, file=written).print(render_summary(record, "runs/demo"))
    said = " ".join(written.getvalue().split())
    assert "time 2 h 12 min: 2 h 0 min training, 10 min 0 s evaluating, 1 min 0 s answers, 30 s loading" in said
    assert "1 h 57 min were planned, 2 h 11 min measured" in said
    assert "\u2026" not in said
    record["plan"]["run"] |= {"seconds": 0.1, "is_least": True}
    written = io.StringIO()
    Console(width=width, file=written).print(render_summary(record, "runs/demo"))
    assert "planned" not in written.getvalue()


def test_picture_of_a_run_is_a_png_and_nothing_is_left_beside_it(record: dict[str, Any], tmp_path: Path) -> None:
    write_png(summary_figure(record), tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.png"]


def test_picture_names_the_checkpoint_that_the_adapter_is(record: dict[str, Any]) -> None:
    axes, _ = summary_figure(record).axes
    (line,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("adapter of checkpoint-20, best")]
    assert list(line.get_xdata()) == [20, 20]


def test_picture_says_which_data_and_adapter_and_marks_the_best_evaluation(record: dict[str, Any]) -> None:
    train = {"source": "rows/costs $5, $6.jsonl[0:9]", "num_rows": 9}
    record["data"] = {"train": train, "eval": {"source": "数据.jsonl", "num_rows": 4000}}
    record["eval"]["loss"] = [[0, 3.0], [10, 1.25], [20, 2.0]]
    losses, scores = summary_figure(record).axes
    assert "9 examples" in losses.get_title(loc="left")
    assert losses.get_title(loc="left").endswith("evaluated on data.eval, 4,000 examples")
    assert scores.get_title(loc="left").startswith("answers to ")
    labels = [line.get_label() for line in losses.get_lines()]
    assert "lowest evaluation loss: 1.250 at step 10" in labels


def test_smoothed_loss_does_not_lag_behind_the_loss(record: dict[str, Any]) -> None:
    record["train"]["loss"] = [[step, 2.0 if step <= 100 else 1.0] for step in range(1, 201)]
    losses, _ = summary_figure(record).axes
    (mean,) = [line for line in losses.get_lines() if "steps around each" in str(line.get_label())]
    falls = dict(zip(mean.get_xdata(), mean.get_ydata(), strict=True))
    assert falls[100] == pytest.approx(1.5, abs=0.1)
    assert falls[80] == 2.0
    assert falls[120] == 1.0


def test_run_without_a_task_is_drawn_and_summarized_too(record: dict[str, Any], tmp_path: Path) -> None:
    del record["task"]
    write_png(summary_figure(record), tmp_path / "summary.png")
    render_summary(record, "runs/x")
    assert (tmp_path / "summary.png").stat().st_size > 1000
