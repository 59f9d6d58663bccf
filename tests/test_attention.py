"""Attention by row: concatenated rows see nothing of each other, and everything else is stock sdpa's."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertune.attention import NAME, attend_by_row, row_lengths, rows_attention
from expertune.errors import UnsupportedModelError
from tests.tiny_models import VOCABULARY, tiny_config

LENGTHS = [5, 1, 9, 2]
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def pair(family: str = "mixtral", **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """One model twice: attending by row, and as stock transformers does."""
    stock = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="sdpa").eval()
    by_row = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="sdpa").eval()
    by_row.load_state_dict(stock.state_dict())
    assert attend_by_row(by_row)
    assert by_row.config._attn_implementation == NAME
    return by_row, stock


def concatenated(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and position ids [1, T] of rows one behind the other."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return torch.randint(3, VOCABULARY, positions.shape), positions


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe"])
def test_concatenated_rows_give_what_each_row_gives_alone(family: str) -> None:
    by_row, stock = pair(family)
    ids, positions = concatenated(LENGTHS)
    with torch.no_grad():
        together = by_row(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [stock(input_ids=row, use_cache=False).logits for row in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), **FLOAT32)


def test_concatenated_rows_give_what_stock_sdpa_gives_with_its_mask() -> None:
    by_row, stock = pair()
    ids, positions = concatenated(LENGTHS)
    with torch.no_grad():
        ours = by_row(input_ids=ids, position_ids=positions, use_cache=False).logits
        theirs = stock(input_ids=ids, position_ids=positions, use_cache=False).logits
        whole = stock(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, **FLOAT32)
    assert not torch.allclose(theirs, whole, atol=1e-3), "the rows must matter for this to say anything"


def gradients(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_stock_sdpa_with_its_mask(checkpointing: bool) -> None:
    by_row, stock = pair()
    ids, positions = concatenated(LENGTHS)
    by_row.train()
    if checkpointing:
        by_row.gradient_checkpointing_enable({"use_reentrant": False})
    ours, theirs = gradients(by_row, ids, positions), gradients(stock.train(), ids, positions)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **FLOAT32, msg=lambda text, name=name: f"{name}: {text}")


def test_sliding_window_holds_inside_each_row() -> None:
    by_row, stock = pair(sliding_window=4)
    ids, positions = concatenated([11, 7])
    with torch.no_grad():
        ours = by_row(input_ids=ids, position_ids=positions, use_cache=False).logits
        theirs = stock(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = [stock(input_ids=row, use_cache=False).logits for row in ids.split([11, 7], dim=1)]
    torch.testing.assert_close(ours, theirs, **FLOAT32)
    torch.testing.assert_close(ours, torch.cat(alone, dim=1), **FLOAT32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_padded_batches_give_stock_logits_where_there_are_tokens(side: str, num_rows: int) -> None:
    by_row, stock = pair()
    mask = torch.zeros(num_rows, 10, dtype=torch.int64)
    for row, length in enumerate([6, 10, 1][:num_rows]):
        mask[row, slice(10 - length, 10) if side == "left" else slice(0, length)] = 1
    ids = torch.randint(3, VOCABULARY, (num_rows, 10)) * mask
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (by_row, stock))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **FLOAT32)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_batches_give_stock_logits(num_rows: int, masked: bool) -> None:
    by_row, stock = pair()
    ids = torch.randint(3, VOCABULARY, (num_rows, 9))
    mask = torch.ones_like(ids) if masked else None
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (by_row, stock))
    torch.testing.assert_close(ours, theirs, **FLOAT32)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_gives_stock_tokens(use_cache: bool, padded: bool) -> None:
    by_row, stock = pair()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    answers = [
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache
        )
        for model in (by_row, stock)
    ]
    assert torch.equal(*answers)


def test_continuing_from_a_cache_gives_stock_logits() -> None:
    by_row, stock = pair()
    ids = torch.randint(3, VOCABULARY, (1, 8))
    with torch.no_grad():
        whole = stock(input_ids=ids, use_cache=False).logits
        first = by_row(input_ids=ids[:, :5], use_cache=True)
        rest = by_row(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, **FLOAT32)


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
def test_rows_begin_where_positions_restart(positions: list[int], lengths: list[int]) -> None:
    assert row_lengths(torch.tensor([positions])) == lengths


def test_model_without_sdpa_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager")
    assert not attend_by_row(model)
    assert model.config._attn_implementation == "eager"


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 1, 2, tokens, 8)
    return query, key, value


def test_family_that_does_not_say_where_rows_begin_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Identity cannot attend row by row; set data\.packing=padded"):
        rows_attention(nn.Identity(), *heads(6), None, position_ids=None)


def test_family_with_terms_over_the_whole_batch_is_refused() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(UnsupportedModelError, match="cannot attend row by row"):
        rows_attention(nn.Identity(), *heads(6), None, position_ids=positions, position_bias=torch.zeros(1, 2, 6, 6))


def test_every_head_size_and_grouping_is_split_along_tokens() -> None:
    by_row, stock = pair(num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    ids, positions = concatenated(LENGTHS)
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (by_row, stock))
    torch.testing.assert_close(ours, theirs, **FLOAT32)


def test_scores_grow_with_the_number_of_rows_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[int] = []

    def count(module: nn.Module, query: Tensor, key: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        scores.append(query.shape[2] * key.shape[2])
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    monkeypatch.setattr("expertune.attention.sdpa_attention_forward", count)
    by_row, _ = pair()
    taken = []
    for num_rows in (1, 2, 16):
        ids, positions = concatenated([6] * num_rows)
        scores.clear()
        with torch.no_grad():
            by_row(input_ids=ids, position_ids=positions, use_cache=False)
        taken.append(sum(scores))
    one = by_row.config.num_hidden_layers * 6 * 6
    assert taken == [one, 2 * one, 16 * one]
