import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from expertune.config import DataConfig
from expertune.data import IGNORE_INDEX, encode_prompt, prepare_examples
from expertune.data.column_template import Rendered
from expertune.data.encode import check_tokenizer, encode_example
from expertune.data.lint import ExampleError
from expertune.data.text_ids import TokenizesAhead
from expertune.errors import ConfigError
from tests.examples import examples


@pytest.fixture(scope="module")
def trimming_tokenizer():
    """Byte-level BPE of the GPT-NeoX kind, whose offsets leave out spaces; it joins line breaks into one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ["the meaning of the sentence\n\n\n\nis the answer\n\nof the model  \n\n"] * 9, trainer
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(params=["tiny", "mixtral", "trimming"])
def tokenizer(request, tiny_tokenizer, mixtral_tokenizer, trimming_tokenizer):
    return {"tiny": tiny_tokenizer, "mixtral": mixtral_tokenizer, "trimming": trimming_tokenizer}[request.param]


def rendered(prompt, completion):
    return Rendered(prompt + completion, [(len(prompt), len(prompt + completion))], append_eos=True)


def trained(ids, labels):
    assert len(ids) == len(labels)
    return [token_id for token_id, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]


BOUNDARIES = [
    ("Sentence: A game.\nMeaning:", " inform(name[Dirt])"),
    ("### Answer:\n", "Yes."),
    ("### Answer:\n", "\n\nYes."),
    ("the mean", "ing of the sentence"),
    ("Question:  ", "  Answer"),
    ("", "Once upon a time"),
    ("caf", "\u00e9 \U0001f600 \u4f60\u597d"),
    ("tab\t", "\ttab"),
]


@pytest.mark.parametrize(("prompt", "completion"), BOUNDARIES)
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_generation_starts_from_the_ids_that_training_saw(tokenizer, prompt, completion, train_on):
    ids, labels = encode_example(rendered(prompt, completion), train_on, tokenizer)
    start = encode_prompt(prompt, tokenizer)
    assert ids[: len(start)] == start
    # The first token of an example has nothing before it, so it is never trained.
    first_trained = max(len(start), 1) if train_on == "completion" else 1
    assert trained(ids, labels) == ids[first_trained:]
    assert set(labels[:first_trained]) == {IGNORE_INDEX}


@pytest.mark.parametrize(("prompt", "completion"), BOUNDARIES)
def test_ids_decode_to_the_text_with_one_eos(tokenizer, prompt, completion):
    ids, _ = encode_example(rendered(prompt, completion), "completion", tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


@examples(60)
@given(prompt=st.text(max_size=30), completion=st.text(min_size=1, max_size=30), end=st.booleans())
def test_labels_are_ignored_or_equal_to_the_ids(tiny_tokenizer, prompt, completion, end):
    text = prompt + completion
    example = Rendered(text, [(len(prompt), len(text))], append_eos=end)
    ids, labels = encode_example(example, "completion", tiny_tokenizer)
    assert all(label in (IGNORE_INDEX, token_id) for token_id, label in zip(ids, labels, strict=True))
    start = len(encode_prompt(prompt, tiny_tokenizer))
    assert ids[:start] == encode_prompt(prompt, tiny_tokenizer)
    assert labels[:start] == [IGNORE_INDEX] * start
    assert labels[start:] == ids[start:]


def test_first_word_of_a_completion_has_its_ids_from_the_middle_of_a_text(mixtral_tokenizer):
    # SentencePiece would otherwise put a second space in front of it.
    prompt, completion = "Meaning:", " inform"
    ids, _ = encode_example(rendered(prompt, completion), "completion", mixtral_tokenizer)
    assert mixtral_tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁Mean", "ing", ":", "▁inform", "</s>"]
    # "mean" + "ing" is one token as a whole, so here the completion is tokenized as a continuation.
    ids, _ = encode_example(rendered("the mean", "ing"), "completion", mixtral_tokenizer)
    assert mixtral_tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁the", "▁mean", "ing", "</s>"]


def test_every_trained_turn_is_found_by_its_characters(tokenizer):
    turns = ["the question\n", "the answer\n", "of the sentence\n", "is the model\n"]
    text = "".join(turns)
    ends = [len("".join(turns[: index + 1])) for index in range(4)]
    example = Rendered(text, [(ends[0], ends[1]), (ends[2], ends[3])], append_eos=True)
    ids, labels = encode_example(example, "completion", tokenizer)
    assert tokenizer.decode(trained(ids, labels), skip_special_tokens=True).replace(" ", "") == (
        (turns[1] + turns[3]).replace(" ", "")
    )


def test_bos_that_the_text_already_holds_is_not_doubled(tiny_tokenizer):
    assert encode_prompt("<s>hello", tiny_tokenizer) == encode_prompt("hello", tiny_tokenizer)
    assert encode_prompt("hello", tiny_tokenizer).count(tiny_tokenizer.bos_token_id) == 1


def test_tokenizer_without_bos_gets_none(trimming_tokenizer):
    assert encode_prompt("the answer", trimming_tokenizer) == trimming_tokenizer("the answer")["input_ids"]
    assert encode_prompt("", trimming_tokenizer) == []


def test_tokenizer_that_adds_eos_by_itself_does_not_end_the_prompt_with_it(mixtral_tokenizer, tmp_path):
    mixtral_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_eos_token=True)
    assert tokenizer("hi")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_prompt("hi", tokenizer) == encode_prompt("hi", mixtral_tokenizer)
    ids, _ = encode_example(rendered("hi", " there"), "completion", tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_without_eos_is_refused(trimming_tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trimming_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="has no EOS token"):
        check_tokenizer(tokenizer)


def test_recipe_example_of_dolly_is_golden(files, mixtral_tokenizer):
    data = DataConfig(train=f"{files}/dolly-first5.jsonl[1:2]", template="dolly-tutorial", max_length=320)
    (example,) = prepare_examples(data, "train", mixtral_tokenizer).examples
    assert mixtral_tokenizer.decode(example.input_ids) == (
        "<s> Given a question and some additional context, provide an answer\n\n### Target sentence:\n"
        "Question: Which is a species of fish? Tope or Rope\nAdditional Context: \n"
        "Response: [/INST] Tope</s></s>"
    )
    # The first </s> is spelled out by the template and the second is the tokenizer's own; both are the one EOS token.
    assert example.input_ids[-2:] == example.labels[-2:] == [mixtral_tokenizer.eos_token_id] * 2
    assert mixtral_tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]) == "Tope</s></s>"
    assert example.completion == " Tope"
    # As the recipe tokenized it, but for its second EOS: the whole text at once, BOS in front.
    whole = mixtral_tokenizer(example.prompt + example.completion + "</s>")["input_ids"]
    assert example.input_ids == [*whole, mixtral_tokenizer.eos_token_id]


def test_golden_tokenizer_is_the_one_of_mixtral(files, mixtral_tokenizer):
    stored = json.loads(gzip.decompress((files / "mixtral-tokenizer" / "tokenizer.json.gz").read_bytes()))
    assert len(stored["model"]["vocab"]) == len(mixtral_tokenizer) == 32_000
    assert mixtral_tokenizer.pad_token is None


def test_texts_are_tokenized_ahead_though_one_of_them_is_no_unicode(tiny_tokenizer):
    ahead, good = TokenizesAhead(tiny_tokenizer), rendered("Who is it?", " Ada.")
    ahead.take([good, rendered("Who", " is \ud800")])
    assert set(ahead._known) == {good.text, "Who is it?", "Who"}
    assert encode_example(good, "completion", ahead) == encode_example(good, "completion", tiny_tokenizer)


def test_prompt_with_half_a_surrogate_pair_is_refused(tiny_tokenizer):
    with pytest.raises(ExampleError, match="half a surrogate pair"):
        encode_prompt("who is \ud800?", tiny_tokenizer)
