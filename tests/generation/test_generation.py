import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from transformers import GenerationConfig

from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.config import LoraSection, QuantizationConfig
from expertune.data import encode_prompt
from expertune.errors import ConfigError, DataError
from expertune.experts.lora import norms_looked_at_once
from expertune.generation.chat import stream
from expertune.generation.decoding import Batches, decode, end_ids, to_text
from expertune.generation.decoding import complete as completions
from expertune.generation.sampling import Sampling
from expertune.kernels import native
from expertune.kernels.expert_mlp import few_tokens
from expertune.kernels.few_tokens import answering
from tests.generation.conftest import PROMPTS, TINY


def complete(model, tokenizer, prompts, max_new_tokens, batch_size=32, **sampling):
    """The texts of the completions."""
    how = Sampling(max_new_tokens, **sampling)
    return [each.text for each in completions(model, tokenizer, prompts, how, batch_size)]


def test_a_batch_answers_as_each_prompt_alone_would_in_the_callers_order(model, tokenizer, prompts):
    alone = [complete(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len(set(alone)) == len(PROMPTS)
    assert complete(model, tokenizer, prompts, max_new_tokens=12) == alone
    assert complete(model, tokenizer, prompts, max_new_tokens=12, batch_size=3) == alone


@pytest.mark.parametrize("count", [1, len(PROMPTS)])
def test_the_head_multiplies_a_batchs_last_positions_in_one_product(model, base, tokenizer, prompts, count):
    given = []
    hook = base.get_output_embeddings().register_forward_hook(lambda _, inputs, output: given.append(inputs[0]))
    complete(model, tokenizer, prompts[:count], max_new_tokens=2)
    hook.remove()
    assert [rows.shape[:2] for rows in given] == [(count, 1)] * 2
    # Of a view torch would copy the head's weight for each row; one row is contiguous by its shape alone.
    assert all(rows.stride() == rows.new_empty(rows.shape).stride() for rows in given)


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
def test_answers_alone_take_the_arithmetic_of_few_tokens(tokenizer, prompts, monkeypatch):
    model = load_model(TINY, QuantizationConfig(), torch.bfloat16, "cpu").model
    calls, lay_out = [], few_tokens.Experts
    monkeypatch.setattr(few_tokens, "Experts", lambda *given: calls.append(given) or lay_out(*given))
    with torch.no_grad():
        model(torch.tensor([[1]]))  # as a reference's log-probabilities are taken
    assert not calls
    complete(model, tokenizer, prompts[:1], max_new_tokens=5)
    # Once for the prompt and once for all tokens after it.
    assert len(calls) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize(("settings", "laid_out"), [({}, 2), ({"use_dora": True}, 1)], ids=["LoRA", "DoRA"])
@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
def test_an_answers_experts_have_the_adapter_that_is_active(settings, laid_out, monkeypatch):
    loaded = load_model(TINY, QuantizationConfig(), torch.float32, "cpu")
    model = attach(loaded, LoraSection(targets=["experts"], **settings), str(TINY)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    calls, lay_out = [], few_tokens.Experts
    monkeypatch.setattr(few_tokens, "Experts", lambda *given: calls.append(given) or lay_out(*given))
    ids = torch.tensor([[5, 17, 90]])

    def logits():
        with torch.no_grad():
            adapted = model(ids).logits
            with model.disable_adapter():
                return adapted, model(ids).logits

    expected = logits()
    assert not calls
    with answering(), norms_looked_at_once(model):
        found = [logits() for _ in range(2)]
    layers = model.config.num_hidden_layers
    assert len(calls) == laid_out * layers  # with the adapter and without it; with DoRA without it alone
    for answer in found:
        for one, other in zip(answer, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(*expected, atol=1e-2)


def test_threads_that_answer_at_once_have_the_adapter_that_each_asked_for(model, tokenizer, prompts):
    def answer(base_only, seed):
        around = model.disable_adapter() if base_only else nullcontext()
        return "".join(stream(model, tokenizer, prompts[0], Sampling(8, temperature=0.8, seed=seed), around))

    asked = [(base_only, seed) for seed in range(3) for base_only in (False, True)]
    alone = [answer(*each) for each in asked]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda each: answer(*each), asked)) == alone


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
        "".join(stream(model, tokenizer, prompts[0], Sampling(4)))
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
    batches = Batches(progress=lambda done, total: seen.append((done, total)))
    completions(model, tokenizer, prompts, Sampling(2), batch_size=3, batches=batches)
    assert seen == [(3, 4), (4, 4)]


def test_tokens_of_a_batch_are_counted_as_they_come(model, tokenizer, prompts):
    seen = []
    completions(model, tokenizer, prompts, Sampling(3), batch_size=3, batches=Batches(each_token=seen.append))
    assert seen == [1, 2, 3, 1, 2, 3]


def test_an_answer_ends_with_the_models_context(model, base, tokenizer, prompts, widths):
    base.config.max_position_embeddings = len(prompts[0]) + 3
    (answer,) = completions(model, tokenizer, prompts[:1], Sampling(100))
    assert len(widths) == 3
    assert (answer.num_tokens, answer.finish_reason) == (3, "context")


def test_a_prompt_that_fills_the_context_is_refused(model, base, tokenizer, prompts):
    base.config.max_position_embeddings = len(prompts[0])
    with pytest.raises(DataError, match=r"has \d+ tokens, but the model's context holds \d+; shorten it"):
        complete(model, tokenizer, prompts[:1], max_new_tokens=1)


def test_an_empty_prompt_is_refused(model, tokenizer, prompts):
    with pytest.raises(DataError, match="the prompt holds no tokens"):
        complete(model, tokenizer, [prompts[0], []], max_new_tokens=1)


def test_batches_hold_a_prompt_or_more(model, tokenizer, prompts):
    with pytest.raises(ConfigError, match="batch_size is -1; it must be 1 or more"):
        complete(model, tokenizer, prompts, 1, batch_size=-1)


def test_without_an_end_token_no_answer_could_end(model, base, tokenizer, prompts):
    tokenizer.eos_token = None
    base.generation_config = GenerationConfig()
    with pytest.raises(ConfigError, match="no EOS token"):
        complete(model, tokenizer, prompts, max_new_tokens=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        (
            {"temperature": -0.5},
            "temperature is -0.5; it must be 0, which takes the most likely token each time",
        ),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0"),
        ({"temperature": float("inf")}, "or from 0.01 to 100"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0"),
        ({"top_k": -1}, "top_k is -1; it must be 0, which means all tokens, or more"),
        ({"seed": -1}, "seed is -1; it must be from 0 to"),
    ],
)
def test_a_setting_out_of_its_range_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**setting)


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0}, {"temperature": 0, "top_p": 0.5, "seed": 3}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}],
)
def test_nothing_is_drawn_by_default_nor_at_temperature_0(model, tokenizer, prompts, how):
    assert Sampling(**how).is_greedy
    before = torch.get_rng_state()
    first = complete(model, tokenizer, prompts, 8, **how)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == complete(model, tokenizer, prompts, 8)


