"""Answers as they are written, and conversations through every kind of template."""

import pytest
import torch

from expertune.config import DataConfig
from expertune.data import encode_prompt
from expertune.errors import ConfigError, DataError
from expertune.generation.chat import Conversation, _Pieces, questions_in_turn, stream
from expertune.generation.decoding import complete, to_text
from expertune.generation.sampling import Sampling

# Mistral's: turns must alternate, and there is no system role.
ALTERNATING = """{% for message in messages %}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
{%- if message.role == "user" %}[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}</s>{% endif %}
{%- endfor %}"""

# Drops what it does not know.
FORGETFUL = ALTERNATING.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)


def test_streamed_pieces_joined_are_the_whole_answer(model, tokenizer, prompts):
    for prompt, whole in zip(prompts, complete(model, tokenizer, prompts, Sampling(12)), strict=True):
        pieces = list(stream(model, tokenizer, prompt, Sampling(12)))
        assert "".join(pieces) == whole.text
        assert len(pieces) > 3
        assert all(pieces)


@pytest.mark.parametrize("text", ["caf\u00e9 \U0001f600 \u4f60\u597d", "def f():\n    return 1\n", "a \u00e9"])
def test_pieces_hold_whole_characters_and_every_space(tokenizer, text):
    pieces = _Pieces(tokenizer, ends=[2])
    pieces.put(torch.tensor([[1, 5, 6]]))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for token_id in [*ids, 2]:
        pieces.put(torch.tensor([token_id]))
    pieces.end()
    sent = [pieces.queue.get() for _ in range(pieces.queue.qsize())]
    assert "".join(sent) == to_text(ids, tokenizer)
    assert not any("\ufffd" in piece for piece in sent)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    ids = tokenizer("\U0001f600", add_special_tokens=False).input_ids
    assert len(ids) > 1
    pieces = _Pieces(tokenizer, ends=[2])
    for value in ([1], *([token_id] for token_id in ids[:-1])):
        pieces.put(torch.tensor(value))
    pieces.end()
    assert pieces.queue.get() == to_text(ids[:-1], tokenizer)


def test_an_error_while_streaming_reaches_the_reader(model, base, tokenizer, prompts):
    def fail(*_):
        raise RuntimeError("out of memory")

    hook = base.lm_head.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream(model, tokenizer, prompts[0], Sampling(4)))
    finally:
        hook.remove()


def test_closing_the_stream_stops_the_model(model, tokenizer, prompts, widths):
    pieces = stream(model, tokenizer, prompts[0], Sampling(1000))
    next(pieces)
    pieces.close()
    num_forwards = len(widths)
    assert num_forwards < 900
    complete(model, tokenizer, prompts[:1], Sampling(1))
    assert len(widths) == num_forwards + 1


CHATML = DataConfig(train="rows.jsonl", format="dolly", template="chatml")
VIGGO = DataConfig(train="rows.csv", format="prompt-completion", template="viggo", columns={"prompt": "ref"})
DOLLY = DataConfig(train="rows.jsonl", format="dolly", template="dolly")


@pytest.fixture
def conversing(model, tokenizer):
    """Makes conversations with the model; what they tell the user is in `told`."""

    def conversation(data, max_new_tokens=6, chat_template=None, **arguments):
        tokenizer.chat_template = chat_template
        told = []
        made = Conversation(
            model, questions_in_turn(data, tokenizer), Sampling(max_new_tokens), notify=told.append, **arguments
        )
        made.told = told
        return made

    return conversation


@pytest.mark.parametrize(
    ("data", "chat_template"),
    [(CHATML, None), (DataConfig(train="rows.jsonl", format="messages"), ALTERNATING)],
    ids=["chatml", "the tokenizer's own"],
)
def test_chat_template_remembers_the_turns_until_they_are_reset(conversing, tokenizer, data, chat_template):
    conversation = conversing(data, chat_template=chat_template)
    assert conversation.remembers
    first = conversation.prompt("Who are you?")
    answer = conversation.ask("Who are you?")
    assert answer
    second = tokenizer.decode(conversation.prompt("Whose?"))
    assert second.startswith(tokenizer.decode(first))
    assert second.index("Who are you?") < second.index(answer) < second.index("Whose?")
    conversation.reset()
    assert conversation.prompt("Who are you?") == first


