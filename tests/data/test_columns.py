"""What a file's columns mean together: which layout they make, which are used, and what is never lost in silence."""

import pytest

from expertune.config import DataConfig
from expertune.data import IGNORE_INDEX, Questions, prepare_examples, prepare_run, settled
from expertune.errors import ConfigError, DataError

QUESTION, ANSWER = "What is the capital of Malta?", "Valletta."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
OASST = {"message_id": "a", "parent_id": None, "text": QUESTION, "role": "prompter", "replies": [], "lang": "en"}


@pytest.fixture
def prepare(jsonl, tiny_tokenizer):
    """Examples of a run, as the data room makes them of a JSONL file."""

    def call(*examples, **data):
        return prepare_examples(DataConfig(train=jsonl(*examples), **data), "train", tiny_tokenizer)

    return call


def trained(example, tokenizer):
    """The text of the tokens that take a loss."""
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


# --- a layout is not guessed where columns contradict it ----------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [
        OASST,
        {"text": QUESTION, "role": "user"},
        {"text": QUESTION, "conversation_id": 7},
        {"text": ANSWER, "message_id": "b", "parent_id": "a"},
        {"text": QUESTION, "replies": [{"text": ANSWER, "role": "assistant", "replies": []}]},
    ],
)
def test_messages_of_a_tree_are_not_taken_for_texts(prepare, example):
    with pytest.raises(
        DataError, match=r"they are single messages.*put each conversation into one example: {\"messages\""
    ):
        prepare(example)
    with pytest.raises(DataError, match="they are single messages"):
        prepare(example, template="chatml")
    assert prepare(example, format="text").examples[0].completion == example["text"]


def test_columns_of_a_tree_are_seen_in_whichever_example_they_first_appear(prepare):
    with pytest.raises(DataError, match="but parent_id beside it"):
        prepare({"text": "Once."}, {"text": "Twice.", "parent_id": "a"})


@pytest.mark.parametrize("name", ["context", "options", "response"])
def test_a_column_of_content_that_the_layout_leaves_out_is_refused(prepare, name):
    example = {"question": "Where?", "answer": "There.", name: "The passage that says where."}
    message = rf"question, answer look like the layout prompt-completion, but then {name} would not be used .* 1 of 1"
    with pytest.raises(DataError, match=message):
        prepare(example)
    report = prepare(example, format="prompt-completion").report
    assert report["warnings"] == [
        f"column {name} holds something in 1 of 1 examples and is not used by template question-answer"
    ]


def test_two_layouts_at_once_are_refused_unless_the_columns_are_named(prepare):
    example = {"prompt": "One?", "completion": "First.", "question": "Two?", "answer": "Second."}
    with pytest.raises(DataError, match="question, answer would not be used"):
        prepare(example)
    (chosen,) = prepare(example, columns={"prompt": "question", "completion": "answer"}).examples
    assert (chosen.prompt, chosen.completion) == ("Question: Two?\nAnswer:", " Second.")


def test_a_label_of_good_and_bad_completions_is_not_ignored(prepare):
    for example in ({"prompt": "2 + 2?", "completion": "5", "label": False}, {"messages": TURNS, "kto_tag": True}):
        with pytest.raises(DataError, match=r"a column .* says of each answer whether it is a good one"):
            prepare(example, template="chatml")


def test_preferences_beside_a_conversation_are_not_dropped(prepare):
    chosen, rejected = {"from": "gpt", "value": "Good."}, {"from": "gpt", "value": "Bad."}
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Bye"}]
    with pytest.raises(DataError, match="chosen, rejected would not be used"):
        prepare({"conversations": turns, "chosen": chosen, "rejected": rejected}, template="chatml")


@pytest.mark.parametrize(
    ("example", "name"),
    [
        ({"instruction": "Sum.", "input": "", "output": "3", "text": "### Sum.\n### 3"}, "text"),
        ({"instruction": "Sum.", "input": "1, 2", "output": "3", "prompt": "Do: Sum.\nWith: 1, 2"}, "prompt"),
        ({"prompt": QUESTION, "prompt_id": "7", "messages": TURNS}, "prompt"),
    ],
)
def test_a_copy_of_what_is_trained_anyway_is_harmless(prepare, example, name):
    report = prepare(example, template="chatml").report
    assert report["columns"]["ignored"][name] == 1
    assert report["warnings"] == []


def test_used_and_ignored_columns_are_counted_under_the_names_of_the_file(prepare):
    examples = [{"ref": "A game.", "mr": "inform()", "id": 1}, {"ref": "It.", "mr": "f()", "id": 2, "note": ""}]
    report = prepare(*examples, columns={"prompt": "ref", "completion": "mr"}, template="viggo").report
    assert report["columns"] == {"used": ["ref", "mr"], "ignored": {"id": 2}}


