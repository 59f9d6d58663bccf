"""Attention over concatenated rows that costs per row, not per square of the batch.

transformers keeps attention inside each row of a concatenated batch by a mask of [T, T]: right, but every token is
multiplied with every other. Here each row goes through scaled-dot-product attention by itself, with no mask at all.
Registered through transformers' own attention interface; generation and padded batches take transformers' sdpa path.

Shape suffixes: H heads, T tokens of all rows, D head size.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from expertune.errors import UnsupportedModelError

NAME = "expertune_rows"

# Terms that some families add inside the attention and that are laid out over the whole batch.
_BATCH_WIDE = ("position_bias", "softcap", "s_aux", "cache")


def attend_by_row(model: PreTrainedModel) -> bool:
    """Switch a model to attention by row; False where its family has no scaled-dot-product attention to switch."""
    if not getattr(model, "_supports_sdpa", False) or model.config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation(NAME)
    return True


def rows_attention(
    module: nn.Module,
    query_HTD: Tensor,
    key_HTD: Tensor,
    value_HTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, T, D] queries, keys and values -> [1, T, H, D].

    Rows begin where `position_ids` [1, T] is 0. With a mask, a cache or more than one batch row this is transformers'
    own sdpa.

    Raises:
        UnsupportedModelError: the family does not say where rows begin, or adds terms over the whole batch.
    """
    tokens = query_HTD.shape[2]
    if attention_mask is not None or query_HTD.shape[0] != 1 or key_HTD.shape[2] != tokens or tokens == 1:
        return sdpa_attention_forward(module, query_HTD, key_HTD, value_HTD, attention_mask, **kwargs)
    if position_ids is None or any(kwargs.get(term) is not None for term in _BATCH_WIDE):
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot attend row by row; set data.packing=padded to train this model"
        )
    lengths = row_lengths(position_ids)
    if len(lengths) == 1:
        return sdpa_attention_forward(module, query_HTD, key_HTD, value_HTD, None, **kwargs)
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query_HTD, key_HTD, value_HTD)), strict=True)
    outputs = [sdpa_attention_forward(module, query, key, value, None, **kwargs)[0] for query, key, value in rows]
    return torch.cat(outputs, dim=1), None


def row_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each row of a concatenated batch, from `position_ids` [1, T] that restart at 0."""
    starts = (position_ids.reshape(-1) == 0).nonzero().reshape(-1)
    # A batch whose first token is not at 0 continues a row; it is one all the same.
    bounds = [0, *(start for start in starts.tolist() if start), position_ids.numel()]
    return [end - start for start, end in pairwise(bounds)]


def rows_mask(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> Tensor | None:
    """transformers' mask function: none where rows are attended to one by one, else sdpa's own."""
    plain = attention_mask is None and not use_vmap and kwargs.get("local_size") is None
    if plain and kwargs["q_length"] == kwargs["kv_length"] and kwargs["batch_size"] == 1:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs)


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, rows_mask)