def test_a_file_over_messages_is_a_chat_template_too(conversing, tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(ALTERNATING, encoding="utf-8")
    conversation = conversing(DataConfig(train="rows.jsonl", format="dolly", template=str(path)))
    answer = conversation.ask("Who?")
    assert tokenizer.decode(conversation.prompt("Why?")).endswith(
        f"[INST] Who? [/INST] {answer}</s>[INST] Why? [/INST]"
    )


def test_other_templates_ask_each_question_alone(conversing, tokenizer):
    conversation = conversing(VIGGO)
    first = conversation.prompt("I like FIFA 12.")
    assert first == encode_prompt("Sentence: I like FIFA 12.\nMeaning:", tokenizer)
    conversation.ask("I like FIFA 12.")
    assert conversation.prompt("I like FIFA 12.") == first
    assert not conversation.remembers
    assert conversation.told == []


def test_columns_go_with_each_question(conversing, tokenizer):
    conversation = conversing(DOLLY, columns={"context": "Ada wrote it."})
    for _ in range(2):
        assert "### Context:\nAda wrote it." in tokenizer.decode(conversation.prompt("Who?"))
        conversation.ask("Who?")


@pytest.mark.parametrize("data", [CHATML, DOLLY], ids=["chatml", "dolly"])
def test_system_prompt_stands_before_each_question_and_outlives_a_reset(conversing, tokenizer, data):
    conversation = conversing(data)
    conversation.system = "Be brief."
    conversation.ask("Who?")
    conversation.reset()
    text = tokenizer.decode(conversation.prompt("Why?"))
    assert text.index("Be brief.") < text.index("Why?")
    conversation.system = None
    assert "Be brief." not in tokenizer.decode(conversation.prompt("Why?"))


@pytest.mark.parametrize(
    ("data", "chat_template", "message"),
    [
        (VIGGO, None, "system: template viggo has no place for a system prompt; write it into the prompt"),
        (
            CHATML.model_copy(update={"template": "chat"}),
            ALTERNATING,
            "refuses this conversation: roles must",
        ),
        (CHATML.model_copy(update={"template": "chat"}), FORGETFUL, "template chat has no place for a system prompt"),
        (CHATML, None, "the system prompt holds no text"),
    ],
)
def test_system_prompt_without_a_place_is_refused_and_the_conversation_goes_on(
    conversing, data, chat_template, message
):
    conversation = conversing(data, chat_template=chat_template)
    with pytest.raises(ConfigError, match=message):
        conversation.system = " " if "no text" in message else "Be brief."
    assert conversation.system is None
    assert conversation.ask("Who?")


def test_adapter_is_left_out_and_taken_again_between_two_questions(conversing, model, tokenizer):
    conversation = conversing(VIGGO, base_only=True)
    with model.disable_adapter():
        (base,) = complete(model, tokenizer, [conversation.prompt("Who?")], Sampling(6))
    (tuned,) = complete(model, tokenizer, [conversation.prompt("Who?")], Sampling(6))
    assert base.text != tuned.text
    assert conversation.ask("Who?") == base.text.strip()
    conversation.base_only = False
    assert conversation.ask("Who?") == tuned.text.strip()


def test_answer_that_is_stopped_is_remembered_as_far_as_it_came(conversing, tokenizer, widths):
    conversation = conversing(CHATML, max_new_tokens=500)
    pieces = conversation.stream("Who?")
    begin = next(pieces)
    pieces.close()
    num_forwards = len(widths)
    assert num_forwards < 400
    assert conversation.finish_reason is None
    assert conversation.turns == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": begin.strip()}]
    conversation.prompt("Why?")


def test_empty_answer_is_no_turn(conversing, base, tokenizer):
    conversation = conversing(CHATML)
    ends = base.generation_config.eos_token_id
    base.generation_config.eos_token_id = list(range(base.config.vocab_size))
    try:
        assert conversation.ask("Who?") == ""
    finally:
        base.generation_config.eos_token_id = ends
    assert conversation.turns == []
    assert conversation.told == ["the answer is empty, and the question is forgotten"]


def test_oldest_turns_are_forgotten_where_the_context_ends_and_that_is_said(conversing, base):
    conversation = conversing(CHATML, max_new_tokens=4)
    for question in ("One?", "Two?", "Three?"):
        conversation.ask(question)
    base.config.max_position_embeddings = len(conversation.prompt("Four?")) - 1
    conversation.ask("Four?")
    assert [turn["content"] for turn in conversation.turns[::2]] == ["Two?", "Three?", "Four?"]
    assert conversation.told == [
        f"the conversation no longer fits into the model's context of {base.config.max_position_embeddings} tokens; "
        "the oldest question and its answer are forgotten"
    ]


def test_message_that_alone_fills_the_context_is_refused_and_the_turns_stay(conversing, base):
    conversation = conversing(CHATML, max_new_tokens=4)
    conversation.ask("One?")
    turns = list(conversation.turns)
    base.config.max_position_embeddings = 60
    with pytest.raises(DataError, match=r"prompt of \d+ tokens, but the model's context holds 60; shorten it"):
        conversation.ask("Two? " * 60)
    assert conversation.turns == turns
    assert conversation.told == []


def test_answer_says_why_it_ended(conversing, base):
    conversation = conversing(VIGGO, max_new_tokens=3)
    conversation.ask("Who?")
    assert conversation.finish_reason == "length"
    base.config.max_position_embeddings = len(conversation.prompt("Who?")) + 2
    conversation.ask("Who?")
    assert conversation.finish_reason == "context"


def test_draws_of_a_conversation_are_repeated_by_its_seed(conversing):
    answers = []
    for _ in range(2):
        conversation = conversing(VIGGO)
        conversation.sampling = Sampling(6, temperature=2, seed=5)
        answers.append([conversation.ask("Who?") for _ in range(3)])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
