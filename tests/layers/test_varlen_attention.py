"""Variable-length attention: concatenated sequences see nothing of each other, and everything else is stock sdpa's."""

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertune.data import PaddingFreeCollator
from expertune.errors import UnsupportedModelError
from expertune.layers.varlen_attention import (
    NAME,
    SHORT_SEQUENCE,
    _flash_takes,
    check_varlen,
    require_no_leakage,
    sequence_lengths,
    use_sdpa_attention,
    use_varlen_attention,
    varlen_attention,
)
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_config

LENGTHS = [5, 1, 9, 2]
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def pair(family: str = "mixtral", **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """One model twice: with variable-length attention, and as stock transformers does."""
    stock = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="sdpa").eval()
    varlen = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="sdpa").eval()
    varlen.load_state_dict(stock.state_dict())
    assert use_varlen_attention(varlen)
    assert varlen.config._attn_implementation == NAME
    return varlen, stock


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
        first = varlen(input_ids=ids[:, :5], use_cache=True)
        rest = varlen(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
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
def test_sequences_begin_where_positions_restart(positions: list[int], lengths: list[int]) -> None:
    assert sequence_lengths(torch.tensor([positions])) == lengths


def test_model_without_sdpa_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager")
    assert not use_varlen_attention(model)
    assert model.config._attn_implementation == "eager"


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 1, 2, tokens, 8)
    return query, key, value


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


def collated(lengths: list[int]) -> dict[str, Any]:
    """The collator's batch of random sequences."""
    sequences = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]
    return PaddingFreeCollator()(
        [{"input_ids": sequence, "labels": sequence, "example_ids": [0]} for sequence in sequences]
    )


def without_bounds(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids", "use_cache")}


@pytest.fixture
def positions_read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Position ids that sequences were looked for in."""
    read: list[Tensor] = []

    def look(position_ids: Tensor) -> list[int]:
        read.append(position_ids)
        return sequence_lengths(position_ids)

    monkeypatch.setattr("expertune.layers.varlen_attention.sequence_lengths", look)
    return read


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **FLOAT32, msg=lambda text, name=name: f"{name}: {text}")


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


def plain_varlen(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, bounds: Tensor, scale: float | None, left: int
) -> Tensor:
    """Causal attention inside each sequence, over the token and `left` tokens before it (-1: all), by definition."""
    groups = query_THD.shape[1] // key_TKD.shape[1]
    key_THD, value_THD = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_TKD, value_TKD))
    scale = query_THD.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        query, key, value = (tensor[start:end].float() for tensor in (query_THD, key_THD, value_THD))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        unseen = (distance < 0) | ((distance > left) if left >= 0 else torch.tensor(False))
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(outputs).to(query_THD.dtype)


# `varlen_attn` of three releases of torch: the signature of each, and plain arithmetic behind it.


def torch_2_10(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal=False) -> Tensor:
    assert is_causal
    assert q.shape == k.shape == v.shape
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == cu_seq_q.diff().max()
    return plain_varlen(q, k, v, cu_seq_q, None, -1)


def torch_2_11(
    q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale=None, window_size=(-1, -1)
) -> Tensor:
    assert window_size[1] == 0, "not causal"
    assert q.shape == k.shape == v.shape
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    return plain_varlen(q, k, v, cu_seq_q, scale, window_size[0])


def torch_2_12(
    q: Any,
    k: Any,
    v: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
) -> Tensor:
    assert window_size[1] == 0, "not causal"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return plain_varlen(q, k, v, cu_seq_q, scale, window_size[0])


@pytest.fixture(params=[torch_2_10, torch_2_11, torch_2_12], ids=lambda release: release.__name__)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[int]]:
    """A release's `varlen_attn` in plain arithmetic, on this CPU; and the number of tokens of each call."""
    calls: list[int] = []

    def called(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[0])
        return request.param(query, *args, **kwargs)

    called.__signature__ = inspect.signature(request.param)
    monkeypatch.setattr("expertune.layers.varlen_attention.varlen_attn", called)
    monkeypatch.setattr("expertune.layers.varlen_attention._flash_takes", lambda *tensors: True)
    return request.param.__name__, calls


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sequences_in_one_call_give_what_stock_sdpa_gives(
    family: str, given: bool, release: tuple[str, list[int]]
) -> None:
    varlen, stock = pair(family)
    batch = collated(LENGTHS)
    ours = loss_and_gradients(varlen, batch if given else without_bounds(batch))
    # granitemoe has a scale of its own, torch 2.10 only one.
    can = (release[0], family) != ("torch_2_10", "granitemoe")
    assert release[1] == [sum(LENGTHS)] * varlen.config.num_hidden_layers * can
    assert_same(ours, loss_and_gradients(stock, without_bounds(batch)))


@pytest.mark.parametrize("lengths", [[11, 7, 1], [13]])
@pytest.mark.parametrize("window", [1, 4, 10])
def test_sliding_window_is_part_of_the_one_call(
    window: int, lengths: list[int], release: tuple[str, list[int]]
) -> None:
    varlen, stock = pair(sliding_window=window)
    batch = collated(lengths)
    assert_same(loss_and_gradients(varlen, batch), loss_and_gradients(stock, without_bounds(batch)))
    # torch 2.10 has no window.
    assert len(release[1]) == (0 if release[0] == "torch_2_10" else varlen.config.num_hidden_layers)


def test_window_that_a_family_keeps_to_its_mask_is_left_to_the_mask(release: tuple[str, list[int]]) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    varlen, stock = pair("qwen2_moe", **windows)
    batch = collated([11, 7])
    assert_same(loss_and_gradients(varlen, batch), loss_and_gradients(stock, without_bounds(batch)))
    assert len(release[1]) == varlen.config.layer_types.count("full_attention") == 1


def attend(scaling: float | None = None, **kwargs: Any) -> Tensor:
    """[1, 8, 2, 8]: sequences of 5 and 3 tokens; the same random numbers each time."""
    torch.manual_seed(0)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 5, 8], dtype=torch.int32), "max_length_q": 5}
    return varlen_attention(nn.Identity(), *heads(8), None, scaling=scaling, **bounds, **kwargs)[0]


