import copy
import json
from itertools import groupby

import pytest

from expertune.config import DataConfig
from expertune.data import IGNORE_INDEX, Questions, encode_prompt, prepare_examples
from expertune.errors import ConfigError, DataError

# The bracketed instruction form: roles must alternate, an answer ends in EOS, no generation prompt of its own.
BRACKETS = """\
{{ bos_token }}{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}
{{- ' ' + message.content + eos_token }}{% endif %}
{% endfor %}"""

# Writes thoughts into the last answer only, so an earlier answer reads differently once later turns follow.
THOUGHTS_IN_LAST = """\
{% for message in messages %}{{ message.role + ': ' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ message.content + eos_token }}
{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

# Its generation block leaves out the end of the turn.
END_OUTSIDE = """\
{% for message in messages %}{{ message.role + ': ' }}{% generation %}{{ message.content }}{% endgeneration %}
{{- eos_token + '\n' }}{% endfor %}"""

EXAMPLE = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Bye."},
    ]
}


@pytest.fixture
def template(tmp_path):
    def write(source):
        path = tmp_path / "chat.jinja"
        path.write_text(source, encoding="utf-8")
        return str(path)

    return write


def only_row(data, tokenizer):
    (example,) = prepare_examples(data, "train", tokenizer).examples
    start = encode_prompt(example.prompt, tokenizer)
    assert example.input_ids[: len(start)] == start
    trained = [label for label in example.labels if label != IGNORE_INDEX]
    return example, tokenizer.decode(example.input_ids), tokenizer.decode(trained)


def test_every_assistant_turn_is_trained_and_its_end_too(jsonl, tiny_tokenizer):
    data = DataConfig(train=jsonl(EXAMPLE), template="chatml")
    example, text, trained = only_row(data, tiny_tokenizer)
    assert text == (
        "<s><|im_start|>user\nOne?</s>\n<|im_start|>assistant\nTwo.</s>\n"
        "<|im_start|>user\nThree?</s>\n<|im_start|>assistant\nFour.</s>"
    )
    assert trained == "Two.</s>Four.</s>"
    assert example.prompt.endswith("Three?</s>\n<|im_start|>assistant\n")
    assert example.completion == "Four."


@pytest.mark.parametrize("which", ["tiny_tokenizer", "mixtral_tokenizer"])
def test_template_without_generation_blocks_is_split_by_its_prefixes(request, jsonl, template, which):
    tokenizer = request.getfixturevalue(which)
    example, text, trained = only_row(DataConfig(train=jsonl(EXAMPLE), template=template(BRACKETS)), tokenizer)
    # Spaces behind special tokens are a habit of this tokenizer's decoder, not of the template.
    assert text.replace(" ", "") == "<s>[INST]One?[/INST]Two.</s>[INST]Three?[/INST]Four.</s>"
    assert trained.replace(" ", "") == "Two.</s>Four.</s>"
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.completion == " Four."


def test_prompt_of_an_example_is_what_generation_asks_with(jsonl, template, tiny_tokenizer):
    for source in ("chatml", template(BRACKETS)):
        data = DataConfig(train=jsonl(EXAMPLE), format="messages", template=source)
        example, _, _ = only_row(data, tiny_tokenizer)
        assert Questions(data, tiny_tokenizer).render({"messages": EXAMPLE["messages"][:3]}) == example.prompt


def test_question_of_one_text_is_a_user_turn(tiny_tokenizer):
    data = DataConfig(train="gone.jsonl", format="sharegpt", template="chatml")
    assert Questions(data, tiny_tokenizer).render("Who?") == "<|im_start|>user\nWho?</s>\n<|im_start|>assistant\n"


def test_tokenizers_own_chat_template_is_used(jsonl, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(BRACKETS, encoding="utf-8")
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path / "tokenizer")
    data = DataConfig(train=jsonl(EXAMPLE))
    _, text, trained = only_row(data, tokenizer)
    assert text == tokenizer.apply_chat_template(EXAMPLE["messages"][:4], tokenize=False)
    assert trained == " Two.</s> Four.</s>"


def test_base_model_without_a_chat_template_is_told_what_to_do(jsonl, mixtral_tokenizer):
    with pytest.raises(ConfigError, match="the tokenizer has no chat template, as base models do; use chatml"):
        prepare_examples(DataConfig(train=jsonl(EXAMPLE)), "train", mixtral_tokenizer)


def test_instruction_examples_can_be_asked_as_a_chat(files, tiny_tokenizer):
    data = DataConfig(train=f"{files}/dolly-first5.jsonl[1:2]", template="chatml")
    _, text, trained = only_row(data, tiny_tokenizer)
    assert text.startswith("<s><|im_start|>user\nWhich is a species of fish? Tope or Rope</s>\n<|im_start|>assistant\n")
    assert trained == "Tope</s>"


def test_template_whose_prefixes_disagree_is_an_error_for_several_turns(jsonl, template, tiny_tokenizer):
    source = template(THOUGHTS_IN_LAST)
    with pytest.raises(DataError, match=r"writes message 2 differently once .* later turns follow.* to chatml"):
        prepare_examples(DataConfig(train=jsonl(EXAMPLE), template=source), "train", tiny_tokenizer)
    single = {"messages": EXAMPLE["messages"][:2]}
    _, _, trained = only_row(DataConfig(train=jsonl(single), template=source), tiny_tokenizer)
    assert trained == "<think></think>Two.</s>"


def test_template_that_masks_the_end_of_the_turn_is_an_error(jsonl, template, tiny_tokenizer):
    with pytest.raises(DataError, match="the end of the answer is masked: the last trained token is not </s>"):
        prepare_examples(DataConfig(train=jsonl(EXAMPLE), template=template(END_OUTSIDE)), "train", tiny_tokenizer)


def test_eos_is_added_once_where_the_template_ends_turns_otherwise(jsonl, template, tiny_tokenizer):
    source = template(END_OUTSIDE.replace("{{- eos_token + '\n' }}", "{{- '\n' }}"))
    _, text, trained = only_row(DataConfig(train=jsonl(EXAMPLE), template=source), tiny_tokenizer)
    assert text.endswith("assistant: Four.</s>")
    assert trained.endswith("Four.</s>")


def test_conversation_that_the_template_refuses_is_an_error_with_its_example(files, template, tiny_tokenizer):
    data = DataConfig(train=f"{files}/openai-toy-first4.jsonl[2:4]", template=template(BRACKETS))
    with pytest.raises(
        DataError, match=r"1 of 2 examples .*\n.*first4\.jsonl: row 4: .* refuses .*roles must alternate"
    ):
        prepare_examples(data, "train", tiny_tokenizer)


def test_real_conversations_train_their_answers(files, tiny_tokenizer):
    for name in ("axolotl-conversation.json", "sharegpt-dummy-first2.json", "openai-toy-first4.jsonl"):
        data = DataConfig(train=str(files / name), template="chatml", max_length=8192)
        source = (files / name).read_text(encoding="utf-8")
        examples = prepare_examples(data, "train", tiny_tokenizer).examples
        values = [json.loads(line) for line in source.split("\n") if line] if ".jsonl" in name else json.loads(source)
        for example, value in zip(examples, values if isinstance(values, list) else [values], strict=True):
            turns = value.get("messages") or value["conversations"]
            answers = [
                turn.get("content", turn.get("value"))
                for turn in turns
                if turn.get("role", turn.get("from")) in ("assistant", "gpt")
            ]
            trained = tiny_tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
            assert trained == "".join(answer + "</s>" for answer in answers)


def test_syntax_error_in_a_chat_template_names_the_line(jsonl, template, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"chat\.jinja: line 2"):
        prepare_examples(
            DataConfig(train=jsonl(EXAMPLE), template=template("{{ messages }}\n{% if %}")), "train", tiny_tokenizer
        )


# GLM's kind: no token of its own ends a turn, the token of the next role does.
NEXT_ROLE_ENDS = """\
[gMASK]<sop>{% for message in messages %}{{ '<|' + message.role + '|>\\n' }}{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

NO_TOKEN_ENDS = """\
{% for message in messages %}{{ message.role | upper }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


@pytest.fixture
def role_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    roles = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    return tokenizer


def test_turn_that_the_next_role_ends_is_trained_with_that_token(jsonl, template, role_tokenizer):
    _, text, trained = only_row(DataConfig(train=jsonl(EXAMPLE), template=template(NEXT_ROLE_ENDS)), role_tokenizer)
    assert text == ("<s>[gMASK]<sop><|user|>\nOne?<|assistant|>\nTwo.<|user|>\nThree?<|assistant|>\nFour.</s>")
    assert trained == "\nTwo.<|user|>\nFour.</s>"


def test_turn_ends_are_found_around_generation_blocks_too(jsonl, template, role_tokenizer):
    source = NEXT_ROLE_ENDS.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}"
        "{{ message.content }}{% endif %}",
    )
    found = prepare_examples(DataConfig(train=jsonl(EXAMPLE), template=template(source)), "train", role_tokenizer)
    (example,) = found.examples
    assert (
        role_tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]) == "Two.<|user|>Four.</s>"
    )
    assert found.report["warnings"] == []


def test_template_that_ends_no_turn_by_a_token_is_told_with_the_number_of_turns(jsonl, template, tiny_tokenizer):
    data = DataConfig(train=jsonl(EXAMPLE, EXAMPLE), template=template(NO_TOKEN_ENDS))
    (warning,) = prepare_examples(data, "train", tiny_tokenizer).report["warnings"]
    assert "ends 2 assistant turns by plain text and no special token" in warning
    assert (
        prepare_examples(DataConfig(train=jsonl(EXAMPLE), template="chatml"), "train", tiny_tokenizer).report[
            "warnings"
        ]
        == []
    )


def test_end_of_the_turn_behind_a_generation_block_is_an_error_though_it_is_not_eos(jsonl, template, role_tokenizer):
    source = template(END_OUTSIDE.replace("eos_token", "'<|im_end|>'"))
    with pytest.raises(DataError, match=r"the end of the answer is masked: .* writes '<\|im_end\|>' behind it"):
        prepare_examples(DataConfig(train=jsonl(EXAMPLE), template=source), "train", role_tokenizer)


# The header of an answer ends in a space, which most tokenizers join with the word behind it.
SPACE_BEFORE = """\
{% for message in messages %}{{ message.role + ': ' + message.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

SPACE_BEFORE_BLOCK = """\
{% for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}
{%- generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}
{{- '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

SHORT = [("Is it?", "Yes"), ("Sure?", "No"), ("And </s> now?", "Yes")]
SHORT_TURNS = [turn for q, a in SHORT for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


@pytest.mark.parametrize("flag", [1, 0])
@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("source", [SPACE_BEFORE, SPACE_BEFORE_BLOCK])
def test_answers_behind_a_space_are_trained_whole_in_every_turn(
    jsonl, template, mixtral_tokenizer, source, train_on, flag
):
    turns = [SHORT_TURNS[0], SHORT_TURNS[1] | {"weight": flag}, *SHORT_TURNS[2:]]
    data = DataConfig(train=jsonl({"messages": turns}), template=template(source), train_on=train_on)
    example, _, _ = only_row(data, mixtral_tokenizer)
    tokens = mixtral_tokenizer.convert_ids_to_tokens(example.input_ids)
    runs = [
        (flag, [token for _, token in group])
        for flag, group in groupby(
            zip([label != IGNORE_INDEX for label in example.labels], tokens, strict=True), key=lambda pair: pair[0]
        )
    ]
    assert [each for each, token in zip(tokens[1:], tokens, strict=False) if token == "▁" and each in ("Yes", "No")]
    if train_on == "completion":
        expected = [["Yes", "</s>"], ["No", "</s>"], ["Yes", "</s>"]][1 - flag :]
        assert [run for trained, run in runs if trained] == expected
    else:
        # The line break behind a turn belongs to it under templates without blocks.
        untrained = [run[:2] for trained, run in runs if not trained]
        assert untrained == [["<s>"]] + [["Yes", "</s>"]] * (1 - flag)
    # The same conversation, asked.
    question = Questions(data, mixtral_tokenizer).render({"messages": SHORT_TURNS[:5]})
    start = encode_prompt(question, mixtral_tokenizer)
    assert example.input_ids[: len(start)] == start


def test_answers_that_no_token_straddles_keep_the_ids_of_the_whole_text(jsonl, template, mixtral_tokenizer):
    example, _, _ = only_row(DataConfig(train=jsonl(EXAMPLE), template=template(BRACKETS)), mixtral_tokenizer)
    assert (
        example.input_ids
        == mixtral_tokenizer(example.prompt + example.completion + "</s>", add_special_tokens=False).input_ids
    )


def test_answer_that_starts_inside_a_special_token_is_an_error(jsonl, template, mixtral_tokenizer):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[<{% generation %}s>{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 1: an answer starts inside the token <s>, which cannot be split"):
        prepare_examples(DataConfig(train=jsonl(EXAMPLE), template=template(source)), "train", mixtral_tokenizer)
