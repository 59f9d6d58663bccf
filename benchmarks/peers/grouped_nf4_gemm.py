"""grouped-nf4-gemm: one expert layer on its grouped NF4 products, for a benchmark of layers in one process.

It is a set of kernels, not a stack: it has no model and no `serve`. Its bytes are bitsandbytes' own (64-blocks along K,
low-rank terms added before the activation), so it is given the very bytes that ours decodes.

Shape suffixes: E experts, N out_features, K in_features, R rows sorted by expert, D rank.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """One projection of every expert: packed [E, N, K/2] uint8, absmax [E, N, K/64] float32, decoded wh"""

    packed_ENh: Tensor
    absmax_ENb: Tensor


@dataclass(frozen=True)
class Factors:
    """One projection's adapters, a [E, D, K] and b [E, N, D]; `scaling` is alpha / r."""

    a_EDK: Tensor
    b_END: Tensor
    scaling: float


NOTES = (
    "absmax in float32 where ours is double-quantized: 0.125 bits a weight more to read",
    "w1 and w3 in one product; with adapters their two are one of twice the rank, whose other half is zero",
    "its own choice of route (GNF4_TRAIN_GEMM=auto): decode and torch's grouped_mm on an H100; `fused` decodes inside",
)


def missing() -> str | None:
    """What stands in the way of running it, in one line."""
    if importlib.util.find_spec("nf4_qlora") is None:
        return "grouped-nf4-gemm is not installed; see benchmarks/README.md"
    if importlib.util.find_spec("triton") is None:
        return "grouped-nf4-gemm needs triton"
    return None if torch.cuda.is_available() else "grouped-nf4-gemm needs a CUDA GPU"


def experts_from_flat(packed: Tensor, absmax: Tensor, num_experts: int, num_out: int) -> Experts:
    """From bitsandbytes' flat bytes of all experts, one behind the other, absmax in float32."""
    return Experts(
        packed.reshape(num_experts, num_out, -1).contiguous(),
        absmax.float().reshape(num_experts, num_out, -1).contiguous(),
    )


def merge_gate_up(gate: Experts, up: Experts) -> Experts:
    """w1's rows, then w3's: a block never crosses a row, so their bytes lie side by side as they are."""
    return Experts(
        torch.cat([gate.packed_ENh, up.packed_ENh], dim=1), torch.cat([gate.absmax_ENb, up.absmax_ENb], dim=1)
    )


def merge_factors(gate: Factors, up: Factors) -> Factors:
    """Separate adapters of w1 and w3 as one of twice the rank, block-diagonal in b: the same function, new leaves."""
    b_gate = torch.cat([gate.b_END, torch.zeros_like(up.b_END)], dim=2)
    b_up = torch.cat([torch.zeros_like(gate.b_END), up.b_END], dim=2)
    a_EDK = torch.cat([gate.a_EDK, up.a_EDK], dim=1).detach().requires_grad_()
    b_END = torch.cat([b_gate, b_up], dim=1).detach().requires_grad_()
    return Factors(a_EDK, b_END, gate.scaling)


def groups(offsets_E: Tensor) -> tuple[list[int], list[int]]:
    """Rows and number of each expert that has rows; it takes no empty group.

    Args:
        offsets_E: int64 [E], the end of each expert's rows.
    """
    ends = offsets_E.tolist()
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    present = [expert for expert, size in enumerate(sizes) if size]
    return [sizes[expert] for expert in present], present


def layer(
    gate_up: Experts,
    down: Experts,
    x_RK: Tensor,
    offsets_E: Tensor,
    gate_up_factors: Factors | None = None,
    down_factors: Factors | None = None,
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Forward and backward of w2(silu(w1 x) * w3 x) for rows sorted by expert, before they are weighted and summed.

    Args:
        gate_up: w1 above w3, see `merge_gate_up`.
        down: w2.
        x_RK: bfloat16 rows on the GPU, sorted by expert.
        offsets_E: see `groups`; read on the host once, here.
        gate_up_factors: adapters of `gate_up`, see `merge_factors`.
        down_factors: adapters of `down`.

    Returns:
        forward() -> y [R, K], keeping what backward needs; backward(dy [R, K]) -> dx [R, K]. Gradients of the adapters
        are added to the factors' own `.grad`.

    Raises:
        RuntimeError: see `missing`.
    """
    if (problem := missing()) is not None:
        raise RuntimeError(problem)
    from nf4_qlora import fused_grouped_lora

    sizes, experts = groups(offsets_E)
    leaf_RK = x_RK.detach().requires_grad_()
    kept: list[Tensor] = []

    def product(x: Tensor, weight: Experts, factors: Factors | None) -> Tensor:
        low_rank = (factors.a_EDK, factors.b_END) if factors else (None, None)
        scaling = factors.scaling if factors else 1.0
        return fused_grouped_lora(x, weight.packed_ENh, weight.absmax_ENb, sizes, experts, *low_rank, scaling=scaling)

    def forward() -> Tensor:
        gate, up = product(leaf_RK, gate_up, gate_up_factors).chunk(2, dim=-1)
        y_RK = product(nn.functional.silu(gate) * up, down, down_factors)
        kept[:] = [y_RK]
        return y_RK

    def backward(dy_RK: Tensor) -> Tensor:
        leaf_RK.grad = None
        kept.pop().backward(dy_RK)
        assert leaf_RK.grad is not None
        return leaf_RK.grad

    return forward, backward
