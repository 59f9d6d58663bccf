"""Expert layers with random values, and what their output and gradients are compared with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertune.kernels.expert_mlp import Activation, ExpertLayer, LoraUpdate, expert_mlp, reference
from expertune.kernels.lora import slots_of
from expertune.kernels.nf4 import Nf4Stack
from tests.kernels.settings import SETTINGS

FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}
# W, the activations and each GEMM are rounded to 16 bits on the way; see tests/kernels/test_linear.py.
HALF = {torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5}, torch.float16: {"rtol": 2**-8, "atol": 2**-8}}

D, F = 128, 192


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped_gate(gate_up: Tensor) -> Tensor:
    """Limits and a shift, as some families have them."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


def normed_gate(gate_up: Tensor) -> Tensor:
    """Not columnwise: each element depends on the whole row."""
    inner = swiglu(gate_up)
    return inner / (1 + inner.square().mean(dim=-1, keepdim=True))


def norm(rows: Tensor) -> Tensor:
    """After an expert: over the whole row."""
    return torch.nn.functional.rms_norm(rows, rows.shape[-1:]) * 0.7


SWIGLU = Activation(swiglu, columnwise=True, swiglu=True)


class Case(NamedTuple):
    """A layer with its leaves: hidden, the router's weights, and the updates' factors want gradients."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Nf4Stack
    down: Nf4Stack
    layer: ExpertLayer
    updates: list[LoraUpdate]
    replay: Sequence[Tensor] = ()
    biases: tuple[Tensor, Tensor] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        held = [leaf for update in self.updates for leaf in (update.a, update.b, update.gain) if leaf is not None]
        return [self.hidden, self.weights, *held]


def stack_of(num_matrices: int, rows: int, columns: int, double_quantization: bool = True) -> Nf4Stack:
    stack = Nf4Stack(num_matrices, rows, columns, double_quantization)
    for index in range(num_matrices):
        stack.write(index, torch.randn(rows, columns) / columns**0.5)
    return stack


def make_case(
    tokens: int,
    top_k: int = 2,
    num_experts: int = 4,
    ranks: Sequence[tuple[int, int]] = ((0, 8), (1, 8), (2, 8)),
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    activation: Activation = SWIGLU,
    num_parts: int = 2,
    hidden: int = D,
    intermediate: int = F,
    double_quantization: bool = True,
    dropout: float = 0.0,
    biased: bool = False,
    experts: Sequence[tuple[int, ...] | None] = (),
    gained: Sequence[int] = (),
) -> Case:
    """A case with random values: `ranks` lists (part, rank) of each update, `experts` those that have factors.

    `gained` lists the parts that have a gain.
    """
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)]) if tokens else None
    updates = []
    for u, (part, rank) in enumerate(ranks):
        width, height = (intermediate, hidden) if part == num_parts else (hidden, intermediate)
        of = experts[u] if experts else None
        held, slots = (num_experts, None) if of is None else (len(of), slots_of(of, num_experts, torch.device("cpu")))
        a = (torch.randn(held, rank, width) / width**0.5).to(adapter_dtype).requires_grad_()
        b = (torch.randn(held, height, rank) / rank**0.5).to(adapter_dtype).requires_grad_()
        gain = (torch.rand(held, height) + 0.5).requires_grad_() if part in gained else None
        updates.append(LoraUpdate(part, a, b, scaling=0.5 + u / 4, dropout=dropout, slots=slots, gain=gain))
    return Case(
        torch.randn(tokens, hidden).to(dtype).requires_grad_(),
        torch.empty(0, top_k, dtype=torch.int64) if index is None else index,
        torch.rand(tokens, top_k).to(dtype).requires_grad_(),
        stack_of(num_experts * num_parts, intermediate, hidden, double_quantization),
        stack_of(num_experts, hidden, intermediate, double_quantization),
        ExpertLayer(activation, settings=SETTINGS),
        updates,
        biases=(torch.randn(num_experts, num_parts * intermediate), torch.randn(num_experts, hidden))
        if biased
        else None,
    )


def assert_same_as_plain(case: Case, tolerance: dict[str, float]) -> None:
    """Output and the gradient of every leaf agree with plain float32 arithmetic."""
    out, _ = expert_mlp(*case)
    expected = reference.expert_mlp(*case[:5], case.layer.activation, case.updates, case.biases)
    assert out.dtype == case.hidden.dtype
    # The error of a sum grows with the sum, and its order is the CPU's: scale the tolerance to the largest value.
    size = max(float(expected.detach().abs().max()), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(out.float() / size, expected / size, **tolerance)
    dout = torch.randn_like(expected).to(out.dtype)
    gradients = torch.autograd.grad(out, case.leaves, dout)
    plain = torch.autograd.grad(expected, case.leaves, dout.float(), allow_unused=True)
    for gradient, wanted, leaf in zip(gradients, plain, case.leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        # Likewise: to the largest gradient of the leaf.
        size = max(float(wanted.abs().max()), 1.0) if wanted.numel() else 1.0
        torch.testing.assert_close(gradient.float() / size, wanted.float() / size, **tolerance)


SHAPES: dict[str, dict[str, Any]] = {
    "rows that are a multiple of nothing": {"tokens": 23, "num_experts": 3},
    "one token": {"tokens": 1},
    "one choice": {"tokens": 9, "top_k": 1},
    "every expert chosen": {"tokens": 5, "top_k": 4},
    "most experts without tokens": {"tokens": 3, "num_experts": 16},
    "one expert": {"tokens": 9, "top_k": 1, "num_experts": 1},
    "no update": {"tokens": 9, "ranks": ()},
    "down alone": {"tokens": 9, "ranks": ((2, 4),)},
    "gate alone, rank 1": {"tokens": 9, "ranks": ((0, 1),)},
    "ranks that are a multiple of nothing": {"tokens": 9, "ranks": ((0, 3), (1, 17), (2, 5))},
    "two adapters": {"tokens": 9, "ranks": ((0, 4), (1, 4), (2, 4), (0, 2), (2, 7))},
    "experts without a gate": {
        "tokens": 9,
        "num_parts": 1,
        "ranks": ((0, 4), (1, 6)),
        "activation": Activation(torch.nn.functional.gelu, columnwise=True),
    },
    "a gate with limits": {"tokens": 9, "activation": Activation(clamped_gate, columnwise=True)},
    "SwiGLU by autograd": {"tokens": 9, "activation": Activation(swiglu, columnwise=True)},
    "an activation over whole rows": {"tokens": 9, "activation": Activation(normed_gate)},
    "biases": {"tokens": 9, "biased": True},
    "biases, SwiGLU by autograd": {"tokens": 9, "biased": True, "activation": Activation(swiglu, columnwise=True)},
    "biases, limits and experts without tokens": {
        "tokens": 3,
        "num_experts": 16,
        "biased": True,
        "activation": Activation(clamped_gate, columnwise=True),
    },
    "biases, without a gate": {
        "tokens": 9,
        "num_parts": 1,
        "ranks": ((0, 4), (1, 6)),
        "biased": True,
        "activation": Activation(torch.nn.functional.gelu, columnwise=True),
    },
    "a norm after each expert": {"tokens": 9, "activation": Activation(swiglu, True, True, after=norm)},
    "a norm after each expert, with biases": {
        "tokens": 9,
        "biased": True,
        "activation": Activation(swiglu, columnwise=True, swiglu=True, after=norm),
    },
    "updates of some experts": {"tokens": 11, "experts": ((3, 1), (2,), (0, 1))},
    "updates of some experts, one of them without tokens": {
        "tokens": 2,
        "top_k": 1,
        "num_experts": 6,
        "experts": ((1, 4, 5), None, (0, 2, 5)),
    },
    "experts of two ranks": {
        "tokens": 11,
        "ranks": ((0, 8), (0, 3), (2, 8), (2, 3)),
        "experts": ((1, 2), (0, 3), (0,), (3, 1)),
    },
    "a norm after updates of some experts": {
        "tokens": 9,
        "experts": ((1,), (3, 0), (2,)),
        "activation": Activation(swiglu, True, True, after=norm),
    },
    "no double quantization": {"tokens": 9, "double_quantization": False},
    "gains": {"tokens": 23, "num_experts": 3, "gained": (0, 1, 2)},
    "a gain of up alone": {"tokens": 9, "gained": (1,)},
    "gains of gate and down, with biases and experts without tokens": {
        "tokens": 3,
        "num_experts": 16,
        "biased": True,
        "gained": (0, 2),
    },
    "gains of some experts, of two ranks": {
        "tokens": 11,
        "ranks": ((0, 8), (0, 3), (2, 8), (2, 3)),
        "experts": ((1, 2), (0, 3), (0,), (3, 1)),
        "gained": (0, 2),
    },
    "gains, SwiGLU by autograd": {
        "tokens": 9,
        "gained": (0, 1, 2),
        "activation": Activation(swiglu, columnwise=True),
    },
    "gains, an activation over whole rows": {
        "tokens": 9,
        "gained": (0, 1, 2),
        "activation": Activation(normed_gate),
    },
    "gains, a norm after each expert, with biases": {
        "tokens": 9,
        "biased": True,
        "gained": (0, 1, 2),
        "activation": Activation(swiglu, columnwise=True, swiglu=True, after=norm),
    },
    "gains, without a gate": {
        "tokens": 9,
        "num_parts": 1,
        "ranks": ((0, 4), (1, 6)),
        "gained": (0, 1),
        "activation": Activation(torch.nn.functional.gelu, columnwise=True),
    },
    "more rows than a panel of the fused route holds": {"tokens": 900, "num_experts": 2, "top_k": 1},
}
