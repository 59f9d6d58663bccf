"""Routed tokens between the GEMMs: sorted by expert, the gate's gradient, the sum over a token's experts.

None of it uses atomics: counts are prefix sums, and each output is written by one program.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R routed tokens, E experts, B blocks
of routed tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.gpu.grouped_gemm import padded
from expertune.kernels.gpu.launch import launch

# Most programs of the sort, so that each can add up what all before it have counted.
_BLOCKS = 64


@triton.jit
def count_kernel(index_ptr, counts_ptr, num_rows, steps, SIZE: tl.constexpr, E_PAD: tl.constexpr):
    """counts [B, E_PAD]: rows of each expert among the `steps` * SIZE rows of each block."""
    expert = tl.arange(0, E_PAD)
    counts = tl.zeros((E_PAD,), dtype=tl.int32)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * SIZE + tl.arange(0, SIZE)
        chosen = tl.load(index_ptr + row, mask=row < num_rows, other=-1).to(tl.int32)
        counts += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + tl.program_id(0) * E_PAD + expert, counts)


@triton.jit
def sort_kernel(
    index_ptr,
    router_ptr,
    counts_ptr,
    token_ptr,
    number_ptr,
    inverse_ptr,
    sorted_router_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    first_row,
    steps,
    blocks,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    E_PAD: tl.constexpr,
):
    """Where each routed token goes: after the tokens of lower experts, and after its own expert's tokens before it."""
    expert = tl.arange(0, E_PAD)
    before = tl.zeros((E_PAD,), dtype=tl.int32)
    total = tl.zeros((E_PAD,), dtype=tl.int32)
    for block in range(0, blocks):
        counts = tl.load(counts_ptr + block * E_PAD + expert)
        total += counts
        before += tl.where(block < tl.program_id(0), counts, 0)
    ends = tl.cumsum(total, 0)
    place = ends - total + before
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + expert, ends.to(tl.int64), mask=expert < num_experts)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * SIZE + tl.arange(0, SIZE)
        mask = row < num_rows
        chosen = tl.load(index_ptr + row, mask=mask, other=-1).to(tl.int32)
        router = tl.load(router_ptr + row, mask=mask, other=0.0).to(tl.float32)
        here = (chosen[:, None] == expert[None, :]).to(tl.int32)
        so_far = tl.cumsum(here, 0)
        target = tl.sum(here * (so_far - 1 + place[None, :]), 1).to(tl.int64)
        place += tl.sum(here, 0)
        tl.store(inverse_ptr + row, target, mask=mask)
        tl.store(token_ptr + target, (row // TOP_K).to(tl.int64), mask=mask)
        tl.store(number_ptr + target, row.to(tl.int64) + first_row, mask=mask)
        tl.store(sorted_router_ptr + target, router, mask=mask)


@triton.jit
def gate_backward_kernel(
    gate_up_ptr,
    dinter_ptr,
    router_ptr,
    inter_ptr,
    drouter_ptr,
    offsets_ptr,
    first_expert,
    end_expert,
    size,
    BLOCK: tl.constexpr,
):
    """One routed token: gate_up [2 * F] becomes its own gradient, and inter [F] is computed again.

    With <inter, dInter>, where dInter is the gradient before the router's weight is applied: the weight's own gradient
    then needs no division.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + first_expert - 1, mask=first_expert > 0, other=0)
    # The loop has no step for a token of other experts.
    width = tl.where((row >= start) & (row < tl.load(offsets_ptr + end_expert - 1)), size, 0)
    router = tl.load(router_ptr + row)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        f = first + tl.arange(0, BLOCK)
        mask = f < size
        gate_ptrs = gate_up_ptr + row * 2 * size + f
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
        dinter = tl.load(dinter_ptr + row * size + f, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        inter = silu * up
        total += inter * dinter
        dinter = dinter * router
        dgate = dinter * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(gate_ptrs, dgate.to(gate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(gate_ptrs + size, (dinter * silu).to(gate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(inter_ptr + row * size + f, inter.to(inter_ptr.dtype.element_ty), mask=mask)
    tl.store(drouter_ptr + row, tl.sum(total, 0), mask=width > 0)


@triton.jit
def combine_kernel(
    rows_ptr,
    inverse_ptr,
    out_ptr,
    drouter_ptr,
    drouter_out_ptr,
    size,
    TOP_K: tl.constexpr,
    ROUTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [T, D]: what a token's experts gave, summed in the order of its choices; with ROUTER their numbers [T, K]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(0, TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + choice)
        total += tl.load(rows_ptr + row * size + column, mask=mask, other=0.0).to(tl.float32)
        if ROUTER:
            if tl.program_id(1) == 0:
                value = tl.load(drouter_ptr + row).to(drouter_out_ptr.dtype.element_ty)
                tl.store(drouter_out_ptr + token * TOP_K + choice, value)
    tl.store(out_ptr + token * size + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def sort_by_expert(
    top_k_index_TK: Tensor, top_k_weights_TK: Tensor, num_experts: int, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routed tokens sorted by expert, stably, in two launches: the fields of `plan.RoutedTokens`.

    Args:
        top_k_index_TK: int64 [T, K], below E.
        top_k_weights_TK: [T, K].
        num_experts: E.
        first: number in the whole batch of the first routed token.

    Returns:
        token [R], number [R], inverse [R] (int64), the router's weight of each (float32 [R]), and the end
        of each expert's tokens (int64 [E]).
    """
    index, router = top_k_index_TK.contiguous(), top_k_weights_TK.contiguous()
    rows, device = index.numel(), index.device
    E_PAD = padded(num_experts)
    size = max(4096 // E_PAD, 16)
    steps = max(triton.cdiv(rows, size * _BLOCKS), 1)
    blocks = max(triton.cdiv(rows, size * steps), 1)
    counts = torch.empty(blocks, E_PAD, dtype=torch.int32, device=device)
    token, number, inverse = torch.empty(3, rows, dtype=torch.int64, device=device)
    sorted_router = torch.empty(rows, dtype=torch.float32, device=device)
    offsets = torch.empty(num_experts, dtype=torch.int64, device=device)
    launch(count_kernel, (blocks,), index, counts, rows, steps, SIZE=size, E_PAD=E_PAD)
    launch(
        sort_kernel,
        (blocks,),
        index,
        router,
        counts,
        token,
        number,
        inverse,
        sorted_router,
        offsets,
        rows,
        num_experts,
        first,
        steps,
        blocks,
        TOP_K=max(index.shape[1], 1),
        SIZE=size,
        E_PAD=E_PAD,
    )
    return token, number, inverse, sorted_router, offsets


def gate_backward(
    gate_up: Tensor,
    dinter_RF: Tensor,
    router_R: Tensor,
    inter_RF: Tensor,
    drouter_R: Tensor,
    offsets_E: Tensor,
    experts: slice | None = None,
) -> None:
    """Through silu(gate) * up, in one launch: `gate_up` is replaced by its gradient.

    Args:
        gate_up: [R, 2 * F], contiguous.
        dinter_RF: gradient of the intermediate rows before the router's weight, [R, F], contiguous.
        router_R: float32 [R].
        inter_RF: [R, F], contiguous; the intermediate rows are written here.
        drouter_R: float32 [R]; <inter, dInter> is written here.
        offsets_E: int64 [E], the end of each expert's tokens.
        experts: whose tokens are computed; None means all.
    """
    launch(
        gate_backward_kernel,
        (gate_up.shape[0],),
        gate_up,
        dinter_RF,
        router_R,
        inter_RF,
        drouter_R,
        offsets_E,
        experts.start if experts else 0,
        experts.stop if experts else offsets_E.shape[0],
        dinter_RF.shape[1],
        BLOCK=min(triton.next_power_of_2(dinter_RF.shape[1]), 2048),
        num_warps=8,
    )


def combine(
    rows_RD: Tensor,
    inverse_R: Tensor,
    out_TD: Tensor,
    drouter_R: Tensor | None = None,
    drouter_TK: Tensor | None = None,
) -> None:
    """out[t] = sum over k of rows[inverse[t, k]], summed in float32; with `drouter_R` also their numbers."""
    if not out_TD.numel():
        return
    size = out_TD.shape[1]
    BLOCK = min(triton.next_power_of_2(size), 1024)
    launch(
        combine_kernel,
        (out_TD.shape[0], triton.cdiv(size, BLOCK)),
        rows_RD,
        inverse_R,
        out_TD,
        drouter_R,
        drouter_TK,
        size,
        TOP_K=inverse_R.shape[0] // out_TD.shape[0],
        ROUTER=drouter_R is not None,
        BLOCK=BLOCK,
    )
