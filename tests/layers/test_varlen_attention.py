"""Variable-length attention: concatenated sequences see nothing of each other, and everything else is stock sdpa's."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, MixtralForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertune.errors import UnsupportedModelError
from expertune.generation.cache import cache_argument
from expertune.layers.varlen_attention import (
    SHORT_SEQUENCE,
    require_no_leakage,
    sequence_lengths,
    use_sdpa_attention,
    use_varlen_attention,
    varlen_attention,
)
from tests.layers.concatenated import (
    FLOAT32,
    LENGTHS,
    assert_same,
    collated,
    heads,
    loss_and_gradients,
    pair,
    without_bounds,
)
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_config


def concatenated(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and position ids [1, T] of sequences one behind the other."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.randint(3, VOCABULARY, positions.shape), positions


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe"])
def test_concatenated_sequences_give_what_each_sequence_gives_alone(family: str) -> None:
    varlen, stock = pair(family)
    ids, positions = concatenated(LENGTHS)
    with torch.no_grad():
        together = varlen(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [stock(input_ids=sequence, use_cache=False).logits for sequence in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), **FLOAT32)


def test_concatenated_sequences_give_what_stock_sdpa_gives_with_its_mask() -> None:
    varlen, stock = pair()
    ids, positions = concatenated(LENGTHS)
    with torch.no_grad():
        ours = varlen(input_ids=ids, position_ids=positions, use_cache=False).logits
        theirs = stock(input_ids=ids, position_ids=positions, use_cache=False).logits
        whole = stock(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, **FLOAT32)
    assert not torch.allclose(theirs, whole, atol=1e-3), "the sequences must matter for this to say anything"


def gradients(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_stock_sdpa_with_its_mask(checkpointing: bool) -> None:
    varlen, stock = pair()
    ids, positions = concatenated(LENGTHS)
    varlen.train()
    if checkpointing:
        varlen.gradient_checkpointing_enable({"use_reentrant": False})
    ours, theirs = gradients(varlen, ids, positions), gradients(stock.train(), ids, positions)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **FLOAT32, msg=lambda text, name=name: f"{name}: {text}")


def test_sliding_window_holds_inside_each_sequence() -> None:
    varlen, stock = pair(sliding_window=4)
    ids, positions = concatenated([11, 7])
    with torch.no_grad():
        ours = varlen(input_ids=ids, position_ids=positions, use_cache=False).logits
        theirs = stock(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [stock(input_ids=sequence, use_cache=False).logits for sequence in ids.split([11, 7], dim=1)]
    torch.testing.assert_close(ours, theirs, **FLOAT32)
    torch.testing.assert_close(ours, torch.cat(alone, dim=1), **FLOAT32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_padded_batches_give_stock_logits_where_there_are_tokens(side: str, num_sequences: int) -> None:
    varlen, stock = pair()
    mask = torch.zeros(num_sequences, 10, dtype=torch.int64)
    for sequence, length in enumerate([6, 10, 1][:num_sequences]):
        mask[sequence, slice(10 - length, 10) if side == "left" else slice(0, length)] = 1
    ids = torch.randint(3, VOCABULARY, (num_sequences, 10)) * mask
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (varlen, stock))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **FLOAT32)


@pytest.mark.parametrize("num_sequences", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_batches_give_stock_logits(num_sequences: int, masked: bool) -> None:
    varlen, stock = pair()
    ids = torch.randint(3, VOCABULARY, (num_sequences, 9))
    mask = torch.ones_like(ids) if masked else None
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (varlen, stock))
    torch.testing.assert_close(ours, theirs, **FLOAT32)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_gives_stock_tokens(use_cache: bool, padded: bool) -> None:
    varlen, stock = pair()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    answers = [
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache
        )
        for model in (varlen, stock)
    ]
    assert torch.equal(*answers)


def test_continuing_from_a_cache_gives_stock_logits() -> None:
    varlen, stock = pair()
    ids = torch.randint(3, VOCABULARY, (1, 8))
    with torch.no_grad():
        whole = stock(input_ids=ids, use_cache=False).logits
        cache = {cache_argument(varlen): DynamicCache(config=varlen.config)}
        parts = [varlen(input_ids=part, **cache).logits for part in (ids[:, :5], ids[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **FLOAT32)


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([0, 1, 2], [3]),
        ([0, 1, 0, 1, 2, 0], [2, 3, 1]),
        ([0], [1]),
        ([0, 0, 0], [1, 1, 1]),
        ([4, 5, 0, 1], [2, 2]),
        ([4, 5, 6], [3]),
    ],
)
def test_sequences_begin_where_positions_restart(positions: list[int], lengths: list[int]) -> None:
    assert sequence_lengths(torch.tensor([positions])) == lengths


def test_model_without_sdpa_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager")
    assert not use_varlen_attention(model)
    assert model.config._attn_implementation == "eager"


def test_family_that_does_not_say_where_sequences_begin_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Identity cannot attend to one sequence at a time; set data\.packing=padded"
    ):
        varlen_attention(nn.Identity(), *heads(6), None, position_ids=None)


def test_family_with_terms_over_the_whole_batch_is_refused() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(UnsupportedModelError, match="cannot attend to one sequence at a time"):
        varlen_attention(nn.Identity(), *heads(6), None, position_ids=positions, position_bias=torch.zeros(1, 2, 6, 6))


def test_every_head_size_and_grouping_is_split_along_tokens() -> None:
    varlen, stock = pair(num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    ids, positions = concatenated(LENGTHS)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (varlen, stock))
    torch.testing.assert_close(ours, theirs, **FLOAT32)


def test_scores_grow_with_the_number_of_sequences_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[int] = []

    def count(module: nn.Module, query: Tensor, key: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        scores.append(query.shape[2] * key.shape[2])
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    monkeypatch.setattr("expertune.layers.varlen_attention.sdpa_attention_forward", count)
    varlen, _ = pair()
    taken = []
    for num_sequences in (1, 2, 16):
        ids, positions = concatenated([6] * num_sequences)
        scores.clear()
        with torch.no_grad():
            varlen(input_ids=ids, position_ids=positions, use_cache=False)
        taken.append(sum(scores))
    one = varlen.config.num_hidden_layers * 6 * 6
    assert taken == [one, 2 * one, 16 * one]


@pytest.fixture
def positions_read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Position ids that sequences were looked for in."""
    read: list[Tensor] = []

    def look(position_ids: Tensor) -> list[int]:
        read.append(position_ids)
        return sequence_lengths(position_ids)

    monkeypatch.setattr("expertune.layers.varlen_attention.sequence_lengths", look)
    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_given_lengths_are_the_sequences_and_positions_are_not_read(family: str, positions_read: list[Tensor]) -> None:
    varlen, stock = pair(family)
    batch = collated(LENGTHS)
    given = loss_and_gradients(varlen, batch)
    assert not positions_read
    assert_same(given, loss_and_gradients(varlen, without_bounds(batch)))
    assert positions_read
    assert_same(given, loss_and_gradients(stock, without_bounds(batch)))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_given_lengths_reach_recomputed_layers(positions_read: list[Tensor]) -> None:
    varlen, stock = pair()
    varlen.train()
    varlen.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collated(LENGTHS)
    assert_same(loss_and_gradients(varlen, batch), loss_and_gradients(stock.train(), without_bounds(batch)))
    assert not positions_read