def test_a_column_of_any_name_and_depth_is_counted(prepare, tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    nested = "[" * 90 + "]" * 90
    path.write_text('{"prompt": "Who?", "completion": "Me.", "\\ud83d": 1, "context": ' + nested + "}\n")
    data = DataConfig(train=str(path), format="prompt-completion")
    report = prepare_examples(data, "train", tiny_tokenizer).report
    assert report["columns"]["ignored"] == {"\\ud83d": 1, "context": 1}


def test_keys_of_turns_that_the_template_does_not_use_are_among_the_ignored(prepare):
    turns = [{**TURNS[0], "name": "Ann"}, TURNS[1]]
    assert prepare({"messages": turns}, template="chatml").report["columns"]["ignored"] == {"messages[].name": 1}


def test_advice_for_columns_that_no_layout_fits_names_what_they_hold(prepare):
    with pytest.raises(DataError, match=r"Column dialogue holds turns: set data\.columns: {messages: dialogue}"):
        prepare({"dialogue": TURNS})
    with pytest.raises(DataError, match="The examples are single messages; put each conversation into one example"):
        prepare({"role": "user", "content": QUESTION})
    with pytest.raises(DataError, match="The examples are preferences: set objective: dpo"):
        prepare({"prompt": QUESTION, "chosen": ANSWER, "rejected": "Rome."})


# --- prompt and completion ----------------------------------------------------------------------------------------


def test_an_answer_is_not_glued_to_its_question(prepare, tiny_tokenizer):
    found = prepare({"prompt": QUESTION, "completion": ANSWER})
    assert found.report["template"] == "question-answer"
    assert (found.examples[0].prompt, found.examples[0].completion) == (f"Question: {QUESTION}\nAnswer:", f" {ANSWER}")
    assert trained(found.examples[0], tiny_tokenizer).removesuffix("</s>").strip() == ANSWER


@pytest.mark.parametrize(("prompt", "completion"), [("The sky is", " blue."), ("Q: Where?\n\n###\n\n", "Here.")])
def test_examples_that_bring_their_own_white_space_are_taken_as_they_are(prepare, prompt, completion):
    found = prepare(*[{"prompt": prompt, "completion": completion}] * 2)
    assert found.report["template"] == "plain"
    assert (found.examples[0].prompt, found.examples[0].completion) == (prompt, completion)


def test_a_template_that_glues_is_told(prepare):
    examples = [{"prompt": QUESTION, "completion": ANSWER}, {"prompt": "The sky is", "completion": " blue."}]
    (warning,) = prepare(*examples, template="plain").report["warnings"]
    assert warning.startswith("template plain joins prompt and completion without white space in 1 of 2 examples")


def test_one_form_for_all_examples_where_only_some_bring_white_space(prepare):
    found = prepare({"prompt": "Say: ", "completion": "yes"}, {"prompt": "Where?", "completion": "Here."})
    assert found.report["template"] == "question-answer"
    assert [example.completion for example in found.examples] == [" yes", " Here."]


def test_a_recorded_template_stays_with_its_run(jsonl, tiny_tokenizer):
    data = DataConfig(train=jsonl({"prompt": QUESTION, "completion": ANSWER}))
    old = settled(data, {"format": "prompt-completion", "template": "plain"})
    assert Questions(old, tiny_tokenizer).render(QUESTION) == QUESTION
    earlier = {"train": {"format": "prompt-completion", "template": "plain"}, "eval": None}
    resumed, _ = prepare_run(data, tiny_tokenizer, earlier)
    assert (resumed.examples[0].prompt, resumed.report["template"]) == (QUESTION, "plain")


def test_evaluation_examples_take_the_template_of_the_training_examples(jsonl, tiny_tokenizer):
    evaluation = jsonl({"prompt": "The sky is", "completion": " blue."}, name="eval.jsonl")
    data = DataConfig(train=jsonl({"question": QUESTION, "answer": ANSWER}), eval=evaluation)
    _, examples = prepare_run(data, tiny_tokenizer)
    assert examples.examples[0].prompt == "Question: The sky is\nAnswer:"


def test_empty_prompts_are_counted_and_said(prepare):
    examples = [{"prompt": QUESTION, "completion": ANSWER}, {"prompt": " ", "completion": "Who?"}]
    report = prepare(*examples).report
    assert report["num_empty_prompts"] == 1
    assert report["warnings"] == [
        "1 of 2 examples have an empty prompt, so their answers are learned as answers to nothing; first: "
        "rows.jsonl: row 2"
    ]
    turns = [{"from": "gpt", "value": "Hello!"}]
    assert prepare({"conversations": turns}, template="chatml").report["num_empty_prompts"] == 1


# --- conversations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_turns_are_read_by_their_own_keys_under_either_column(prepare, column, keys):
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("user", QUESTION), ("assistant", ANSWER))]
    (example,) = prepare({column: turns}, template="chatml").examples
    assert example.prompt == f"<|im_start|>user\n{QUESTION}</s>\n<|im_start|>assistant\n"
    assert example.completion == ANSWER