@pytest.mark.parametrize("scaling", [None, 8**-0.5, 0.3])
def test_scale_is_the_familys(scaling: float | None, release: tuple[str, list[int]]) -> None:
    torch.manual_seed(0)
    sequences = zip(*(tensor.split([5, 3], dim=2) for tensor in heads(8)), strict=True)
    expected = torch.cat(
        [F.scaled_dot_product_attention(*each, is_causal=True, scale=scaling) for each in sequences], dim=2
    )
    torch.testing.assert_close(attend(scaling), expected.transpose(1, 2), **FLOAT32)
    # torch 2.10 has one scale only.
    assert len(release[1]) == (0 if (release[0], scaling) == ("torch_2_10", 0.3) else 1)


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


@pytest.mark.parametrize("term", [{"dropout": 0.5}, {"is_causal": False}])
def test_what_one_call_cannot_do_goes_one_sequence_at_a_time(
    term: dict[str, Any], release: tuple[str, list[int]]
) -> None:
    torch.manual_seed(0)
    query, key, value = heads(8)
    sequences = zip(*(tensor.split([5, 3], dim=2) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([sdpa_attention_forward(nn.Identity(), *each, None, **term)[0] for each in sequences], dim=1)
    torch.testing.assert_close(attend(**term), expected, **FLOAT32)
    assert not release[1]


def test_autocast_holds_for_the_one_call_too(release: tuple[str, list[int]]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attend().dtype == torch.bfloat16
    assert release[1] == [8]


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


KEYS_AND_VALUES = pytest.mark.parametrize(("num_key_heads", "value_size"), [(4, 16), (2, 16), (4, 8)])


def attend_fake(
    device: str, num_key_heads: int, value_size: int, dtype: torch.dtype, requires_grad: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Output, and queries, keys and values, of 17 tokens; with lengths given, and positions that nobody may look at.

    Fake tensors refuse to show a value: whatever would wait for a device raises.
    """
    tensors = [
        torch.empty(1, 17, number, size, device=device, dtype=dtype, requires_grad=requires_grad)
        for number, size in ((4, 16), (num_key_heads, 16), (num_key_heads, value_size))
    ]
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    positions = torch.empty(1, 17, device=device, dtype=torch.int64)
    bounds = torch.empty(5, device=device, dtype=torch.int32)
    terms = {"cu_seq_lens_q": bounds, "max_length_q": 9, "scaling": 0.25}
    return varlen_attention(nn.Identity(), query, key, value, None, positions, **terms)[0], tensors


@KEYS_AND_VALUES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_a_layer_is_one_operator_and_waits_for_nothing(
    dtype: torch.dtype, num_key_heads: int, value_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asks the GPU's driver, which a fake device has not.
    monkeypatch.setattr("expertune.layers.varlen_attention.can_use_flash_attention", lambda params: True)
    with FakeTensorMode(), Operators() as operators:
        output, _ = attend_fake("cuda", num_key_heads, value_size, dtype)
    assert (output.shape, output.dtype, output.device.type) == ((1, 17, 4, value_size), dtype, "cuda")
    assert operators.names.count("torch_attn._varlen_attn.default") == 1
    assert not [name for name in operators.names if "scaled_dot_product" in name or "_local_scalar_dense" in name]


@KEYS_AND_VALUES
def test_backward_is_one_operator_and_waits_for_nothing(
    num_key_heads: int, value_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autograd knows no device that this torch was not built for, a fake one either.
    monkeypatch.setattr("expertune.layers.varlen_attention._flash_takes", lambda *tensors: True)
    with FakeTensorMode(), Operators() as operators:
        output, tensors = attend_fake("cpu", num_key_heads, value_size, torch.bfloat16, requires_grad=True)
        output.sum().backward()
    for tensor in tensors:
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, torch.bfloat16)
    assert operators.names.count("torch_attn._varlen_attn.default") == 1
    assert operators.names.count("torch_attn._varlen_attn_backward.default") == 1
    assert not [name for name in operators.names if "scaled_dot_product" in name or "_local_scalar_dense" in name]


@pytest.mark.parametrize(
    ("device", "key_dtype", "size", "by_torch", "taken"),
    [
        ("cuda", torch.bfloat16, 16, True, True),
        ("cuda", torch.bfloat16, 16, False, False),
        ("cuda", torch.bfloat16, 12, True, False),
        ("cuda", torch.float32, 16, True, False),
        ("cpu", torch.bfloat16, 16, True, False),
    ],
)
def test_one_call_is_for_what_flash_attention_takes(
    device: str, key_dtype: torch.dtype, size: int, by_torch: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertune.layers.varlen_attention.can_use_flash_attention", lambda params: by_torch)
    with FakeTensorMode():
        query = torch.empty(1, 2, 5, size, device=device, dtype=torch.bfloat16)
        key = torch.empty(1, 2, 5, size, device=device, dtype=key_dtype)
        assert _flash_takes(query, key, key) == taken


@pytest.mark.parametrize("release", [torch_2_11, torch_2_12], indirect=True, ids=lambda release: release.__name__)
def test_check_finds_one_call_and_sequences_alike(release: tuple[str, list[int]]) -> None:
    assert 0 < check_varlen("cpu") < 0.02
    assert len(release[1]) == 4


def test_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertune.layers.varlen_attention._flash_takes", lambda *tensors: True)

    def one_sequence(q, k, v, cu_seq_q, *args: Any, enable_gqa=False, scale=None, window_size=(-1, -1)) -> Tensor:
        return plain_varlen(q, k, v, cu_seq_q[[0, -1]], scale, window_size[0])

    monkeypatch.setattr("expertune.layers.varlen_attention.varlen_attn", one_sequence)
    assert check_varlen("cpu") > 0.1

    def not_a_number(*args: Any, **terms: Any) -> Tensor:
        return one_sequence(*args, **terms) * math.nan

    not_a_number.__signature__ = inspect.signature(one_sequence)
    monkeypatch.setattr("expertune.layers.varlen_attention.varlen_attn", not_a_number)
    assert math.isnan(check_varlen("cpu"))


def test_check_says_where_there_is_nothing_to_check() -> None:
    with pytest.raises(RuntimeError, match="has no variable-length attention on cpu"):
        check_varlen("cpu")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "phimoe"])
def test_model_that_keeps_sequences_apart_passes_and_is_left_as_it_was(family: str) -> None:
    varlen, _ = pair(family)
    require_no_leakage(varlen)
    assert all(parameter.grad is None for parameter in varlen.parameters())
    assert varlen.get_input_embeddings()(torch.tensor([[3]])).grad_fn is not None


def test_frozen_model_can_be_tried(varlen_and_a_state: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    varlen, mixing = varlen_and_a_state
    for model in varlen_and_a_state:
        model.requires_grad_(False)
    with torch.no_grad():
        require_no_leakage(varlen)
        with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM does not keep .* apart.*packing=padded"):
            require_no_leakage(mixing)


@pytest.fixture
def varlen_and_a_state() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model without leakage, and the same with a layer that hands each token a little of the one before it."""
    varlen, _ = pair()
    mixing, _ = pair()

    def carry(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output + 1e-3 * output.roll(1, dims=1)

    mixing.model.layers[0].mlp.register_forward_hook(carry)
    return varlen, mixing


def test_sequences_that_mix_a_little_in_bfloat16_are_found(
    varlen_and_a_state: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    varlen, mixing = (model.to(torch.bfloat16) for model in varlen_and_a_state)
    require_no_leakage(varlen)
    with pytest.raises(UnsupportedModelError, match="does not keep concatenated sequences apart"):
        require_no_leakage(mixing)


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
