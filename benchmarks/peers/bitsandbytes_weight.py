"""A matrix of a stack as bitsandbytes' own functions take it: the same bytes, described in its way."""

import functools

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from expertune.kernels.nf4 import Nf4Stack


def bitsandbytes_weight(stack: Nf4Stack, index: int, dtype: torch.dtype) -> tuple[Tensor, bnb.QuantState]:
    """Transposed bytes, as `matmul_4bit` takes them, and their description; decodes to `dtype`."""
    device = stack.packed.device
    inner = bnb.QuantState(
        absmax=stack.nested_absmax[index],
        blocksize=256,
        code=_dynamic_map(device),
        dtype=torch.float32,
    )
    state = bnb.QuantState(
        absmax=stack.absmax[index],
        shape=torch.Size([stack.out_features, stack.in_features]),
        dtype=dtype,
        blocksize=64,
        code=_codebook(device),
        quant_type="nf4",
        offset=stack.offset[index],
        state2=inner,
    )
    return stack.packed[index].reshape(-1, 1).t(), state


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    return bnb.create_dynamic_map().to(device)


@functools.cache
def _codebook(device: torch.device) -> Tensor:
    return bnb.get_4bit_type("nf4", device=device)
