"""All sequences in one call of torch's variable-length attention: what stock sdpa gives, and nothing waits for it."""

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from expertune.layers.varlen_attention import _flash_takes, check_varlen, varlen_attention
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
from tests.tiny_models import FAMILIES


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


@pytest.fixture(params=[torch_2_11, torch_2_12], ids=lambda release: release.__name__)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call of a release's `varlen_attn`, which is plain arithmetic on this CPU."""
    calls: list[int] = []

    def called(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[0])
        return request.param(query, *args, **kwargs)

    called.__signature__ = inspect.signature(request.param)
    monkeypatch.setattr("expertune.layers.varlen_attention.varlen_attn", called)
    monkeypatch.setattr("expertune.layers.varlen_attention._flash_takes", lambda *tensors: True)
    return calls


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sequences_in_one_call_give_what_stock_sdpa_gives(family: str, given: bool, calls: list[int]) -> None:
    varlen, stock = pair(family)
    batch = collated(LENGTHS)
    ours = loss_and_gradients(varlen, batch if given else without_bounds(batch))
    assert calls == [sum(LENGTHS)] * varlen.config.num_hidden_layers
    assert_same(ours, loss_and_gradients(stock, without_bounds(batch)))


@pytest.mark.parametrize("lengths", [[11, 7, 1], [13]])
@pytest.mark.parametrize("window", [1, 4, 10])
def test_sliding_window_is_part_of_the_one_call(window: int, lengths: list[int], calls: list[int]) -> None:
    varlen, stock = pair(sliding_window=window)
    batch = collated(lengths)
    assert_same(loss_and_gradients(varlen, batch), loss_and_gradients(stock, without_bounds(batch)))
    assert len(calls) == varlen.config.num_hidden_layers


def test_window_that_a_family_keeps_to_its_mask_is_left_to_the_mask(calls: list[int]) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    varlen, stock = pair("qwen2_moe", **windows)
    batch = collated([11, 7])
    assert_same(loss_and_gradients(varlen, batch), loss_and_gradients(stock, without_bounds(batch)))
    assert len(calls) == varlen.config.layer_types.count("full_attention") == 1


def attend(scaling: float | None = None, **kwargs: Any) -> Tensor:
    """[1, 8, 2, 8]: sequences of 5 and 3 tokens; the same random numbers each time."""
    torch.manual_seed(0)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 5, 8], dtype=torch.int32), "max_length_q": 5}
    return varlen_attention(nn.Identity(), *heads(8), None, scaling=scaling, **bounds, **kwargs)[0]


@pytest.mark.parametrize("scaling", [None, 8**-0.5, 0.3])
def test_scale_is_the_familys(scaling: float | None, calls: list[int]) -> None:
    torch.manual_seed(0)
    sequences = zip(*(tensor.split([5, 3], dim=2) for tensor in heads(8)), strict=True)
    expected = torch.cat(
        [F.scaled_dot_product_attention(*each, is_causal=True, scale=scaling) for each in sequences], dim=2
    )
    torch.testing.assert_close(attend(scaling), expected.transpose(1, 2), **FLOAT32)
    assert len(calls) == 1


@pytest.mark.parametrize("term", [{"dropout": 0.5}, {"is_causal": False}])
def test_what_one_call_cannot_do_goes_one_sequence_at_a_time(term: dict[str, Any], calls: list[int]) -> None:
    torch.manual_seed(0)
    query, key, value = heads(8)
    sequences = zip(*(tensor.split([5, 3], dim=2) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([sdpa_attention_forward(nn.Identity(), *each, None, **term)[0] for each in sequences], dim=1)
    torch.testing.assert_close(attend(**term), expected, **FLOAT32)
    assert not calls


def test_autocast_holds_for_the_one_call_too(calls: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attend().dtype == torch.bfloat16
    assert calls == [8]


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


def test_check_finds_one_call_and_sequences_alike(calls: list[int]) -> None:
    assert 0 < check_varlen("cpu") < 0.02
    assert len(calls) == 4


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
