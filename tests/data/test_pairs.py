"""Pairs, labels and prompts: read as TRL's data sets have them, with the ids that supervised fine-tuning gives."""

import io
import subprocess
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from expertune.config import DataConfig
from expertune.data import Questions, encode_prompt, make_dataset, prepare_examples, prepare_run, settled, token_cache
from expertune.data.preview import preview
from expertune.errors import DataError
from expertune.report.preview import render_preview

from .conftest import ASSETS

PAIR = {"prompt": "Where is Malta?", "chosen": "In the sea.", "rejected": "In the air, I think."}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in [("user", "Hi?"), ("assistant", "A"), ("assistant", "B")]
)
FIRST = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}, USER]
TALK = {"chosen": [*FIRST, GOOD], "rejected": [*FIRST, BAD]}
LABELED = [
    {"prompt": "Where?", "completion": "Here.", "label": True},
    {"prompt": "When?", "completion": "?", "label": 0},
]


@pytest.fixture
def prepare(jsonl, tiny_tokenizer):
    def call(objective, *examples, name="rows.jsonl", **data):
        config = DataConfig(train=jsonl(*examples, name=name), **data)
        return prepare_examples(config, "train", tiny_tokenizer, objective=objective)

    return call


@pytest.fixture
def refused(prepare):
    def call(objective, *examples, **data):
        with pytest.raises(DataError) as error:
            prepare(objective, *examples, **data)
        return str(error.value)

    return call


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_both_sides_of_a_pair_have_the_ids_that_supervised_fine_tuning_gives(objective, prepare, tiny_tokenizer):
    tokenized = prepare(objective, PAIR)
    (row,) = make_dataset(tokenized, DataConfig(train="rows.jsonl"))
    assert row.pop("example_ids") == [0]
    for side in ("chosen", "rejected"):
        (alone,) = prepare("sft", {"prompt": PAIR["prompt"], "completion": PAIR[side]}).examples
        assert row["prompt_ids"] + row[f"{side}_ids"] == alone.input_ids
        assert row[f"{side}_ids"] == [label for label in alone.labels if label != -100]
    assert row["prompt_ids"] == encode_prompt(tokenized.examples[0].prompt, tiny_tokenizer)


@pytest.mark.parametrize(
    ("example", "layout"),
    [
        (PAIR, "preference"),
        ({**PAIR, "prompt": FIRST, "chosen": [GOOD], "rejected": [BAD]}, "preference-messages"),
        (TALK, "preference-messages"),
        ({**TALK, "prompt": "Hi?"}, "preference-messages"),  # as UltraFeedback has it, beside the conversations
    ],
)
def test_a_pair_is_recognized_and_its_common_beginning_is_the_prompt(example, layout, prepare):
    tokenized = prepare("dpo", example, template=None if layout == "preference" else "chatml")
    assert tokenized.report["format"] == layout
    (pair,) = tokenized.examples
    assert pair.prompt == pair.rejected.prompt
    assert pair.prompt_ids == pair.rejected.input_ids[: pair.num_prompt_tokens]
    if layout != "preference":
        assert pair.prompt == prepare("dpo", TALK, template="chatml").examples[0].prompt
        assert [side.completion.removesuffix("<|im_end|>").strip() for side in pair.sides] == ["A", "B"]


def test_answers_with_labels_and_pairs_as_two_of_them(prepare):
    data = DataConfig(train="rows.jsonl")
    assert [row["label"] for row in make_dataset(prepare("kto", *LABELED), data)] == [True, False]
    tokenized = prepare("kto", PAIR, {**PAIR, "prompt": "And Gozo?"})
    assert [example.place for example in tokenized.examples[:2]] == [
        "rows.jsonl: row 1 (chosen)",
        "rows.jsonl: row 1 (rejected)",
    ]
    assert tokenized.report["labels"] == {"desirable": 2, "undesirable": 2}
    (pair,) = make_dataset(prepare("dpo", PAIR), data)
    good, bad, *_ = make_dataset(tokenized, data)
    assert (good["completion_ids"], bad["completion_ids"]) == (pair["chosen_ids"], pair["rejected_ids"])
    assert good["prompt_ids"] == bad["prompt_ids"] == pair["prompt_ids"]


def test_every_labeled_answer_brings_one_to_another_prompt_for_the_kl_term(prepare):
    data = DataConfig(train="rows.jsonl")
    pairs = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(3)]
    rows = make_dataset(prepare("kto", *pairs), data)
    assert [row["KL_completion_ids"] for row in rows] == [rows[index]["completion_ids"] for index in (4, 5, 0, 1, 2, 3)]
    first, second = make_dataset(prepare("kto", *LABELED), data)
    assert (first["KL_completion_ids"], second["KL_completion_ids"]) == (
        second["completion_ids"],
        first["completion_ids"],
    )
    alone = make_dataset(prepare("kto", pairs[0]), data)  # there is no other prompt
    assert [row["KL_completion_ids"] for row in alone] == [alone[1]["completion_ids"], alone[0]["completion_ids"]]


