import json
from pathlib import Path

import pytest

from expertune.config import DataConfig
from expertune.data import Questions, shipped_templates
from expertune.data.column_template import ColumnTemplate
from expertune.data.formats import LAYOUTS, find_layout
from expertune.data.lint import ExampleError
from expertune.data.template import load_template
from expertune.errors import ConfigError, DataError

DOLLY = {"instruction": "When was Tomoaki Komorida born?", "context": "He was born in 1981.", "response": "In 1981."}


def layout(name):
    return find_layout(DataConfig(train="rows.jsonl", format=name), ())


def render(template, example, name="dolly", tokenizer=None):
    return load_template(template, layout(name), tokenizer).render(layout(name).read(example))


def parts(rendered):
    (start, end) = rendered.spans[-1]
    return rendered.text[:start], rendered.text[start:end]


def test_dolly_tutorial_is_the_recipe_word_for_word():
    prompt, completion = parts(render("dolly-tutorial", DOLLY))
    assert prompt == (
        "Given a question and some additional context, provide an answer\n\n"
        "### Target sentence:\n"
        "Question: When was Tomoaki Komorida born?\n"
        "Additional Context: Here is some context: He was born in 1981.\n"
        "Response: [/INST]"
    )
    assert completion == " In 1981.</s>"


def test_dolly_tutorial_without_context_keeps_the_line_empty():
    prompt, _ = parts(render("dolly-tutorial", {**DOLLY, "context": ""}))
    assert "\nAdditional Context: \nResponse: [/INST]" in prompt


def test_viggo_tutorial_names_its_functions_and_attributes():
    example = {"prompt": "Dirt is a racing game.", "completion": "inform(name[Dirt])"}
    prompt, completion = parts(render("viggo-tutorial", example, "prompt-completion"))
    assert prompt.startswith(
        "Given a target sentence construct the underlying meaning representation of the input sentence as a single "
        "function with attributes and attribute values."
    )
    functions = "inform request give_opinion confirm verify_attribute suggest request_explanation recommend"
    attributes = (
        "name exp_release_date release_year developer esrb rating genres player_perspective has_multiplayer platforms "
        "available_on_steam has_linux_release has_mac_release specifier"
    )
    assert str([*functions.split(), "request_attribute"]) in prompt
    assert str(attributes.split()) in prompt
    assert prompt.endswith("### Target sentence:\nDirt is a racing game.\n\n### Meaning representation:\n")
    assert completion == "inform(name[Dirt])"


def test_viggo_puts_the_space_on_the_side_of_the_completion():
    example = {"prompt": "Dirt is a racing game.", "completion": "inform(name[Dirt])"}
    assert parts(render("viggo", example, "prompt-completion")) == (
        "Sentence: Dirt is a racing game.\nMeaning:",
        " inform(name[Dirt])",
    )


def test_clean_templates_leave_out_what_an_example_lacks():
    with_context, _ = parts(render("dolly", DOLLY))
    assert with_context == (
        "Answer the question using the context.\n\n### Context:\nHe was born in 1981.\n\n"
        "### Question:\nWhen was Tomoaki Komorida born?\n\n### Answer:\n"
    )
    without, _ = parts(render("dolly", {**DOLLY, "context": ""}))
    assert without == "### Question:\nWhen was Tomoaki Komorida born?\n\n### Answer:\n"
    alpaca = {"instruction": "Sum.", "input": "1, 2", "output": "3"}
    assert parts(render("alpaca", alpaca, "alpaca")) == (
        "### Instruction:\nSum.\n\n### Input:\n1, 2\n\n### Response:\n",
        "3",
    )


def test_braces_in_an_example_are_text_and_not_jinja(files):
    examples = json.loads((files / "llamafactory-identity-first3.json").read_text(encoding="utf-8"))
    prompt, completion = parts(render("alpaca", examples[0], "alpaca"))
    assert "I am {{name}}, an AI assistant developed by {{author}}" in completion
    prompt, _ = parts(render("alpaca", {**examples[0], "instruction": "{{ 7 * 7 }} {% raw %}"}, "alpaca"))
    assert "{{ 7 * 7 }} {% raw %}" in prompt


@pytest.mark.parametrize("name", ["dolly", "dolly-tutorial", "plain", "question-answer", "viggo", "viggo-tutorial"])
def test_every_example_template_that_ships_splits_a_dolly_example(name):
    assert name in shipped_templates()
    prompt, completion = parts(render(name, DOLLY))
    assert DOLLY["instruction"] in prompt
    assert DOLLY["response"] in completion


def test_guide_names_every_template_and_format():
    folder = Path(__file__).parents[2] / "docs" / "guides"
    guide = "".join((folder / name).read_text(encoding="utf-8") for name in ("data.md", "preferences.md"))
    for name in (*shipped_templates(), *(entry.name for entry in LAYOUTS)):
        assert f"`{name}`" in guide