def test_bounds_alone_are_enough(positions_read: list[Tensor]) -> None:
    varlen, _ = pair()
    batch = collated(LENGTHS)
    alone = {name: value for name, value in batch.items() if not name.startswith("max_length")}
    with torch.no_grad():
        torch.testing.assert_close(varlen(**alone).logits, varlen(**batch).logits, **FLOAT32)
    assert not positions_read


def test_positions_are_read_once_for_all_layers_of_a_batch(positions_read: list[Tensor]) -> None:
    varlen, stock = pair()
    batch = without_bounds(collated([5, 4]))
    with torch.no_grad():
        varlen(**batch)
        assert len(positions_read) == 1
        batch["position_ids"].copy_(torch.tensor([[*range(2), *range(7)]]))
        torch.testing.assert_close(varlen(**batch).logits, stock(**batch).logits, **FLOAT32)
    assert len(positions_read) == 2


class StrictMixtral(MixtralForCausalLM):
    """A forward that takes what it names and no more, as code that ships with a model may have it."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, use_cache: bool = False) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=use_cache)


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_that_would_refuse_the_lengths_does_not_see_them(attention: str, adapted: bool) -> None:
    config = tiny_config()
    config._attn_implementation = attention
    model = StrictMixtral(config).eval()
    batch = collated(LENGTHS)
    with torch.no_grad():
        expected = model(**without_bounds(batch)).logits
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        model(**batch)
    assert use_varlen_attention(model) == (attention == "sdpa")
    called = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model
    with torch.no_grad():
        torch.testing.assert_close(called(**batch).logits, expected, **FLOAT32)


def test_window_wider_than_every_sequence_costs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen, stock = pair(sliding_window=9)
    batch = collated(LENGTHS)
    masks: list[object] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **kwargs: Any) -> Any:
        masks.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    with torch.no_grad():
        theirs = stock(**without_bounds(batch)).logits
        monkeypatch.setattr("expertune.layers.varlen_attention.sdpa_attention_forward", record)
        torch.testing.assert_close(varlen(**batch).logits, theirs, **FLOAT32)
    assert masks == [None] * len(LENGTHS) * varlen.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_sequences_in_16_bits_attend_in_float32_and_are_rounded_once(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in heads(SHORT_SEQUENCE + 8)]
    lengths = [SHORT_SEQUENCE, 8]
    bounds = {"cu_seq_lens_q": torch.tensor([0, SHORT_SEQUENCE, SHORT_SEQUENCE + 8]), "max_length_q": SHORT_SEQUENCE}
    sequences = zip(*(tensor.float().split(lengths, dim=2) for tensor in tensors), strict=True)
    exact = torch.cat([F.scaled_dot_product_attention(*sequence, is_causal=True) for sequence in sequences], dim=2)
    output, _ = varlen_attention(nn.Identity(), *tensors, None, **bounds)
    torch.testing.assert_close(output, exact.transpose(1, 2).to(dtype), rtol=0, atol=0)


def test_longer_sequences_attend_in_their_own_dtype() -> None:
    longer = SHORT_SEQUENCE + 1
    tensors = [tensor.bfloat16() for tensor in heads(longer)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, longer]), "max_length_q": longer}
    output, _ = varlen_attention(nn.Identity(), *tensors, None, **bounds)
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=0, atol=0)


def test_layers_that_choose_tokens_by_the_mask_keep_their_mask() -> None:
    model, _ = pair()
    model.set_attn_implementation("sdpa")
    model.config.layer_types = ["full_attention", "indexed_attention"]
    assert not use_varlen_attention(model)
    assert model.config._attn_implementation == "sdpa"
    require_no_leakage(model)


def test_padded_batches_go_back_to_transformers_own_attention() -> None:
    varlen, stock = pair()
    use_sdpa_attention(varlen)
    assert varlen.config._attn_implementation == "sdpa"
    ids, mask = torch.randint(3, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        given = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (varlen, stock)]
    assert torch.equal(*given)
