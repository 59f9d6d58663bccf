"""Grouped GEMMs with 4-bit or dequantized weights, all experts in one launch: y = x @ W[e].T, and dx = dy @ W[e].

Shape suffixes: T tokens, R routed tokens sorted by expert, N rows and K columns of a matrix, E experts, P parts
(matrices of an expert that lie side by side), r rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
from torch import Tensor

from expertune.kernels.gpu.configs import gemm_config
from expertune.kernels.gpu.grouped_gemm_kernels import grouped_gemm_kernel, input_gradient_kernel
from expertune.kernels.gpu.launch import launch, target_of
from expertune.kernels.gpu.nf4 import tables
from expertune.kernels.nf4.bytes import Nf4Bytes


class Update(NamedTuple):
    """A low-rank update of one part of `grouped_gemm`'s output: out += scaling * low @ factor[e].T.

    Attributes:
        low_Rr: x @ A, [R, r], tokens sorted by expert, contiguous.
        factor: B, [E, N, r].
        part: which part.
        scaling: of the update.
    """

    low_Rr: Tensor
    factor: Tensor
    part: int = 0
    scaling: float = 1.0


class Dequantized(NamedTuple):
    """Dequantized matrices of experts `first` .. `first + G - 1`.

    Attributes:
        weights: [G * P, N, K].
        first: number of the first expert.
    """

    weights: Tensor
    first: int = 0


def grouped_gemm(
    x: Tensor,
    weight: Nf4Bytes | Dequantized,
    offsets_E: Tensor,
    out: Tensor,
    updates: Sequence[Update] = (),
    token_R: Tensor | None = None,
    router_R: Tensor | None = None,
    experts: slice | None = None,
    swiglu: bool = False,
    base: Tensor | None = None,
) -> None:
    """out = x @ W[e].T with low-rank updates, for each token's expert e; the P parts of an expert side by side.

    Args:
        x: [R, K], or [T, K] with `token_R`; its dtype is the dtype of the GEMM.
        weight: E * P matrices [N, K], 4-bit, or dequantized ones of `experts`.
        offsets_E: int64 [E], the end of each expert's tokens.
        out: [R, P * N], or [R, N] of silu(part 0) * part 1 if `swiglu`; of any floating dtype, its rows may lie apart.
        updates: at most one of each part, and of the first two parts only.
        token_R: int64 [R], the token of x that each routed token is.
        router_R: float32 [R], what each token is multiplied by in the end.
        experts: whose tokens are computed; None means all. Other rows of `out` are left as they are.
        swiglu: apply the gate; P is then 2.
        base: [R, P * N], what the sums begin with in place of zero.

    Raises:
        ValueError: the tile's BK does not divide K: the kernel would read beyond the rows.
    """
    held, plan = _weights(weight, offsets_E, experts)
    config = gemm_config(target_of(x.device), x.dtype, plan.nf4, swiglu, False, out.shape[0] / offsets_E.shape[0])
    if plan.columns % config.BK:
        raise ValueError(f"a tile of {config.BK} input features does not divide {plan.columns}")
    by_part = {update.part: update for update in updates}
    first, second = by_part.get(0), by_part.get(1)
    launch(
        grouped_gemm_kernel,
        (config.programs,),
        x,
        token_R,
        *held,
        offsets_E,
        *(first[:2] if first else (None, None)),
        *(second[:2] if second else (None, None)),
        router_R,
        base,
        out,
        plan.first,
        plan.end,
        plan.rows,
        plan.columns,
        x.stride(0),
        *plan.strides,
        base.stride(0) if base is not None else 0,
        out.stride(0),
        *(first.low_Rr.shape[1] if first else 0, second.low_Rr.shape[1] if second else 0),
        *(first.scaling if first else 0.0, second.scaling if second else 0.0),
        PARTS=plan.parts,
        GATHER=token_R is not None,
        NF4=plan.nf4,
        DOUBLE=plan.double,
        BASE=base is not None,
        SWIGLU=swiglu,
        WEIGHTED=router_R is not None,
        EVEN=plan.rows % config.BN == 0,
        RANK0=padded_rank(first.low_Rr) if first else 0,
        RANK1=padded_rank(second.low_Rr) if second else 0,
        E_PAD=padded(offsets_E.shape[0]),
        PROGRAMS=config.programs,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        dtype=x.dtype,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def input_gradient(
    dy: Tensor,
    weight: Nf4Bytes | Dequantized,
    offsets_E: Tensor,
    out: Tensor,
    token_R: Tensor | None = None,
    experts: slice | None = None,
    add: bool = False,
) -> None:
    """out = dy @ W[e], the P matrices of an expert one below the other.

    Args:
        dy: [R, P * N], or [T, P * N] with `token_R`; its dtype is the dtype of the GEMM.
        weight: see `grouped_gemm`.
        offsets_E: see `grouped_gemm`.
        out: [R, K], of any floating dtype.
        token_R: see `grouped_gemm`.
        experts: see `grouped_gemm`.
        add: to what `out` holds.
    """
    held, plan = _weights(weight, offsets_E, experts)
    config = gemm_config(target_of(dy.device), dy.dtype, plan.nf4, False, True, out.shape[0] / offsets_E.shape[0])
    launch(
        input_gradient_kernel,
        (config.programs,),
        dy,
        token_R,
        *held,
        offsets_E,
        out,
        plan.first,
        plan.end,
        plan.rows,
        plan.columns,
        dy.stride(0),
        *plan.strides,
        out.stride(0),
        PARTS=plan.parts,
        GATHER=token_R is not None,
        NF4=plan.nf4,
        DOUBLE=plan.double,
        EVEN=plan.rows % config.BN == 0,
        ADD=add,
        E_PAD=padded(offsets_E.shape[0]),
        PROGRAMS=config.programs,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        dtype=dy.dtype,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def padded(size: int) -> int:
    """The power of two that Triton's ranges need, 16 at least."""
    return max(triton.next_power_of_2(size), 16)


def padded_rank(low_Rr: Tensor) -> int:
    """The least inner size of a GEMM in which the rank fits."""
    return padded(low_Rr.shape[1])


class _Plan(NamedTuple):
    parts: int
    rows: int
    columns: int
    first: int
    end: int
    nf4: bool
    double: bool
    strides: tuple[int, int, int]


def _weights(
    weight: Nf4Bytes | Dequantized, offsets_E: Tensor, experts: slice | None
) -> tuple[tuple[Tensor | None, ...], _Plan]:
    """The kernels' six arguments about weights, and their shapes."""
    num_experts = offsets_E.shape[0]
    first, end = (experts.start, experts.stop) if experts else (0, num_experts)
    if isinstance(weight, Dequantized):
        matrices, rows, columns = weight.weights.shape
        if weight.first != first:
            raise ValueError(f"dequantized weights begin at expert {weight.first}, rows at expert {first}")
        parts = matrices // (end - first)
        strides = (weight.weights.stride(1), 0, 0)
        plan = _Plan(parts, rows, columns, first, end, False, False, strides)
        return (weight.weights, None, None, None, None, None), plan
    dynamic, codebook = tables(weight.packed.device)
    strides = (weight.packed.stride(1), weight.absmax.shape[1], weight.nested_absmax.shape[1])
    parts = weight.packed.shape[0] // num_experts
    double = weight.double_quantization
    plan = _Plan(parts, weight.out_features, weight.in_features, first, end, True, double, strides)
    return (*weight, dynamic, codebook), plan
