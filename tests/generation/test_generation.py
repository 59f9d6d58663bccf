import logging
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.config import DataConfig, LoraSection, QuantizationConfig
from expertune.data import encode_prompt
from expertune.errors import ConfigError, DataError
from expertune.generation.chat import Conversation, _Pieces, stream
from expertune.generation.decoding import Batches, complete, end_ids, to_text

TINY = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
PROMPTS = [
    "Sentence: I like FIFA 12.\nMeaning:",
    "It",
    "What is the capital of France? The answer to this question is",
    "Once upon a time",
]


@pytest.fixture(scope="module")
def model():
    """The embedded Mixtral in float32, with an adapter that changes its answers."""
    loaded = load_model(TINY, QuantizationConfig(), torch.float32, "cpu")
    torch.manual_seed(1)  # factors A are drawn as well
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = attach(loaded, LoraSection(targets=["attention"]), str(TINY))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def base(model):
    """The transformers model under the adapter, its settings restored afterwards."""
    base = model.get_base_model()
    own, context = base.generation_config, base.config.max_position_embeddings
    yield base
    base.generation_config, base.config.max_position_embeddings = own, context
    base.config.use_cache = True


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def prompts(tokenizer):
    return [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]


@pytest.fixture
def widths(base):
    """Tokens of each forward pass."""
    seen = []
    hook = base.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_a_batch_answers_as_each_prompt_alone_would_in_the_callers_order(model, tokenizer, prompts):
    alone = [complete(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len(set(alone)) == len(PROMPTS)
    assert complete(model, tokenizer, prompts, max_new_tokens=12) == alone
    assert complete(model, tokenizer, prompts, max_new_tokens=12, batch_size=3) == alone


def test_the_head_multiplies_a_batchs_last_positions_in_one_product(model, base, tokenizer, prompts):
    given = []
    hook = base.get_output_embeddings().register_forward_hook(lambda _, inputs, output: given.append(inputs[0]))
    complete(model, tokenizer, prompts, max_new_tokens=2)
    hook.remove()
    assert [rows.shape[:2] for rows in given] == [(len(PROMPTS), 1)] * 2
    # Of a view torch would copy the head's weight for each row.
    assert all(rows.is_contiguous() for rows in given)


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_padding_needs_no_token_of_its_own(model, tokenizer, prompts, pad):
    expected = complete(model, tokenizer, prompts, max_new_tokens=8)
    tokenizer.pad_token = pad
    assert complete(model, tokenizer, prompts, max_new_tokens=8) == expected


def test_nothing_to_complete_is_no_error(model, tokenizer):
    assert complete(model, tokenizer, [], max_new_tokens=8) == []


def test_the_answer_holds_neither_the_prompt_nor_special_tokens(model, tokenizer, prompts):
    (answer,) = complete(model, tokenizer, prompts[:1], max_new_tokens=8)
    assert PROMPTS[0] not in answer
    assert to_text([tokenizer.bos_token_id, *prompts[1], tokenizer.eos_token_id], tokenizer) == to_text(
        encode_prompt(PROMPTS[1], tokenizer)[1:], tokenizer
    )


def test_spaces_before_punctuation_stay_as_written(tokenizer):
    tokenizer.clean_up_tokenization_spaces = True
    assert to_text(tokenizer("f ( a , b ) .", add_special_tokens=False).input_ids, tokenizer) == "f ( a , b ) ."


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_answer_ends_at_any_end_token(model, base, tokenizer, prompts, batch_size):
    long = complete(model, tokenizer, prompts, max_new_tokens=12)
    third = tokenizer(long[0], add_special_tokens=False).input_ids[2]
    base.generation_config = GenerationConfig(eos_token_id=[2, third])
    assert end_ids(model, tokenizer) == [tokenizer.eos_token_id, third]
    short = complete(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    for before, after in zip(long, short, strict=True):
        assert before.startswith(after)
    assert len(short[0]) < len(long[0])


def test_the_models_own_sampling_settings_do_not_matter(model, base, tokenizer, prompts):
    expected = complete(model, tokenizer, prompts, max_new_tokens=8)
    own = GenerationConfig(
        do_sample=True, temperature=2.0, top_k=7, repetition_penalty=9.0, min_length=3, eos_token_id=2, max_length=5
    )
    base.generation_config = own
    assert complete(model, tokenizer, prompts, max_new_tokens=8) == expected
    assert base.generation_config is own


def test_transformers_has_nothing_to_warn_of(model, tokenizer, prompts):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        complete(model, tokenizer, prompts, max_new_tokens=4)
        "".join(stream(model, tokenizer, prompts[0], max_new_tokens=4))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_a_model_in_training_answers_with_its_cache_and_goes_on_training(model, base, tokenizer, prompts, widths):
    expected = complete(model, tokenizer, prompts[:1], max_new_tokens=6)
    widths.clear()
    model.train()
    base.model.embed_tokens.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method's name changes between the versions we support
        base.gradient_checkpointing_enable()
    base.config.use_cache = False
    try:
        assert complete(model, tokenizer, prompts[:1], max_new_tokens=6) == expected
        assert widths == [len(prompts[0]), 1, 1, 1, 1, 1]
        assert {name for name, module in model.named_modules() if not module.training} == {
            "base_model.model.model.embed_tokens"
        }
    finally:
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            base.gradient_checkpointing_disable()


def test_without_the_adapter_the_base_model_answers(model, tokenizer, prompts):
    with model.disable_adapter():
        base_answers = complete(model, tokenizer, prompts, max_new_tokens=8)
    plain = load_model(TINY, QuantizationConfig(), torch.float32, "cpu").model
    assert complete(plain, tokenizer, prompts, max_new_tokens=8) == base_answers
    assert complete(model, tokenizer, prompts, max_new_tokens=8) != base_answers


def test_progress_counts_answered_prompts(model, tokenizer, prompts):
    seen = []
    complete(
        model,
        tokenizer,
        prompts,
        2,
        batch_size=3,
        batches=Batches(progress=lambda done, total: seen.append((done, total))),
    )
    assert seen == [(3, 4), (4, 4)]


def test_an_answer_ends_with_the_models_context(model, base, tokenizer, prompts, widths):
    base.config.max_position_embeddings = len(prompts[0]) + 3
    complete(model, tokenizer, prompts[:1], max_new_tokens=100)
    assert len(widths) == 3


def test_a_prompt_that_fills_the_context_is_refused(model, base, tokenizer, prompts):
    base.config.max_position_embeddings = len(prompts[0])
    with pytest.raises(DataError, match=r"has \d+ tokens, but the model's context holds \d+; shorten it"):
        complete(model, tokenizer, prompts[:1], max_new_tokens=1)


def test_an_empty_prompt_is_refused(model, tokenizer, prompts):
    with pytest.raises(DataError, match="the prompt holds no tokens"):
        complete(model, tokenizer, [prompts[0], []], max_new_tokens=1)


@pytest.mark.parametrize(("setting", "value"), [("max_new_tokens", 0), ("batch_size", -1)])
def test_lengths_and_sizes_are_positive(model, tokenizer, prompts, setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is {value}; it must be 1 or more"):
        complete(model, tokenizer, prompts, **{"max_new_tokens": 1, setting: value})


def test_without_an_end_token_no_answer_could_end(model, base, tokenizer, prompts):
    tokenizer.eos_token = None
    base.generation_config = GenerationConfig()
    with pytest.raises(ConfigError, match="no EOS token"):
        complete(model, tokenizer, prompts, max_new_tokens=1)


def test_streamed_pieces_joined_are_the_whole_answer(model, tokenizer, prompts):
    for prompt, answer in zip(prompts, complete(model, tokenizer, prompts, max_new_tokens=12), strict=True):
        pieces = list(stream(model, tokenizer, prompt, max_new_tokens=12))
        assert "".join(pieces) == answer
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
            list(stream(model, tokenizer, prompts[0], max_new_tokens=4))
    finally:
        hook.remove()
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        list(stream(model, tokenizer, prompts[0], max_new_tokens=0))


def test_closing_the_stream_stops_the_model(model, tokenizer, prompts, widths):
    pieces = stream(model, tokenizer, prompts[0], max_new_tokens=1000)
    next(pieces)
    pieces.close()
    num_forwards = len(widths)
    assert num_forwards < 900
    complete(model, tokenizer, prompts[:1], max_new_tokens=1)
    assert len(widths) == num_forwards + 1


def test_a_chat_template_remembers_the_conversation(tokenizer):
    conversation = Conversation(DataConfig(train="rows.jsonl", format="dolly", template="chatml"), tokenizer)
    assert conversation.keeps_history
    first = conversation.prompt("Who are you?")
    conversation.answered("Who are you?", "A model.")
    second = tokenizer.decode(conversation.prompt("Whose?"))
    for text in ("Who are you?", "A model.", "Whose?"):
        assert text in second
    assert second.startswith(tokenizer.decode(first))


def test_other_templates_ask_each_question_alone(tokenizer):
    data = DataConfig(
        train="rows.csv", format="prompt-completion", template="viggo", columns={"prompt": "ref", "completion": "mr"}
    )
    conversation = Conversation(data, tokenizer)
    first = conversation.prompt("I like FIFA 12.")
    conversation.answered("I like FIFA 12.", "inform(name[FIFA 12])")
    assert first == encode_prompt("Sentence: I like FIFA 12.\nMeaning:", tokenizer)
    assert conversation.prompt("I like FIFA 12.") == first
    assert not conversation.keeps_history