def test_a_reward_is_told_the_columns_of_a_prompt_and_its_answer(prepare):
    data = DataConfig(train="rows.jsonl")
    (alone,) = make_dataset(prepare("grpo", {"prompt": "2 + 2?", "level": 1, "solution": "4"}), data)
    assert alone.items() >= {"level": 1, "solution": "4", "example_ids": [0]}.items()
    assert "answer" not in alone
    (asked,) = make_dataset(prepare("grpo", {"instruction": "2 + 2?", "response": "4"}), data)
    assert (asked["answer"], asked["response"]) == ("4", "4")
    (both,) = make_dataset(prepare("grpo", {"instruction": "2 + 2?", "response": "4", "answer": "D"}), data)
    assert both["answer"] == "4"  # the layout's, of whatever else the file has
    (turns,) = make_dataset(prepare("grpo", {"messages": [*FIRST, GOOD]}, template="chatml"), data)
    assert turns["answer"] == "A"
    assert turns["prompt"].rstrip().endswith("assistant")


def test_columns_that_do_not_fit_the_objective_are_one_error_with_the_way_out(refused):
    answered = {"prompt": "a", "completion": "b"}
    assert "rows.jsonl: row 1: objective: dpo, which compares two answers" in refused("dpo", answered)
    assert "found are completion, prompt" in refused("dpo", answered)
    assert "set objective: kto" in refused("dpo", {**answered, "label": True})
    assert "set objective: dpo, orpo or kto" in refused("sft", PAIR, format="preference")
    assert "data.format: alpaca does not go with objective: dpo" in refused("dpo", PAIR, format="alpaca")
    assert "needs columns prompt, completion and label" in refused("kto", answered)
    assert "chosen, prompt; rejected is missing" in refused("dpo", {"prompt": "a", "chosen": "b"})
    assert "label is missing; name your columns under data.columns, e.g. {label: your_column}" in refused(
        "kto", answered
    )
    assert "set objective: dpo" in refused("grpo", {"text": "a", "chosen": "x", "rejected": "y"})
    assert "there is no column prompt" in refused("dpo", {"chosen": "a", "rejected": "b"})


def test_pairs_that_teach_nothing_are_refused_one_by_one_or_dropped(refused, prepare):
    long = "Why? " * 8
    bad = [
        ({**PAIR, "rejected": PAIR["chosen"]}, "chosen and rejected are the same"),
        ({**PAIR, "rejected": "  "}, "empty completion: rejected holds no text"),
        ({**PAIR, "chosen": None}, "column chosen is empty"),
        ({**PAIR, "prompt": ""}, "empty prompt"),
        ({"prompt": "a", "chosen": "b"}, "column rejected is missing"),
        (
            {**PAIR, "chosen": long + "Yes.", "rejected": long + "No."},
            "cut at data.max_length: 24, both answers are the same",
        ),
        ({**PAIR, "prompt": long * 2}, "no label is left"),
        ({**PAIR, "rejected": PAIR["chosen"] + " "}, ""),  # another answer, if hardly
    ]
    for example, expected in bad[:-1]:
        assert expected in refused("dpo", PAIR, example, max_length=24)
    found = prepare("dpo", PAIR, *(example for example, _ in bad), max_length=24, on_error="skip")
    assert (found.report["num_rows"], found.report["num_skipped"]) == (2, len(bad) - 1)
    assert any("differ in white space alone in 1 of 2 pairs" in line for line in found.report["warnings"])
    turns = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}
    assert "answers of one turn are compared" in refused("dpo", turns, template="chatml")
    apart = {"chosen": [USER, GOOD], "rejected": [FIRST[0], BAD]}
    assert "differ from their first message on" in refused("dpo", apart, template="chatml")
    assert "more than data.max_length: 24" in refused("grpo", {"prompt": long * 2}, max_length=24)
    assert "every one of 1 labels is true" in refused("kto", LABELED[0])


def test_length_that_tells_the_sides_apart_and_repeats_are_told_and_never_accuse(prepare):
    rows = [{"prompt": f"{n}?", "chosen": f"It is {n}, and not more.", "rejected": f"{n}"} for n in range(30)]
    report = prepare("dpo", *rows, rows[3]).report
    assert (report["num_repeated"], report["pairs"]["chosen_longer"]) == (1, 31)
    repeated, longer = report["warnings"]
    assert repeated.startswith("1 of 31 pairs stand in the data before")
    assert "the longer one in 31 of 31 pairs" in longer
    assert "length alone" in longer
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (shorter,) = prepare("dpo", *swapped).report["warnings"]
    assert "the shorter one in 30 of 30 pairs" in shorter
    assert "where brevity is wanted" in shorter
    assert prepare("dpo", *rows[:5]).report["warnings"] == []


