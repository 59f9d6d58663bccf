"""Examples that are looked at before a run: those that it will train on."""

import json
from pathlib import Path
from typing import Any

import pytest

import expertune
from expertune.data.examples import IGNORE_INDEX
from expertune.errors import DataError
from tests.report.pages import Page
from tests.train.conftest import ASSETS

HOSTILE = "</pre><script>alert(1)</script>\u202e"


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [("What is the capital of Malta?", "Valletta."), ("Who?", HOSTILE), ("Count.", "one two three " * 20)]
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    data = {"train": str(rows), "eval": f"{rows}[0:1]", "template": "question-answer", "max_length": 48}
    return {"model": str(ASSETS / "tiny-mixtral"), "data": data, "output_dir": str(rows.parent / "run")}


@pytest.fixture(scope="module")
def examples(values: dict[str, Any]) -> Any:
    return expertune.examples(values)


def test_examples_are_indexed_sliced_and_counted(examples: Any) -> None:
    assert len(examples) == 3
    assert [example.completion for example in examples[:2]] == [" Valletta.", f" {HOSTILE}"]
    assert examples[-1].prompt == "Question: Count.\nAnswer:"
    assert (len(examples.eval), examples.eval.eval) == (1, None)
    assert repr(examples.eval).startswith("Examples(1 of ")
    assert examples.lengths[2] > len(examples[2].input_ids) == 48
    assert examples.report["num_truncated"] == 1
    with pytest.raises(IndexError):
        examples[3]


def test_example_is_printed_as_it_is_decoded_and_marked_where_it_is_trained(examples: Any) -> None:
    example = examples[0]
    assert str(example) == "<s>Question: What is the capital of Malta?\nAnswer: Valletta.</s>"
    trained = sum(label != IGNORE_INDEX for label in example.labels)
    assert f"{len(example.input_ids)} tokens, {trained} trained" in repr(example)
    assert Page(example._repr_html_()).marked == ["in color", " Valletta.</s>"]


def test_hostile_text_of_an_example_is_shown_as_text(examples: Any) -> None:
    shown = examples._repr_html_()
    assert "script" not in {tag for tag, _ in Page(shown).tags}
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in shown
    assert "examples 3 used, 1 cut at 48 tokens" in Page(shown).text


def test_pair_is_shown_with_both_answers_and_neither_as_html(tmp_path: Path) -> None:
    pair = {"prompt": "Who?", "chosen": "Nobody.", "rejected": HOSTILE}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    data = {"train": str(tmp_path / "pairs.jsonl"), "template": "question-answer"}
    model = str(ASSETS / "tiny-mixtral")
    (example,) = expertune.examples({"model": model, "objective": "dpo", "data": data, "output_dir": "run"})[:]
    page = Page(example._repr_html_())
    assert page.marked == ["in color", " Nobody.</s>", f" {HOSTILE[:-1]}\\u202e</s>"]
    assert "script" not in {tag for tag, _ in page.tags}
    assert ("mark", {"class": "rejected"}) in page.tags
    assert "rejected:" in page.text


def test_overrides_apply_and_nothing_is_written(values: dict[str, Any]) -> None:
    examples = expertune.examples(values, overrides=["data.train_on=all", "data.eval=null"])
    assert examples.eval is None
    assert examples[0].labels[1:] == examples[0].input_ids[1:]
    assert not Path(values["output_dir"]).exists()


def test_examples_that_a_run_would_refuse_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl: row 1"):
        expertune.examples(values, overrides=[f"data.train={tmp_path / 'bad.jsonl'}"])
