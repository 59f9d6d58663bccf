"""Tiny models with variable-length attention beside stock ones, and batches of concatenated sequences."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertune.data import PaddingFreeCollator
from expertune.layers.varlen_attention import NAME, use_varlen_attention
from tests.tiny_models import VOCABULARY, tiny_config

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


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values [1, 2, T, 8]."""
    query, key, value = torch.randn(3, 1, 2, tokens, 8)
    return query, key, value


def collated(lengths: list[int]) -> dict[str, Any]:
    """The collator's batch of random sequences."""
    sequences = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]
    return PaddingFreeCollator()(
        [{"input_ids": sequence, "labels": sequence, "example_ids": [0]} for sequence in sequences]
    )


def without_bounds(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids", "use_cache")}


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
