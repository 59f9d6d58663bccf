"""Attention of one token of each sequence to its cache, `attention.c`, on tensors.

Shape suffixes: B sequences, H query heads, K key and value heads, T cached tokens, D head size, V size of a value.
"""

import ctypes

import torch
from torch import Tensor

from expertune.kernels import workspace
from expertune.kernels.native import call
from expertune.kernels.native.structures import SOURCE_KINDS


def attend(query_BH1D: Tensor, key_BKTD: Tensor, value_BKTV: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ key.T) @ value in float32, [B, 1, H, V] of the queries' dtype.

    Args:
        query_BH1D, key_BKTD, value_BKTV: float32 or bfloat16, all the same, H a multiple of K; their last dimensions
            are contiguous.
        scale: of the scores.
    """
    (sequences, heads, _, size), (_, key_heads, tokens, value_size) = query_BH1D.shape, value_BKTV.shape
    out = query_BH1D.new_empty(sequences, 1, heads, value_size)
    scratch = sequences * heads * (-(-tokens // 8) + -(-size // 8)) * 8
    argument = _Attention(
        *(each.data_ptr() for each in (query_BH1D, key_BKTD, value_BKTV, out)),
        workspace.address("attention", scratch),
        *(sequences, heads, key_heads, tokens, size, value_size),
        query_BH1D.stride()[:2],
        key_BKTD.stride()[:3],
        value_BKTV.stride()[:3],
        scale,
        SOURCE_KINDS[query_BH1D.dtype],
        torch.get_num_threads(),
    )
    call("expertune_attend", ctypes.byref(argument))
    return out


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "scratch")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "tokens", "size", "value_size")),
        ("query_strides", ctypes.c_int64 * 2),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("kind", "threads")),
    )
