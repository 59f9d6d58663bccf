"""Random NF4 weights, made where they are needed: bytes, never a 16-bit copy of a model.

Codes are uniform and scales lie around one value, so that a matrix of K columns keeps the size of what it multiplies:
activations neither vanish nor explode through any number of layers.
"""

import torch
from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from expertune.kernels.nf4 import Nf4Stack
from expertune.kernels.nf4.reference import NF4_CODEBOOK

# Root of the mean square of the codebook: of a weight whose code is uniform and whose scale is one.
_CODE_SIZE = (sum(value * value for value in NF4_CODEBOOK) / len(NF4_CODEBOOK)) ** 0.5


@torch.no_grad()
def fill(stack: Nf4Stack) -> None:
    """Random bytes in place, scales spread by a quarter around 1 / sqrt(K)."""
    size = stack.in_features**-0.5 / _CODE_SIZE
    stack.packed.random_(0, 256)
    if stack.double_quantization:
        stack.absmax.random_(0, 256)
        stack.nested_absmax.fill_(size / 4)
        stack.offset.fill_(size)
    else:
        stack.absmax.uniform_(0.75 * size, 1.25 * size)


def by_decoding_first(layer: Layer, hidden: Tensor, weights: Tensor) -> Tensor:
    """The layer on matrices that bitsandbytes decodes, by torch's products in hidden's dtype; adapters in float32."""
    import bitsandbytes.functional as bnb

    functional = torch.nn.functional
    out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    for expert in range(layer.shape.experts):
        tokens, choices = (layer.index_TK == expert).nonzero(as_tuple=True)

        def linear(stack: Nf4Stack, index: int, x: Tensor, part: int, expert: int = expert) -> Tensor:
            packed, state = bitsandbytes_weight(stack, index, x.dtype)
            a, b = (factor[expert] for factor in layer.factors[part])
            low_rank = layer.scaling * functional.linear(functional.linear(x.float(), a), b)
            return functional.linear(x, bnb.dequantize_4bit(packed.t(), state)) + low_rank.to(x.dtype)

        x = hidden[tokens]
        gate, up = (linear(layer.gate_up, 2 * expert + part, x, part) for part in range(2))
        y = linear(layer.down, expert, functional.silu(gate) * up, 2)
        out = out.index_add(0, tokens, y.float() * weights[tokens, choices, None].float())
    return out.to(hidden.dtype)


def in_float64(layer: Layer) -> list[Tensor]:
    """Output and gradients of a layer without dropout, in float64 by autograd from the same inputs and bytes."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in layer.leaves]
    hidden, weights, *factors = leaves
    out = torch.zeros_like(hidden)

    def linear(stack: Nf4Stack, index: int, x: Tensor, part: int, expert: int) -> Tensor:
        a, b = (factor[expert] for factor in factors[2 * part : 2 * part + 2])
        return x @ stack.dequantize(index, torch.float32).double().t() + layer.scaling * (x @ a.t()) @ b.t()

    for expert in range(layer.shape.experts):
        tokens, choices = (layer.index_TK == expert).nonzero(as_tuple=True)
        x = hidden[tokens]
        gate, up = (linear(layer.gate_up, 2 * expert + part, x, part, expert) for part in range(2))
        y = linear(layer.down, expert, torch.nn.functional.silu(gate) * up, 2, expert)
        out = out.index_add(0, tokens, y * weights[tokens, choices, None])
    return [out.detach(), *torch.autograd.grad(out, leaves, layer.dout_TD.double())]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm, by name: output, gradients of hidden, router's weights, and each factor."""
    projections = [f"d{factor}{part}" for part in ("gate", "up", "down") for factor in ("A_", "B_")]
    names = ["output", "dhidden", "drouter", *projections]
    return {
        name: float((one.double() - other.double()).norm() / other.double().norm())
        for name, one, other in zip(names, found, expected, strict=True)
    }
