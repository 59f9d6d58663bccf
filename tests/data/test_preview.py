"""What a run is about to train on, as it is shown: true to the labels, at any width, with and without color."""

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

from expertune.config import DataConfig, parse_config
from expertune.data import prepare_examples
from expertune.data.preview import preview, preview_run
from expertune.report.preview import render_preview

from .conftest import ASSETS

TURNS = [
    {"role": "user", "content": "Say something long."},
    {"role": "assistant", "content": "No.", "weight": 0},
    {"role": "user", "content": "Say it in Japanese, please."},
    {"role": "assistant", "content": "日本語のテキストです。" * 12},
]


@pytest.fixture
def show(jsonl, tiny_tokenizer):
    """Examples of a run as plain values, and their rendering at a width."""

    def call(*examples, width=120, terminal=False, encoding="utf-8", max_chars=600, **data):
        config = DataConfig(train=jsonl(*examples), **data)
        shown = preview(prepare_examples(config, "train", tiny_tokenizer), config, tiny_tokenizer, num_examples=2)
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        Console(file=out, width=width, force_terminal=terminal, color_system="truecolor" if terminal else None).print(
            render_preview("train", shown, max_chars)
        )
        out.seek(0)
        return shown, out.read()

    return call


@pytest.mark.parametrize("width", [60, 120])
def test_every_line_fits_the_terminal_and_the_marks_survive(show, width):
    _, text = show({"messages": TURNS, "source": "a form"}, width=width, template="chatml")
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert text.count("⟦") == 2  # the legend's, and the one answer that is trained
    assert "| No.</s>" in text
    assert f"⟦{TURNS[3]['content']}</s>⟧" in text.replace("\n    ", "")
    assert "used: messages; ignored: source (in 1)" in text


@pytest.mark.parametrize("width", [50, 60, 80])
def test_choices_on_a_narrow_terminal_are_shown_without_cutting_a_word(show, width):
    example = {"prompt": "What is the capital of Malta?", "completion": "Valletta.", "note": "a note"}
    wide, narrow = show(example, width=400)[1], show(example, width=width)[1]
    assert max(cell_len(line) for line in narrow.splitlines()) <= width
    assert {word for word in wide.split() if len(word) < 38} <= set(narrow.split())
    below_title = narrow[narrow.index("  layout") :]
    assert [line for line in below_title.splitlines() if not line.startswith("  ")] == []


def test_marks_and_text_are_the_same_with_color_and_without(show):
    example = {"prompt": "What is the capital of Malta?", "completion": "Valletta."}
    _, plain = show(example)
    _, colored = show(example, terminal=True)
    assert "  | <s>Question: What is the capital of Malta?\n  | Answer:⟦ Valletta.</s>⟧\n" in plain
    assert "⟦ Valletta.</s>⟧" in colored
    assert "\x1b[1;32m" in colored


def test_parts_are_those_of_the_labels(show, tiny_tokenizer):
    shown, _ = show({"messages": TURNS}, template="chatml")
    (example,) = shown["examples"]
    assert [part["text"] for part in example["parts"] if part["trained"]] == [f"{TURNS[3]['content']}</s>"]
    assert "".join(part["text"] for part in example["parts"]).count("No.</s>") == 1
    json.dumps(shown, allow_nan=False)
    example = {"question": "Why?", "answer": "So."}
    assert show(example)[0]["examples"][0]["parts"][-1] == {"text": " So.</s>", "trained": True}
    assert [part["trained"] for part in show(example, train_on="all")[0]["examples"][0]["parts"]] == [False, True]


def test_a_cut_is_shown_where_it_falls(show):
    shown, text = show({"prompt": "Count.", "completion": "one two three four five six seven"}, max_length=16)
    example = shown["examples"][0]
    assert f"16 tokens, {example['num_trained']} trained, {example['uncut_length'] - 16} more cut off" in text
    assert "</s>" not in example["parts"][-1]["text"]


def test_text_that_holds_a_mark_or_moves_the_cursor_is_shown_safely(show):
    _, text = show({"prompt": "Brackets ⟦ and \x1b[2J?", "completion": "[bold]Yes."}, terminal=True)
    assert "what is trained stands between « and »" in text
    assert "\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "« [bold]Yes.</s>»" in text


@pytest.mark.parametrize("char", ["\u202e", "\u200b", "\ufeff", "\u2066", "\u2028"])
def test_characters_that_hide_or_turn_round_text_are_spelt_out(show, char):
    _, text = show({"prompt": "p", "completion": f"abc {char} def"}, terminal=True)
    assert char not in text
    assert ascii(char)[1:-1] in text


def test_a_terminal_without_these_characters_gets_others(show):
    _, text = show({"prompt": "Naïve?", "completion": "Yes."}, encoding="ascii")
    assert "Na\\xefve?" in text
    assert "[[ Yes.</s>]]" in text


def test_the_middle_of_a_long_text_is_left_out_and_said(show):
    example = {"prompt": "word" * 100, "completion": "first " + "x" * 300 + " last"}
    _, text = show(example, max_chars=90)
    assert "⟦ first" in text
    assert "last</s>⟧" in text.replace("\n    ", "")
    assert text.count("characters ...]") == 2


def test_warnings_hints_and_counts_stand_above_the_examples(show, tiny_tokenizer, monkeypatch):
    examples = [
        {"prompt": "", "completion": "Hi"},
        {"prompt": "Who?", "completion": "Me", "weight": 0},
        {"prompt": "Who?", "completion": ""},
    ]
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages }}")
    _, text = show(*examples, on_error="skip")
    assert "1 used, 1 skipped as unusable, 1 left out, flagged not to be trained" in text
    assert "1 of 1 examples have an empty prompt" in text
    assert "data.template: chat puts the examples into the form" in text


def test_preview_of_a_run_reads_the_tokenizer_and_no_weights(tmp_path, jsonl):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in ASSETS.joinpath("tiny-mixtral").iterdir():
        if path.suffix != ".safetensors":
            folder.joinpath(path.name).write_bytes(path.read_bytes())
    data = {
        "train": jsonl({"question": "Why?", "answer": "So."}),
        "eval": jsonl({"prompt": "The sky is", "completion": " blue."}, name="eval.jsonl"),
    }
    config = parse_config({"model": str(folder), "data": data, "output_dir": str(tmp_path / "out"), "lora": {"r": 2}})
    shown = preview_run(config, num_examples=1)
    assert shown["train"]["examples"][0]["num_trained"] > 0
    assert shown["eval"]["template"] == "question-answer"
    assert not (tmp_path / "out").exists()