@pytest.mark.parametrize("prompt", [[TURNS[0]], QUESTION])
@pytest.mark.parametrize("completion", [[TURNS[1]], ANSWER])
def test_lists_of_turns_as_prompt_and_completion_are_a_conversation(prepare, prompt, completion):
    found = prepare({"prompt": prompt, "completion": completion}, template="chatml")
    assert found.examples[0].prompt == f"<|im_start|>user\n{QUESTION}</s>\n<|im_start|>assistant\n"
    in_turns = isinstance(prompt, list) or isinstance(completion, list)
    assert found.report["format"] == ("prompt-completion-messages" if in_turns else "prompt-completion")


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_answers_inside_a_prompt_are_context(prepare, tiny_tokenizer, train_on):
    shot = [{"role": "user", "content": "Italy?"}, {"role": "assistant", "content": "Rome"}]
    example = {"prompt": [*shot, TURNS[0]], "completion": [TURNS[1]]}
    text = trained(prepare(example, template="chatml", train_on=train_on).examples[0], tiny_tokenizer)
    assert "Valletta" in text
    assert "Rome" not in text
    assert ("Malta" in text) == (train_on == "all")


@pytest.mark.parametrize(
    "example",
    [
        {
            "system": "Answer in rhyme.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Y"}],
        },
        {"system": "Answer in rhyme.", "messages": TURNS},
        {"system_prompt": "Answer in rhyme.", "prompt": [TURNS[0]], "completion": ANSWER},
        {"system": "Answer in rhyme.", "instruction": QUESTION, "output": ANSWER},
    ],
)
def test_a_system_prompt_in_a_column_of_its_own_becomes_the_first_turn(prepare, example):
    found = prepare(example, template="chatml")
    assert found.examples[0].prompt.startswith("<|im_start|>system\nAnswer in rhyme.</s>\n<|im_start|>user\n")
    assert found.report["columns"]["ignored"] == {}
    assert found.report["warnings"] == []


def test_two_different_system_prompts_are_an_error_of_their_example(prepare):
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert prepare({"system": "Be brief.", "messages": turns}, template="chatml").examples[0].prompt.count("brief") == 1
    with pytest.raises(DataError, match="column system and the conversation have different system prompts"):
        prepare({"system": "Answer in rhyme.", "messages": turns}, template="chatml")


@pytest.mark.parametrize("template", [None, "alpaca", "plain"])
def test_a_system_prompt_beside_columns_is_used_by_the_template_or_its_loss_is_said(prepare, template):
    example = {"system": "Answer in rhyme.", "instruction": QUESTION, "output": ANSWER}
    found = prepare(example, template=template)
    if template == "plain":
        lost = "column system holds something in 1 of 1 examples and is not used by template plain"
        assert lost in found.report["warnings"]
    else:
        assert found.examples[0].prompt.startswith("Answer in rhyme.\n\n### Instruction:\n")
        assert found.report["columns"]["used"] == ["system", "instruction", "output"]


def test_history_becomes_earlier_turns_or_its_loss_is_said(prepare, tiny_tokenizer):
    example = {"instruction": QUESTION, "output": ANSWER, "history": [["Italy?", "Rome"]]}
    (chat,) = prepare(example, template="chatml").examples
    assert trained(chat, tiny_tokenizer) == f"Rome</s>{ANSWER}</s>"
    assert prepare(example).report["warnings"] == [
        "column history holds something in 1 of 1 examples and is not used by template alpaca"
    ]


def test_thoughts_go_to_the_template_or_their_loss_is_said(prepare, tmp_path):
    turns = [TURNS[0], {**TURNS[1], "reasoning_content": "An island."}]
    assert prepare({"messages": turns}, template="chatml").report["warnings"] == [
        "messages have reasoning_content in 1 of 1 examples, and template chatml does not use it"
    ]
    path = tmp_path / "thinks.jinja"
    path.write_text(
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}\n{% else %}"
        "{% generation %}[{{ message.reasoning_content }}] {{ message.content }}{{ eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    found = prepare({"messages": turns}, template=str(path))
    assert (found.examples[0].completion, found.report["warnings"]) == (f"[An island.] {ANSWER}", [])


# --- what the data say is not to be trained -----------------------------------------------------------------------


