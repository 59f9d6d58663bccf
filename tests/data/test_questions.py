"""What a run can be asked: columns under every name that they have, and system prompts."""

import pytest

from expertune.config import DataConfig
from expertune.data import Questions
from expertune.errors import ConfigError, DataError


@pytest.fixture
def questions(tiny_tokenizer, tmp_path):
    """`Questions` of a format, under a shipped template or the text of a Jinja file."""

    def make(layout, template=None, **data):
        if template and "{" in template:
            path = tmp_path / "mine.jinja"
            path.write_text(template, encoding="utf-8")
            template = str(path)
        return Questions(DataConfig(train="gone.jsonl", format=layout, template=template, **data), tiny_tokenizer)

    return make


@pytest.mark.parametrize(
    "asked", ["2 + 2?", {"prompt": "2 + 2?"}, {"question": "2 + 2?"}, {"question": "2 + 2?", "answer": "4"}]
)
def test_either_name_of_the_prompts_column_will_do(questions, asked):
    assert questions("prompt-completion", "question-answer").render(asked) == "Question: 2 + 2?\nAnswer:"


@pytest.mark.parametrize("asked", ["2 + 2?", {"question": "2 + 2?"}])
def test_a_template_of_ones_own_names_the_column_that_a_text_goes_to(questions, asked):
    own = questions("prompt-completion", "Q {{ question }}\nA {{ answer }}")
    assert own.main_column == "question"
    assert own.render(asked) == "Q 2 + 2?\nA"


@pytest.mark.parametrize(
    ("layout", "template", "columns", "expected"),
    [
        ("dolly", "dolly", {}, ["instruction", "context", "system", "system_message", "system_prompt"]),
        ("dolly", "viggo", {}, ["instruction", "context", "prompt"]),
        ("prompt-completion", "viggo", {"prompt": "ref", "completion": "mr"}, ["prompt", "question", "ref"]),
        ("dolly", "{{ title }}: {{ instruction | upper }}\n{{ response }}", {}, ["instruction", "title"]),
        ("dolly", "chatml", {}, ["instruction", "context", "history", "system", "system_message", "system_prompt"]),
        ("messages", "chatml", {}, ["messages", "system", "system_message", "system_prompt"]),
    ],
)
def test_columns_of_a_question_are_those_that_its_template_reads(questions, layout, template, columns, expected):
    asked = questions(layout, template, columns=columns)
    assert asked.columns == expected
    asked.require_columns(dict.fromkeys(expected, ""))
    with pytest.raises(ConfigError, match=r"column cntext: no prompt of this run has it, whose template is .*(;|: )"):
        asked.require_columns({"cntext": "a"})


def test_a_column_that_the_template_needs_is_named_where_it_is_missing(questions):
    own = questions("dolly", "{{ title }}: {{ instruction }}\n{{ response }}")
    with pytest.raises(DataError, match="'title' is undefined"):
        own.render("Who?")
    assert own.render(own.asked("Who?", {"title": "Ada"})) == "Ada: Who?\n"


def test_a_questions_own_columns_come_before_those_of_every_question(questions):
    asked = questions("dolly", "dolly")
    assert "### Context:\nown\n" in asked.render(asked.asked({"instruction": "a", "context": "own"}, {"context": "b"}))


@pytest.mark.parametrize("template", ["dolly", "alpaca", "question-answer", "chatml"])
def test_shipped_templates_with_a_system_prompt_say_it(questions, template):
    asked = questions("alpaca" if template == "alpaca" else "dolly", template)
    asked.require_place_for("Be brief.", "Who?")
    text = asked.render(asked.asked("Who?", {"system": "Be brief."}))
    assert text.index("Be brief.") < text.index("Who?")


@pytest.mark.parametrize("template", ["plain", "viggo", "dolly-tutorial"])
def test_shipped_templates_without_one_refuse_it(questions, template):
    with pytest.raises(ConfigError, match=f"template {template} has no place for a system prompt"):
        questions("dolly", template).require_place_for("Be brief.", "Who?")