def test_draws_are_those_of_the_seed_and_leave_the_programs_own_alone(model, tokenizer, prompts):
    before = torch.get_rng_state()
    drawn = [complete(model, tokenizer, prompts, 8, temperature=1, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != complete(model, tokenizer, prompts, 8)


def test_draws_without_a_seed_are_the_programs_own(model, tokenizer, prompts):
    torch.manual_seed(7)
    first, second = (complete(model, tokenizer, prompts, 8, top_p=0.95) for _ in range(2))
    assert first != second
    torch.manual_seed(7)
    assert complete(model, tokenizer, prompts, 8, top_p=0.95) == first


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.01}])
def test_draws_from_one_token_are_greedy(model, tokenizer, prompts, how):
    assert not Sampling(**how).is_greedy
    assert complete(model, tokenizer, prompts, 8, seed=1, **how) == complete(model, tokenizer, prompts, 8)


def test_draws_are_by_the_callers_settings_alone(model, base, tokenizer, prompts):
    expected = complete(model, tokenizer, prompts, 8, temperature=1, seed=1)
    # transformers would fill what is left open from here, and from defaults of its own: top_k 50.
    base.generation_config = GenerationConfig(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, eos_token_id=2)
    assert complete(model, tokenizer, prompts, 8, temperature=1, seed=1) == expected
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        ids = torch.tensor([prompts[1]])
        stock = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 8}
        base.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
        output = base.generate(ids, attention_mask=torch.ones_like(ids), **stock)[0, len(prompts[1]) :].tolist()
    ((own, _),) = decode(model, tokenizer, prompts[1:2], Sampling(8, temperature=1, seed=1))
    assert own == output[: len(own)]


def test_an_answer_says_why_it_ends_and_how_long_it_is(model, base, tokenizer, prompts):
    long = completions(model, tokenizer, prompts[:1], Sampling(12))[0]
    assert (long.num_tokens, long.finish_reason) == (12, "length")
    assert long.seconds > 0
    third = tokenizer(long.text, add_special_tokens=False).input_ids[2]
    base.generation_config = GenerationConfig(eos_token_id=[2, third])
    short = completions(model, tokenizer, prompts[:1], Sampling(12))[0]
    assert short.finish_reason == "stop"
    assert short.num_tokens < 12