@pytest.mark.parametrize("flag", [{"weight": 0}, {"loss": False}, {"train": False}, {"training": 0}, {"weight": "0.0"}])
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_a_flagged_turn_takes_no_loss(prepare, tiny_tokenizer, flag, train_on):
    shot = [{"role": "user", "content": "Italy?"}, {"role": "assistant", "content": "Rome", **flag}]
    (example,) = prepare({"messages": [*shot, *TURNS]}, template="chatml", train_on=train_on).examples
    text = trained(example, tiny_tokenizer)
    assert "Rome" not in text
    assert "Valletta" in text
    assert "Rome" in example.prompt


# As Qwen3's: thoughts are written in the last turn alone, so an earlier turn reads otherwise by itself.
REWRITES = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}"
    "{{ message.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_the_last_turn_alone_can_be_trained_where_the_template_rewrites_earlier_ones(prepare, tmp_path, tiny_tokenizer):
    path = tmp_path / "rewrites.jinja"
    path.write_text(REWRITES)
    shot = [{"role": "user", "content": "Italy?"}, {"role": "assistant", "content": "Rome"}]
    with pytest.raises(DataError, match="or flag all turns but the last"):
        prepare({"messages": [*shot, *TURNS]}, template=str(path))
    example = {"prompt": [*shot, TURNS[0]], "completion": [TURNS[1]]}
    (found,) = prepare(example, template=str(path)).examples
    assert trained(found, tiny_tokenizer) == f"<think></think>{ANSWER}</s>"
    assert "assistant: Rome</s>" in found.prompt
    with pytest.raises(DataError, match="cannot be found in the text under this template"):
        prepare(example, template=str(path), train_on="all")


def test_a_conversation_ends_at_its_last_trained_turn(prepare, tiny_tokenizer):
    (example,) = prepare(
        {"messages": [*TURNS, {"role": "user", "content": "And?"}, {**TURNS[1], "weight": 0}]}, template="chatml"
    ).examples
    assert trained(example, tiny_tokenizer) == f"{ANSWER}</s>"
    assert example.input_ids[-1] == tiny_tokenizer.eos_token_id


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "One?", "completion": "No.", "weight": 0},
        {"prompt": "One?", "completion": "No.", "train": False},
        {"prompt": "One?", "completion": "No.", "loss": False},
        {"prompt": [TURNS[0]], "completion": [{**TURNS[1], "weight": 0}]},
    ],
)
def test_an_example_that_is_flagged_as_a_whole_is_left_out_and_counted(prepare, example):
    found = prepare({"prompt": QUESTION, "completion": ANSWER}, example, template="chatml")
    assert [each.completion for each in found.examples] == [ANSWER]
    assert (found.report["num_flagged"], found.report["num_skipped"]) == (1, 0)
    with pytest.raises(DataError, match="all examples \\(1\\) are flagged not to be trained"):
        prepare(example, template="chatml")


def test_a_weight_between_0_and_1_is_not_taken_for_1(prepare):
    turns = [TURNS[0], {**TURNS[1], "weight": 0.5}]
    with pytest.raises(DataError, match=r"weight of message 2 is 0\.5; only 0 and 1"):
        prepare({"messages": turns}, template="chatml")
    example = {"prompt": QUESTION, "completion": ANSWER, "weight": 0.5, "loss": 0.0}
    (warning,) = prepare(example).report["warnings"]
    assert warning == "column weight holds something in 1 of 1 examples and is not used by template question-answer"


def test_a_renamed_column_that_nothing_reads_is_an_error_with_the_nearest_name(prepare, tmp_path):
    example = {"ref": QUESTION, "mr": ANSWER, "sys": "Be brief."}
    columns = {"prompt": "ref", "completion": "mr", "sytem": "sys"}
    with pytest.raises(ConfigError, match=r"data\.columns: sytem is a name .*; did you mean system\?"):
        prepare(example, columns=columns)
    with pytest.raises(ConfigError, match=r"data\.columns: promt is a name .*; did you mean prompt\?"):
        prepare(example, columns={"promt": "ref", "completion": "mr"})
    own = tmp_path / "own.jinja"
    own.write_text("{{ sytem }} {{ prompt }}: {{ completion }}", encoding="utf-8")
    assert prepare(example, columns=columns, template=str(own)).examples[0].prompt == f"Be brief. {QUESTION}:"


def test_a_completion_of_turns_without_an_answer_is_a_bad_example(prepare):
    examples = [{"prompt": TURNS, "completion": [TURNS[0]]}, {"prompt": TURNS[:1], "completion": TURNS[1:]}]
    with pytest.raises(DataError, match=r"1 of 2 examples .*\n.*row 1: no assistant turn in the completion"):
        prepare(*examples, template="chatml")
    report = prepare(*examples, template="chatml", on_error="skip").report
    assert (report["num_skipped"], report["num_flagged"]) == (1, 0)
