"""A run's page: what it shows, what it withstands, and how it looks to a browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expertune.cli import app
from expertune.errors import StorageError
from expertune.report.answers import answers
from expertune.report.differences import differences
from expertune.report.expert_maps import expert_maps, load_over_time
from expertune.report.page import render_page, write_page
from expertune.run.directory import stops_recorded
from expertune.run.record import RunRecord
from tests.report.pages import CHROMIUM, browse, require_contained

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "</style></title><svg onload=alert(1)>",
    "{{ 7 * 7 }}",
    "a\u202eb\u2066c\x1b[2Jd\x00e",
    "half \ud800 surrogate",
    "W" * 3000,
]


def stopped_run(run_dir: Path, error: str) -> None:
    def fail(record: RunRecord) -> None:
        with stops_recorded(record, print):
            record.update("run", status="running")
            raise StorageError(error)

    with pytest.raises(StorageError):
        fail(RunRecord.start(run_dir))


def test_page_of_a_run_shows_the_outcome_first_and_then_all_the_rest(run_record: dict[str, Any]) -> None:
    page = require_contained(render_page(run_record, "runs/small"))
    parts = [
        *("slot F1 0.000 → 0.750", "loss on evaluation examples 3.200 → 0.250", "on 5 answered", "on all 12"),
        *("12 min 34 s", "1.60 GB", "2.00 GB planned", "900 tokens/s", "checkpoint-50", "872,448 trained weights"),
        *("memory ran out at step 3 (training): smaller micro-batches", "Loss per answer token"),
        *(
            "dashed: the adapter: checkpoint-50",
            "Gradient norm",
            "Answered examples",
            "base model wrong",
            "tuned wrong",
        ),
        *("3 prompts are empty", "cut at 256 tokens", "id (in 40)", "line 7: the answer is empty"),
        *("peak memory 2.00 GB 1.60 GB 80 %", "training, evaluations and answers 9 min 10 s 11 min 0 s 120 %"),
        *("tokens per second 1,000 900 90 %", "phase training 10 min 0 s", "result passed"),
        *("lora.r 16 8", "training.learning_rate 0.004", "expertune train runs/small", "torch 2.13.0+cpu"),
    ]
    found = [page.text.find(part) for part in parts]
    assert -1 not in found, parts[found.index(-1)]
    assert found == sorted(found)
    assert page.text.count("9 min 10 s 11 min 0 s 120 %") == 1


def test_page_shows_how_many_layers_keep_gate_and_up_as_planned_and_as_it_was(run_record: dict[str, Any]) -> None:
    assert "keep gate and up" not in render_page(run_record, "runs/small")
    run_record["plan"]["kept"] = {"layers": 32, "of_layers": 32}
    run_record["train"]["kept_layers"] = 20
    assert "expert layers that keep gate and up 32 20" in require_contained(render_page(run_record, "runs/small")).text
    del run_record["train"]["kept_layers"]
    assert "expert layers that keep gate and up 32 -" in require_contained(render_page(run_record, "runs/small")).text


def test_page_of_a_model_too_small_for_an_estimate_shows_limits(run_record: dict[str, Any]) -> None:
    run_record["plan"]["time"]["is_least"] = True
    text = require_contained(render_page(run_record, "runs/small")).text
    assert "answers at least 9 min 10 s 11 min 0 s tokens per second at most 1,000 900" in text


def test_settings_with_their_default_value_are_left_out(run_record: dict[str, Any]) -> None:
    assert "lora.alpha" not in require_contained(render_page(run_record, "runs/small")).text
    run_record["config"]["lora"]["alpha"] = 32.0
    assert "lora.alpha 32 16" in require_contained(render_page(run_record, "runs/small")).text


def test_answers_are_marked_where_they_differ_from_the_reference(run_record: dict[str, Any]) -> None:
    page = require_contained(render_page(run_record, "runs/small"))
    assert [text for text in page.marked if text in ("good", "poor")] == ["good", "poor"]


def test_answers_can_be_filtered_by_what_became_of_them(run_record: dict[str, Any]) -> None:
    def examples(*figures: float) -> list[dict[str, Any]]:
        common = {"expected": "f(a[b])", "answered": "x", "right": False}
        return [common | {"prompt": str(place), "figure": each} for place, each in enumerate(figures)]

    run_record["task"]["before"]["examples"] = examples(0, 0.5, 0.5)
    run_record["task"]["after"]["examples"] = examples(0.25, 0.5, 0.25, 1)
    found = answers(run_record)
    assert [each["kinds"] for each in found["shown"]] == [
        ["wrong", "better"],
        ["wrong", "same"],
        ["wrong", "worse"],
        ["wrong"],
    ]
    assert ("better", "got better", 1) in found["kinds"]
    assert "tuned wrong slot F1 0.250" in require_contained(render_page(run_record, "runs/small")).text
    for score in ("before", "after"):  # as earlier releases wrote them
        for example in run_record["task"][score]["examples"]:
            del example["figure"]
    run_record["task"]["after"]["examples"][0]["right"] = True
    assert [each["kinds"][1:] for each in answers(run_record)["shown"]] == [["better"], ["same"], ["same"], []]


def test_page_of_many_and_long_answers_stays_small_and_says_how_many_it_has(run_record: dict[str, Any]) -> None:
    words = [f"w{number} " for number in range(700)]
    long = {"expected": "".join(words), "answered": "<".join(words[1:]), "right": False}
    for score in ("before", "after"):
        run_record["task"][score] |= {"rows": 256, "examples": [long | {"prompt": str(n)} for n in range(256)]}
    html = render_page(run_record, "runs/small")
    assert len(html) < 2_000_000
    shown = len(answers(run_record)["shown"])
    assert 8 < shown < 256
    assert f"Of 256 that were answered, the first {shown} are here." in html
    short = {"prompt": "p", "expected": "e", "answered": "a", "right": False}
    for score in ("before", "after"):
        run_record["task"][score] |= {"rows": 1200, "examples": [short] * 1200}
    assert "Of 1,200 that were answered, all are here." in render_page(run_record, "runs/small")


def test_commands_are_those_that_a_run_in_its_state_can_take(run_record: dict[str, Any]) -> None:
    def commands() -> list[str]:
        html = render_page(run_record, "runs/small")
        return [line.split("<")[0] for line in html.split("<pre>")[1:] if line.startswith(("expertune", "torchrun"))]

    again, report = "expertune train runs/small output_dir=runs/again", "expertune report runs/small"
    assert commands() == ["expertune chat runs/small", again, report]
    run_record["config"]["data"]["eval"] = "eval.csv"
    assert "expertune evaluate runs/small" in commands()
    run_record["run"]["status"] = "stopped"
    assert commands() == ["expertune train runs/small --resume", again, report]
    run_record["train"]["processes"] = 2
    assert commands()[1] == f"torchrun --nproc-per-node 2 -m {again}"
    run_record["run"]["status"] = "running"
    assert len(commands()) == 2


def test_run_without_evaluation_shows_its_training_loss(run_record: dict[str, Any]) -> None:
    run_record |= {"task": {}, "eval": {"loss": []}, "experts": {}}
    text = require_contained(render_page(run_record, "runs/small")).text
    assert "training loss 3.000 → 0.030 Nothing has been evaluated. The training loss is" in text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_anywhere_in_a_record_is_only_text(text: str, run_record: dict[str, Any], tmp_path: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items()} | {text: text}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return text if isinstance(value, str) else value

    honest = require_contained(render_page(run_record, "runs/small"))
    written = write_page(poisoned(run_record), tmp_path).read_bytes().decode("utf-8")
    page = require_contained(written)
    known = {tag for tag, _ in honest.tags} | {"p"}
    assert {tag for tag, _ in page.tags} <= known
    shown = {"\u202e": "\\u202e", "\u2066": "\\u2066", "\x1b": "\\x1b", "\x00": "\\x00", "\ud800": "\\ud800"}
    for character, spelled in shown.items():
        assert character not in written
        text = text.replace(character, spelled)
    assert " ".join(text.split())[:500] in page.text


@pytest.mark.parametrize("missing", [*RunRecord.start(Path()).values, "run", "data", "plan", "train", "eval", "task"])
def test_record_without_a_section_has_a_page_too(missing: str, run_record: dict[str, Any]) -> None:
    run_record.pop(missing, None)
    assert "small" in require_contained(render_page(run_record, "runs/small")).text
    run_record[missing] = {}
    require_contained(render_page(run_record, "runs/small"))


def test_empty_record_has_a_page_that_says_so() -> None:
    page = require_contained(render_page({}, "runs/empty"))
    assert "not started 0 steps" in page.text
    assert "Nothing has been evaluated" in page.text


def test_expert_maps_show_shares_before_and_after_and_what_changed(run_record: dict[str, Any]) -> None:
    maps = expert_maps(run_record)
    assert maps is not None
    shown = {each["title"]: each["shown"]["rows"] for each in maps["maps"]}
    assert shown == {
        "base model": [[25, 25, 25, 25], [40, 30, 28.5, 1.5]],
        "adapter, step 50": [[40, 10, 25, 25], [40, 30, 30, 0]],
        "change": [[15, -15, 0, 0], [0, 0, 1.5, -1.5]],
    }
    assert maps["few"] == [("base model", 1, "layer 1: 3"), ("adapter, step 50", 1, "layer 1: 3")]
    entropy, load = (drawing.values["series"] for drawing in maps["charts"])
    assert entropy[1]["points"] == [[0, 0.6], [1, 0.4]]
    assert load[0]["points"][0] == [0, 1]


def test_selected_experts_have_a_map_and_a_tile_and_a_damaged_selection_none(run_record: dict[str, Any]) -> None:
    names = list(next(iter(run_record["experts"]["evaluations"].values()))["counts"])
    layers = dict(zip(names, ([1], [0, 2]), strict=True))
    selection = {"select": "load", "layers": layers, "experts": dict.fromkeys(names, 4), "load": {names[0]: 0.4}}
    run_record["adapter"]["selection"] = selection
    maps = expert_maps(run_record)
    assert maps is not None
    assert maps["maps"][-1]["title"] == "with an adapter"
    assert maps["maps"][-1]["shown"]["rows"] == [[0, 100, 0, 0], [100, 0, 100, 0]]
    page = require_contained(render_page(run_record, "runs/small"))
    assert "3 of 8 have an adapter, and get 40 % of the tokens; by load" in page.text
    for damaged in ({"layers": "x", "load": None}, {"experts": {"a": "b"}}, {"layers": {names[0]: [[1]]}}):
        run_record["adapter"]["selection"] = selection | damaged
        require_contained(render_page(run_record, "runs/small"))


def test_load_of_experts_while_training_is_drawn_by_layer(run_record: dict[str, Any]) -> None:
    assert load_over_time(run_record) is None  # as of earlier releases
    series = {"steps": [[1, 2], [3, 3]], "every": 2, "counts": {"layers.4.experts": [[30, 10], [0, 0]]}}
    run_record["train"]["expert_tokens"] = series
    found = load_over_time(run_record)
    assert found is not None
    assert found["map"]["shown"]["layers"] == [{"name": "4", "rows": [[75, 0], [25, 0]]}]
    assert found["map"]["shown"]["columns"] == ["1 to 2", "3"]
    assert "by stretches of 2 steps" in require_contained(render_page(run_record, "runs/small")).text
    for damaged in ({"steps": [[1, 2]]}, {"counts": {"a": [[1], [1, 2]]}}, {"counts": None}, {"steps": [["1", 2]] * 2}):
        run_record["train"]["expert_tokens"] = series | damaged
        assert load_over_time(run_record) is None
        require_contained(render_page(run_record, "runs/small"))


def test_page_of_a_long_run_of_many_experts_stays_small(run_record: dict[str, Any]) -> None:
    layers = [f"model.layers.{layer}.mlp.experts" for layer in range(60)]
    evaluation = {"tokens": 10, "counts": {name: list(range(256)) for name in layers}, "entropy": {}}
    run_record["experts"] = {"evaluations": {"0": evaluation, "50": evaluation}}
    run_record["train"]["expert_tokens"] = {
        **{"steps": [[8 * at + 1, 8 * at + 8] for at in range(8)], "every": 8},
        "counts": {name: [list(range(256))] * 8 for name in layers},
    }
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "seconds", "expert_imbalance"):
        run_record["train"][name] = [[step, 1 + step % 7 / 7] for step in range(1, 50_001)]
    html = render_page(run_record, "runs/large")
    assert len(html) < 2_000_000
    assert "the lowest and the highest point of each stretch are drawn" in html
    assert "29 layers from all depths, the record has 31 more" in html


def test_damaged_counts_of_experts_are_not_drawn(run_record: dict[str, Any]) -> None:
    for counts in ({}, {"a": []}, {"a": [1, "2"]}, {"a": [0, 0]}, {"a": [1], "b": [1, 2]}, None):
        run_record["experts"] = {"evaluations": {"0": {"counts": counts}, "x": {}, "1": None}}
        assert expert_maps(run_record) is None
        require_contained(render_page(run_record, "runs/small"))


def test_figures_that_are_not_finite_are_shown_and_not_drawn(run_record: dict[str, Any]) -> None:
    run_record["train"]["loss"][3] = [4, "nan"]
    run_record["eval"]["after"] = "nan"
    page = require_contained(render_page(run_record, "runs/small"))
    assert "3.200 → nan" in page.text
    losses = json.loads(next(content for kind, content in page.scripts if kind))["series"][0]["points"]
    assert 4 not in [step for step, _ in losses]


def test_page_of_a_run_that_goes_on_says_how_far_it_is(run_record: dict[str, Any]) -> None:
    run_record["run"]["status"] = "running"
    run_record["train"] |= {"max_steps": 400}
    del run_record["adapter"], run_record["task"]["after"], run_record["train"]["steps"]
    run_record["eval"] = {"loss": [[0, 3.2], [50, 0.5]]}
    page = require_contained(render_page(run_record, "runs/small"))
    assert "running 100 of 400 steps" in page.text
    assert "loss on evaluation examples 3.200 → 0.500" in page.text
    assert "slot F1 0.000 → -" in page.text


def test_command_writes_the_page_of_a_run_and_prints_its_path(run_record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(run_record), encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.output == f"{tmp_path / 'report.html'}\n"
    assert "slot F1" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_of_a_run_that_stops_says_why(tmp_path: Path) -> None:
    stopped_run(tmp_path, "the disk is <full>")
    text = require_contained((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "stopped" in text
    assert "the disk is <full>" in text


def test_page_that_cannot_be_written_is_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").mkdir()
    stopped_run(tmp_path, "x")
    assert "report.html could not be written (Is a directory); the run continues" in capsys.readouterr().out
    assert RunRecord.load(tmp_path).status == "stopped"


def test_differences_give_both_texts_back_whole() -> None:
    left, right = "inform(name[X], a[b])", "inform(name[Y])" + " z" * 500
    ours, theirs = differences(left, right)
    assert "".join(text for text, _ in ours) == left
    assert "".join(text for text, _ in theirs) == right


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1600])
def test_browser_runs_the_page_without_a_message_and_nothing_is_wider_than_the_window(
    width: int, run_record: dict[str, Any], tmp_path: Path
) -> None:
    example = run_record["task"]["after"]["examples"][0]
    many = [example | {"prompt": f"{place} of many", "right": True} for place in range(12)]
    run_record["task"]["after"]["examples"] = [example, example | {"prompt": "W" * 3000}, *many]
    counts = {f"layers.{layer}.experts": [[9, 1], [layer, 3]] for layer in range(2)}
    run_record["train"]["expert_tokens"] = {"steps": [[1, 50], [51, 100]], "every": 50, "counts": counts}
    html = render_page(run_record, "runs/small")
    probe = """
        const plot = document.querySelector(".plot"), svg = plot.querySelector("svg");
        const box = svg.getBoundingClientRect();
        const line = svg.querySelector("[data-series]"), before = line.getAttribute("d");
        svg.setPointerCapture = () => {};
        const event = (kind, part) => new window.PointerEvent(kind, {clientX: box.left + part * box.width});
        const at = (kind, part) => svg.dispatchEvent(event(kind, part));
        at("pointermove", 0.5);
        const tip = plot.querySelector(".tip").textContent;
        at("pointerdown", 0.25); at("pointermove", 0.75); at("pointerup", 0.75);
        const zoomed = line.getAttribute("d") !== before, reset = document.getElementById("reset");
        const offered = !reset.hidden;
        reset.click();
        const search = document.getElementById("search"), kind = document.getElementById("kind");
        const found = [], more = document.getElementById("more");
        const seen = () => found.push([...document.querySelectorAll(".answer")].filter((node) => !node.hidden).length);
        const set = (node, value, kind) => { node.value = value; node.dispatchEvent(new window.Event(kind)); seen(); };
        seen(); more.click(); seen();
        set(search, "is fun", "input"); set(search, "wrong", "input"); set(search, "", "input");
        set(kind, "right", "change");
        const layer = document.querySelector("[data-map] select"), map = layer.closest("figure").querySelector("svg");
        const cells = () => [...map.querySelectorAll("path")].map((path) => path.getAttribute("d"));
        const first = cells();
        layer.value = "1"; layer.dispatchEvent(new window.Event("change"));
        const second = cells();
        layer.value = "0"; layer.dispatchEvent(new window.Event("change"));
        const maps = [first.join() === second.join(), first.join() === cells().join()];
        const wide = document.documentElement.scrollWidth;
        return {tip, zoomed, offered, found, maps, wide, inner: window.innerWidth, closed: reset.hidden};
    """
    seen, messages = browse(html, tmp_path, width, probe)
    assert messages == []
    assert "training, each step, 50: 0.06" in seen["tip"]
    assert [seen["zoomed"], seen["offered"], seen["closed"]] == [True, True, True]
    assert seen["found"] == [10, 14, 1, 0, 10, 10]
    assert seen["maps"] == [False, True]  # drawn by the script as the page had it
    assert seen["wide"] <= seen["inner"]
    assert seen["inner"] == width
