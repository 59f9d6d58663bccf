import json

import pytest

from expertune.config import DataConfig
from expertune.data.formats import LAYOUTS, find_layout, rename
from expertune.data.lint import ExampleError
from expertune.data.messages import parse_conversation, until_last_answer
from expertune.errors import DataError


def layout(name="auto", columns=()):
    return find_layout(DataConfig(train="rows.jsonl", format=name), columns)


@pytest.mark.parametrize(
    ("columns", "name", "template"),
    [
        (["instruction", "context", "response", "category"], "dolly", "dolly"),
        (["instruction", "input", "output"], "alpaca", "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca", "alpaca"),
        (["prompt", "completion"], "prompt-completion", "question-answer"),
        (["question", "answer"], "prompt-completion", "question-answer"),
        (["prompt", "messages"], "messages", "chat"),
        (["id", "conversations"], "sharegpt", "chat"),
        (["text"], "text", "plain"),
    ],
)
def test_columns_tell_the_layout(columns, name, template):
    found = layout("auto", columns)
    assert (found.name, found.template) == (name, template)


def test_unknown_columns_are_an_error_that_names_them_and_the_ways_out():
    with pytest.raises(DataError, match=r"no layout fits the columns mr, ref\. Set data\.format, or .*data\.columns"):
        layout("auto", ["mr", "ref"])


def test_renamed_columns_are_recognized_and_the_old_names_stay():
    example = rename({"mr": "inform()", "ref": "A game."}, {"prompt": "ref", "completion": "mr"})
    assert layout("auto", example).name == "prompt-completion"
    assert example == {"mr": "inform()", "ref": "A game.", "prompt": "A game.", "completion": "inform()"}


def test_two_columns_can_be_swapped():
    example = rename({"prompt": "answer", "completion": "question"}, {"prompt": "completion", "completion": "prompt"})
    assert example == {"prompt": "question", "completion": "answer"}


def test_renaming_a_column_that_is_not_there_is_an_error():
    with pytest.raises(
        ExampleError, match=r"column mr, named by data\.columns\.completion, is missing; the example has ref"
    ):
        rename({"ref": "A game."}, {"completion": "mr"})


def test_every_layout_offers_prompt_and_completion():
    example = layout("dolly").read({"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada."})
    assert example.values["prompt"] == "Who?\n\nAda wrote it."
    assert example.values["completion"] == "Ada."
    assert set(example.answers) == {"response", "completion"}
    example = layout("text").read({"text": "Once."})
    assert (example.values["prompt"], example.values["completion"]) == ("", "Once.")


def test_own_column_named_completion_is_left_as_it_is():
    example = layout("dolly").read({"instruction": "Who?", "response": "Ada.", "completion": "full"})
    assert example.values["completion"] == "full"
    assert example.answers == ("response",)


def test_optional_context_may_be_missing_or_null():
    for example in (
        {"instruction": "Who?", "response": "Ada."},
        {"instruction": "Who?", "context": None, "response": "A"},
    ):
        assert layout("dolly").read(example).values["context"] == ""


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"instruction": "Who?"}, "column response is missing; the example has instruction"),
        ({"instruction": 7, "response": "Ada."}, "column instruction is int, not text"),
        ({"instruction": "Who?", "response": ["Ada."]}, "column response is list, not text"),
        ({"instruction": "Who?", "response": " \n"}, "empty completion: response holds no text"),
        ({"instruction": "Who?", "response": None}, "empty completion: response holds no text"),
    ],
)
def test_example_that_cannot_be_read_says_why(example, message):
    with pytest.raises(ExampleError, match=message):
        layout("dolly").read(example)


def test_real_openai_example_without_a_user_turn_still_has_an_answer(files):
    examples = [
        json.loads(line) for line in (files / "openai-toy-first4.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    turns = layout("messages").read(examples[3]).messages
    assert [turn.role for turn in turns] == ["system", "assistant"]


def test_real_typed_content_parts_are_read_where_they_are_text(files):
    example = json.loads((files / "reason-tool-use-first1.jsonl").read_text(encoding="utf-8"))
    turns = parse_conversation(example["messages"][:2])
    assert turns[1].content == "Can you track my recent refund?"
    with pytest.raises(ExampleError, match="message 3 has a content part of type 'reasoning'; only text"):
        parse_conversation(example["messages"])
    with pytest.raises(ExampleError, match="column tools holds functions"):
        layout("messages").read(example)


def test_openai_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert parse_conversation([{"role": "user", "content": parts}])[0].content == "one two"


def test_sharegpt_speakers_become_roles(files):
    example = json.loads((files / "axolotl-conversation.json").read_text(encoding="utf-8"))
    turns = layout("sharegpt").read(example).messages
    assert {turn.role for turn in turns} == {"user", "assistant"}
    assert turns[0].content.startswith("how could i implement a minesweeper")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "must be a list of objects, got str"),
        (["hi"], "must be a list of objects, got list"),
        ([{"role": "robot", "content": "hi"}], "message 1 has the unknown role 'robot'; known: system"),
        ([{"content": "hi"}], "message 1 has the unknown role None"),
        ([{"role": "user"}], "message 1 has content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a text part without text"),
        ([{"role": "user", "content": ["hi"]}], "content part of type 'str'"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "message 1 has tool_calls, which is not supp"),
        ([{"role": "user", "content": "hi"}], "no assistant turn"),
        ([], "no assistant turn"),
        ([{"role": "assistant", "content": " "}], "empty completion: assistant message 1"),
    ],
)
def test_malformed_conversation_says_which_message_and_why(value, message):
    with pytest.raises(ExampleError, match=message):
        until_last_answer(parse_conversation(value))


def test_unknown_sharegpt_speaker_is_an_error():
    with pytest.raises(ExampleError, match="message 1 has the unknown role 'narrator'"):
        parse_conversation([{"from": "narrator", "value": "hi"}])


def test_turns_behind_the_last_answer_are_left_out():
    turns = parse_conversation([{"role": role, "content": "x"} for role in ("user", "assistant", "user")])
    assert [turn.role for turn in until_last_answer(turns)] == ["user", "assistant"]


def test_question_needs_no_answer():
    example = layout("alpaca").read_question({"instruction": "Who?"})
    assert example.values["input"] == ""
    with pytest.raises(ExampleError, match="column instruction is missing; the question has input"):
        layout("alpaca").read_question({"input": "x"})


def test_each_format_of_the_run_file_has_a_layout():
    formats = DataConfig.model_fields["format"].annotation.__args__
    assert {entry.name for entry in LAYOUTS} == set(formats) - {"auto"}
