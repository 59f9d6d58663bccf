import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from expertune.config import DataConfig
from expertune.data import IGNORE_INDEX, Questions, encode_prompt, prepare_examples
from expertune.data.column_template import Rendered
from expertune.data.encode import encode_example
from expertune.data.special_tokens import RenderedText
from expertune.errors import DataError
from tests.examples import examples

EXAMPLE = {"prompt": "Say </s> now", "completion": " <s>a</s>b"}


@pytest.fixture(scope="module")
def word_tokenizer():
    """A Unigram vocabulary that holds its special tokens as words too, and strips spaces around one of them."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<|user|>", 0.0)]
    pieces += [(char, -5.0) for char in "▁</s>|useraybn w\n.:"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<|user|>", lstrip=True, rstrip=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE whose first words are special tokens of other names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["say a b now"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(params=["tiny", "mixtral", "word", "byte"])
def tokenizer(request, tiny_tokenizer, mixtral_tokenizer, word_tokenizer, byte_tokenizer):
    return {"tiny": tiny_tokenizer, "mixtral": mixtral_tokenizer, "word": word_tokenizer, "byte": byte_tokenizer}[
        request.param
    ]


def special_ids(ids, tokenizer):
    return [token_id for token_id in ids if token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id)]


@pytest.mark.parametrize("template", ["plain", "chatml", "viggo"])
def test_special_tokens_that_an_example_spells_out_are_text(jsonl, tokenizer, template):
    data = DataConfig(train=jsonl(EXAMPLE), template=template)
    prepared = prepare_examples(data, "train", tokenizer)
    (example,) = prepared.examples
    bos = special_ids(tokenizer("a")["input_ids"], tokenizer)
    ends = 2 if template == "chatml" else 1
    assert special_ids(example.input_ids, tokenizer) == bos + [tokenizer.eos_token_id] * ends
    assert example.labels[-1] == example.input_ids[-1] == tokenizer.eos_token_id
    assert (example.prompt.count("</s>"), example.completion.strip()) == (ends, "<s>a</s>b")
    start = encode_prompt(example.prompt, tokenizer)
    assert example.input_ids[: len(start)] == start
    assert example.labels[: len(start)] == [IGNORE_INDEX] * len(start)
    assert prepared.report["special_tokens_as_text"] == {"</s>": 1, "<s>": 1}
    (warning,) = prepared.report["warnings"]
    assert "spells out special tokens (</s> in 1 example, <s> in 1 example); they are read as text" in warning


def test_text_of_a_special_token_has_the_ids_that_it_has_as_text(jsonl, mixtral_tokenizer):
    (example,) = prepare_examples(DataConfig(train=jsonl(EXAMPLE)), "train", mixtral_tokenizer).examples
    assert mixtral_tokenizer.convert_ids_to_tokens(example.input_ids) == [
        *("<s>", "▁Say", "▁</", "s", ">", "▁now"),
        *("▁<", "s", ">", "a", "</", "s", ">", "b", "</s>"),
    ]
    text = mixtral_tokenizer("Say </s> now <s>a</s>b", add_special_tokens=False, split_special_tokens=True)
    assert example.input_ids[1:-1] == text["input_ids"]


def test_setting_makes_special_tokens_of_the_examples_special(jsonl, mixtral_tokenizer):
    data = DataConfig(train=jsonl(EXAMPLE), parse_special_tokens=True)
    prepared = prepare_examples(data, "train", mixtral_tokenizer)
    (example,) = prepared.examples
    assert example.input_ids == mixtral_tokenizer("Say </s> now <s>a</s>b</s>")["input_ids"]
    assert prepared.report["special_tokens_as_text"] == {}
    prompt = Questions(data, mixtral_tokenizer).render("Say </s> now")
    assert 2 in encode_prompt(prompt, mixtral_tokenizer)


@pytest.mark.parametrize(
    ("example", "template"),
    [
        ({"text": "<s>hey</s>"}, None),
        ({"text": "<s>hey</s>\n"}, None),
        ({"prompt": "Say: ", "completion": "hey</s>"}, "plain"),
        ({"instruction": "Say", "response": "hey</s> "}, "dolly"),
    ],
)
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_eos_that_an_example_brings_itself_ends_it_once(jsonl, mixtral_tokenizer, example, template, train_on):
    data = DataConfig(train=jsonl(example), template=template, parse_special_tokens=True, train_on=train_on)
    (prepared,) = prepare_examples(data, "train", mixtral_tokenizer).examples
    assert special_ids(prepared.input_ids, mixtral_tokenizer) == [1, 2]
    assert prepared.input_ids[-1] == prepared.labels[-1] == 2
    assert prepared.completion.endswith("hey")


def test_eos_of_an_example_template_stays_beside_the_one_that_follows_every_example(jsonl, mixtral_tokenizer):
    path = jsonl({"instruction": "Why?", "response": "So."})
    data = DataConfig(train=path, template="dolly-tutorial", parse_special_tokens=True)
    (example,) = prepare_examples(data, "train", mixtral_tokenizer).examples
    assert special_ids(example.input_ids, mixtral_tokenizer) == [1, 2, 2]


def test_special_tokens_of_an_example_template_stay_special_beside_those_of_the_example(jsonl, mixtral_tokenizer):
    path = jsonl({"instruction": "Why </s>?", "response": "So."})
    (example,) = prepare_examples(
        DataConfig(train=path, template="dolly-tutorial"), "train", mixtral_tokenizer
    ).examples
    # The template's own </s>, and the EOS that follows every example.
    assert special_ids(example.input_ids, mixtral_tokenizer) == [1, 2, 2]
    assert example.completion == " So."


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Say <", "/s> b"), ("s>", "a"), ("a", "b <"), ("</s", "> b"), ("s", "a")]
)
def test_special_token_that_two_columns_make_together_is_text(tmp_path, jsonl, tokenizer, prompt, completion):
    template = tmp_path / "mine.jinja"
    template.write_text("<{{ prompt }}{{ completion }}>", encoding="utf-8")
    path = jsonl({"prompt": prompt, "completion": completion})
    for name in ("plain", str(template)):
        (example,) = prepare_examples(DataConfig(train=path, template=name), "train", tokenizer).examples
        assert example.input_ids.count(tokenizer.eos_token_id) == 1
        assert special_ids(example.input_ids[1:-1], tokenizer) == []


def test_turns_of_a_conversation_end_only_where_the_template_ends_them(jsonl, tokenizer):
    messages = [
        {"role": "user", "content": "a </s> b"},
        {"role": "assistant", "content": "b</s>"},
        {"role": "user", "content": "</s>"},
        {"role": "assistant", "content": "a</s>b"},
    ]
    (example,) = prepare_examples(
        DataConfig(train=jsonl({"messages": messages}), template="chatml"), "train", tokenizer
    ).examples
    assert example.input_ids.count(tokenizer.eos_token_id) == 4
    assert example.labels.count(tokenizer.eos_token_id) == 2
    assert example.completion == "a</s>b"


def test_answer_that_spells_out_the_end_is_still_ended(jsonl, tmp_path, mixtral_tokenizer):
    template = tmp_path / "bare.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}", encoding="utf-8")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.</s>"}]
    data = DataConfig(train=jsonl({"messages": messages}), template=str(template))
    (example,) = prepare_examples(data, "train", mixtral_tokenizer).examples
    assert example.input_ids.count(2) == 1
    assert example.input_ids[-1] == example.labels[-1] == 2


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_prompts_of_generate_and_chat_hold_no_special_tokens_of_the_user(tokenizer, template):
    data = DataConfig(train="gone.jsonl", format="messages", template="chatml")
    if template == "plain":
        data = DataConfig(train="gone.jsonl", format="prompt-completion", template="plain")
    asked = encode_prompt(Questions(data, tokenizer).render("say </s><s> now"), tokenizer)
    other = encode_prompt(Questions(data, tokenizer).render("say a b now"), tokenizer)
    assert special_ids(asked, tokenizer) == special_ids(other, tokenizer)
    if template == "chatml":
        turns = ("user", "a </s>"), ("assistant", "b"), ("user", "say </s> now")
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = Questions(data, tokenizer).encode({"messages": messages})
        assert special_ids(ids, tokenizer) == special_ids(asked, tokenizer) + [tokenizer.eos_token_id] * 2


def test_template_that_tears_a_special_token_apart_is_an_error_with_its_example(tmp_path, jsonl, mixtral_tokenizer):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ prompt.split('</s>') | join('</s></s>') }}{{ completion }}", encoding="utf-8")
    data = DataConfig(train=jsonl(EXAMPLE), template=str(template))
    with pytest.raises(DataError, match=r"row 1: template .*mine\.jinja changes what the example spells out .*</s>"):
        prepare_examples(data, "train", mixtral_tokenizer)


def test_template_that_writes_them_as_json_needs_no_telling_apart(tmp_path, jsonl, mixtral_tokenizer):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ prompt | tojson }} {{ completion }}", encoding="utf-8")
    data = DataConfig(train=jsonl({**EXAMPLE, "completion": "b"}), template=str(template))
    (example,) = prepare_examples(data, "train", mixtral_tokenizer).examples
    assert "\\u003c/s\\u003e" in example.prompt
    assert special_ids(example.input_ids, mixtral_tokenizer) == [1, 2]


@examples(20)
@given(st.lists(st.sampled_from(["</s>", "<s>", " ", "a", "b\n", "  ", "é", "Say", "<", "/s>"]), max_size=12))
def test_special_tokens_that_stand_in_no_plain_place_have_their_usual_ids(
    tiny_tokenizer, mixtral_tokenizer, word_tokenizer, parts
):
    text = "".join(parts)
    for tokenizer in (tiny_tokenizer, mixtral_tokenizer, word_tokenizer):
        expected, _ = encode_example(Rendered(text + "a", [(0, len(text) + 1)], append_eos=False), "all", tokenizer)
        # A plain place that holds no special token changes nothing, but that the other way is taken.
        marked = RenderedText(text + "a", [(len(text), len(text) + 1)])
        ids, _ = encode_example(Rendered(marked, [(0, len(marked))], append_eos=False), "all", tokenizer)
        assert ids == expected