def test_evaluation_prompts_that_are_trained_on_are_told(jsonl, tiny_tokenizer):
    other = {**PAIR, "prompt": "And Gozo?"}
    data = DataConfig(train=jsonl(PAIR), eval=jsonl({**PAIR, "chosen": "Beside it."}, other, name="eval.jsonl"))
    _, evaluation = prepare_run(data, tiny_tokenizer, objective="dpo")
    assert evaluation.report["num_prompts_trained_on"] == 1
    assert "1 of 2 have a prompt that the training examples have too" in evaluation.report["warnings"][-1]


@pytest.mark.parametrize("kept_in_a_file", [False, True])
def test_evaluation_examples_of_sft_that_are_trained_on_are_told_whole_ones_alone(
    kept_in_a_file, jsonl, tiny_tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if kept_in_a_file:
        monkeypatch.setattr(token_cache, "LARGE_BYTES", 0)
    path = jsonl(*({"prompt": "A number?", "completion": str(n)} for n in range(20)))  # one prompt, many answers
    told = "2 of 2 evaluation examples are trained on, token for token"
    for train, count, warned in (
        (path, 2, told),
        (f"{path}[0:18]", 0, ""),
        (f"{path}[0:19]", 1, told.replace("2", "1", 1)),
    ):
        _, evaluation = prepare_run(DataConfig(train=train, eval=f"{path}[18:20]"), tiny_tokenizer)
        assert evaluation.report["num_trained_on"] == count
        assert "num_prompts_trained_on" not in evaluation.report
        (warning,) = evaluation.report["warnings"] or [""]
        assert warning.startswith(warned)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [("dpo", [PAIR, {**PAIR, "prompt": "</s>?"}]), ("kto", LABELED), ("grpo", [{"prompt": "a", "n": [1, None]}])],
)
def test_large_source_gives_the_same_pairs_from_a_file(objective, rows, jsonl, tiny_tokenizer, monkeypatch, tmp_path):
    data = DataConfig(train=jsonl(*rows), eval=jsonl(*rows[:1], name="eval.jsonl"), max_length=30)
    expected = prepare_run(data, tiny_tokenizer, objective=objective)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "LARGE_BYTES", 0)
    for found, wanted in zip(prepare_run(data, tiny_tokenizer, objective=objective), expected, strict=True):
        assert isinstance(found.examples, token_cache.MappedExamples)
        assert list(found.examples) == list(wanted.examples)
        assert found.report == wanted.report
        assert (found.digest, list(found.lengths)) == (wanted.digest, list(wanted.lengths))
        assert list(found.uncut_lengths) == list(wanted.uncut_lengths)


def test_a_question_to_a_run_reads_as_the_prompts_that_were_compared(prepare, tiny_tokenizer):
    tokenized = prepare("dpo", PAIR)
    questions = Questions(settled(DataConfig(train="gone.jsonl"), tokenized.report), tiny_tokenizer)
    assert questions.render(PAIR["prompt"]) == tokenized.examples[0].prompt
    assert questions.answers == {"completion", "chosen", "rejected"}


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize(
    ("objective", "rows", "texts"),
    [
        ("dpo", [PAIR], ["⟦ In the sea.</s>⟧", "rejected:\n  | ⟦ In the air, I think.</s>⟧", "chosen is longer in 0"]),
        ("kto", LABELED, ["a good answer", "a bad answer", "1 good answer, 1 bad one"]),
        ("grpo", [{"prompt": "2 + 2?", "solution": "4"}], ["rewards are told solution", "solution: 4", "in prompts"]),
    ],
)
def test_preview_shows_both_sides_at_any_width(objective, rows, texts, width, prepare, tiny_tokenizer):
    shown = preview(prepare(objective, *rows), DataConfig(train="rows.jsonl"), tiny_tokenizer, num_examples=2)
    out = io.StringIO()
    Console(file=out, width=width).print(render_preview("train", shown))
    assert all(
        text in " ".join(out.getvalue().split(" ")) or text in out.getvalue().replace("\n    ", "") for text in texts
    )
    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= width


def test_embedded_pairs_are_what_the_tool_makes_of_the_embedded_examples(tmp_path):
    tool = ASSETS.parents[2] / "tools" / "make_preferences.py"
    subprocess.run([sys.executable, tool, tmp_path], check=True)
    for part in ("train", "valid"):
        name = f"viggo-pairs-{part}.csv"
        assert (tmp_path / name).read_bytes() == (ASSETS / "viggo" / name).read_bytes()


def test_sample_may_have_labels_of_one_kind_and_its_tokens_are_not_kept(jsonl, tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LARGE_BYTES", 0)
    data = DataConfig(train=jsonl(*[LABELED[0]] * 8, LABELED[1]))
    sample = prepare_examples(data, "train", tiny_tokenizer, objective="kto", sample_size=1)
    assert (len(sample.examples), sum(sample.report["files"].values())) == (1, 9)
    assert not (tmp_path / "cache").exists()
    assert len(prepare_examples(data, "train", tiny_tokenizer, objective="kto").examples) == 9