def test_own_file_sees_every_column_of_the_example(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("[{{ category }}] {{ instruction }}\n=> {{ response | upper }}!\n", encoding="utf-8")
    rendered = render(str(path), {**DOLLY, "category": "qa"})
    assert parts(rendered) == ("[qa] When was Tomoaki Komorida born?\n=>", " IN 1981.!")
    assert rendered.append_eos


@pytest.mark.parametrize(
    ("use", "prompt", "completion"),
    [
        ("response | tojson", 'Who?: "', 'ada\\n".'),
        ("response | trim | upper", "Who?:", " ADA."),
        ("completion | title", "Who?:", " Ada\n."),
    ],
)
def test_filters_on_the_answer_are_kept(use, prompt, completion):
    template = ColumnTemplate("mine", f"{{{{ instruction }}}}: {{{{ {use} }}}}.")
    example = layout("dolly").read({"instruction": "Who?", "response": "ada\n"})
    assert parts(template.render(example)) == (prompt, completion)


def test_template_that_does_not_use_the_answer_is_an_error(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ instruction }}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"uses the answer 0 times; use {{ completion }} or {{ response }} exactly"):
        render(str(path), DOLLY)
    path.write_text("{{ response }} {{ response }}", encoding="utf-8")
    with pytest.raises(ConfigError, match="uses the answer 2 times"):
        render(str(path), DOLLY)


def test_misspelt_column_in_a_template_is_an_error_that_shows_the_columns():
    with pytest.raises(ExampleError, match=r"template mine: 'instrction' is undefined; the example has .*instruction"):
        ColumnTemplate("mine", "{{ instrction }} {{ response }}").render(layout("dolly").read(DOLLY))


def test_prompt_that_depends_on_the_answer_is_an_error():
    template = ColumnTemplate("mine", "{{ response | length }} {{ instruction }} {{ response }}")
    with pytest.raises(ExampleError, match="the prompt must not use it"):
        template.render(layout("dolly").read(DOLLY))


def test_templates_are_sandboxed():
    template = ColumnTemplate("mine", "{{ instruction.__class__.__mro__ }} {{ response }}")
    with pytest.raises(ExampleError, match="unsafe"):
        template.render(layout("dolly").read(DOLLY))


def test_syntax_error_names_the_line(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ instruction }}\n{% if %}{{ response }}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.jinja: line 2: "):
        render(str(path), DOLLY)


def test_unknown_template_name_is_answered_with_the_nearest_that_ships():
    with pytest.raises(ConfigError, match=r"dollly is neither a template .* nor a file; did you mean dolly\?"):
        render("dollly", DOLLY)


def test_example_template_is_refused_for_conversations(tiny_tokenizer):
    with pytest.raises(ConfigError, match="dolly is written for columns, but messages examples are conversations"):
        load_template("dolly", layout("messages"), tiny_tokenizer)


def test_chat_is_refused_for_plain_text(tiny_tokenizer):
    with pytest.raises(ConfigError, match="chatml needs a prompt and an answer; text examples hold only text"):
        load_template("chatml", layout("text"), tiny_tokenizer)


def test_question_goes_through_the_same_template_as_an_example(tiny_tokenizer):
    data = DataConfig(train="gone.jsonl", format="dolly", template="dolly-tutorial")
    question = {name: DOLLY[name] for name in ("instruction", "context")}
    assert Questions(data, tiny_tokenizer).render(question) == parts(render("dolly-tutorial", DOLLY))[0]
    assert "Question: Who?\nAdditional Context: \n" in Questions(data, tiny_tokenizer).render("Who?")


def test_question_may_use_the_names_of_the_file(tiny_tokenizer):
    columns = {"prompt": "ref", "completion": "mr"}
    data = DataConfig(train="gone.csv", format="prompt-completion", template="viggo", columns=columns)
    expected = "Sentence: A game.\nMeaning:"
    for question in ("A game.", {"ref": "A game."}, {"prompt": "A game."}):
        assert Questions(data, tiny_tokenizer).render(question) == expected


def test_question_without_a_named_layout_takes_it_from_the_training_examples(tiny_tokenizer, jsonl):
    data = DataConfig(train=jsonl({"question": "1 + 1?", "answer": "2"}))
    assert Questions(data, tiny_tokenizer).render("2 + 2?") == "Question: 2 + 2?\nAnswer:"
    with pytest.raises(DataError, match="no such file"):
        Questions(DataConfig(train="gone.jsonl"), tiny_tokenizer).render("2 + 2?")


def test_text_is_its_own_prompt(tiny_tokenizer):
    data = DataConfig(train="gone.txt", format="text")
    assert Questions(data, tiny_tokenizer).render("Once upon a time") == "Once upon a time"
