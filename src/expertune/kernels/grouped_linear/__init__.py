"""y = x @ W[e].T + LoRA: one GEMM for all experts, over rows that are sorted by expert.

W is an `Nf4Stack` of E * P matrices; the P matrices of an expert lie side by side in its output (gate and up: P = 2).
The operator `expertune::grouped_linear` is registered with torch, so that activation checkpointing and `torch.compile`
see one node; its backward gives dX, dA and dB, and never a dW, because the weights are frozen.

Routes (`expertune.kernels.routes` chooses): `dequant_gemm.py` dequantizes a tile of bytes and multiplies it while it is
in cache, on any device; `fused.py` dequantizes inside the GEMM, on a CPU; `grouped.py` does either on a GPU, all
experts in each launch. `reference.py` is plain float32 and what they are tested against.

Shape suffixes: R routed rows, K in_features, N out_features of one matrix, E experts, P matrices per expert, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertune.kernels import routes
from expertune.kernels.grouped_linear import dequant_gemm, fused
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack

__all__ = ["LoraUpdate", "grouped_linear"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class LoraUpdate:
    """One low-rank update of one part: y[:, part] += scaling * (x @ A[e].T) @ B[e].T.

    Attributes:
        part: which of the expert's P matrices it updates.
        a_ErK: [E, r, K].
        b_ENr: [E, N, r], of A's dtype. The update is computed in this dtype and rounded once to x's.
        scaling: alpha / r, or alpha / sqrt(r).
        x_RK: the update's own input, where dropout made it differ from x; None takes x.
    """

    part: int
    a_ErK: Tensor
    b_ENr: Tensor
    scaling: float
    x_RK: Tensor | None = None


def grouped_linear(
    x_RK: Tensor, weight: Nf4Stack | Nf4Bytes, offsets_E: Tensor, updates: Sequence[LoraUpdate] = ()
) -> Tensor:
    """Multiply each row by its expert's matrices and add the expert's low-rank updates.

    Args:
        x_RK: [R, K], rows sorted by expert; its dtype is the dtype of the GEMM.
        weight: E * P matrices [N, K]; matrix e * P + p is part p of expert e.
        offsets_E: int64 [E], the end of each expert's rows; the last one is R.
        updates: any number of low-rank updates; they are summed.

    Returns:
        [R, P * N] of x's dtype, the parts side by side.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the value received.
    """
    held = weight.bytes if isinstance(weight, Nf4Stack) else weight
    _check(x_RK, held, offsets_E, updates)
    y_RN, _ = torch.ops.expertune.grouped_linear(
        x_RK,
        *held,
        offsets_E,
        [update.part for update in updates],
        [update.scaling for update in updates],
        [update.a_ErK for update in updates],
        [update.b_ENr for update in updates],
        [x_RK if update.x_RK is None else update.x_RK for update in updates],
    )
    return y_RN


@torch.library.custom_op(
    "expertune::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset, Tensor offsets, int[] parts, "
    "float[] scalings, Tensor[] a, Tensor[] b, Tensor[] x_updates) -> (Tensor, Tensor[])",
)
def _forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    offsets: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    weight = Nf4Bytes(packed, absmax, nested_absmax, offset)
    with own_dtypes(x):
        return _route(x, offsets, weight, parts).forward(x, weight, offsets, parts, scalings, a, b, x_updates)


@_forward.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    offsets: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    columns = packed.shape[1] * (packed.shape[0] // offsets.shape[0])
    return x.new_empty(x.shape[0], columns), [factor.new_empty(x.shape[0], factor.shape[1]) for factor in a]


@torch.library.custom_op(
    "expertune::grouped_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset, Tensor offsets, "
    "int[] parts, float[] scalings, Tensor[] a, Tensor[] b, Tensor[] x_updates, Tensor[] h) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])",
)
def _backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    offsets: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
    h: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    weight = Nf4Bytes(packed, absmax, nested_absmax, offset)
    with own_dtypes(dy):
        return _route(dy, offsets, weight, parts).backward(dy, weight, offsets, parts, scalings, a, b, x_updates, h)


@_backward.register_fake
def _(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    offsets: Tensor,
    parts: list[int],
    scalings: list[float],
    a: list[Tensor],
    b: list[Tensor],
    x_updates: list[Tensor],
    h: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dx = dy.new_empty(dy.shape[0], packed.shape[2] * 2)
    return (
        dx,
        [torch.empty_like(factor) for factor in a],
        [torch.empty_like(factor) for factor in b],
        [torch.empty_like(x) for x in x_updates],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, *frozen, offsets, parts, scalings, a, b, x_updates = inputs
    ctx.parts, ctx.scalings, ctx.num_updates = parts, scalings, len(parts)
    ctx.save_for_backward(*frozen, offsets, *a, *b, *x_updates, *output[1])


def _autograd(ctx: Any, dy: Tensor, _dh: list[Tensor]) -> tuple[Any, ...]:
    # Read once: under activation checkpointing each access would recompute the layer.
    saved = ctx.saved_tensors
    *frozen, offsets = saved[:5]
    count = ctx.num_updates
    lists = [list(saved[5 + i * count : 5 + (i + 1) * count]) for i in range(4)]
    dx, da, db, dx_updates = torch.ops.expertune.grouped_linear_backward(
        dy, *frozen, offsets, ctx.parts, ctx.scalings, *lists
    )
    # torch takes an empty list for a list of tensors, and wants a list back for it.
    no_gradients: list[Tensor] | None = None if count else []
    return dx, None, None, None, None, None, no_gradients, no_gradients, da, db, dx_updates


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _route(x: Tensor, offsets: Tensor, weight: Nf4Bytes, parts: list[int]) -> Any:
    """A module or object with `forward` and `backward`."""
    grouped = weight.packed.shape[0] <= 2 * offsets.shape[0] and len(set(parts)) == len(parts)
    route = routes.choose(x.device, x.shape[0] / offsets.shape[0], x.dtype, grouped, weight.scheme == "nf4")
    if x.device.type == "cpu":
        return fused if route == routes.FUSED else dequant_gemm
    if route == routes.EXPERT_BY_EXPERT:
        return dequant_gemm
    from expertune.kernels.grouped_linear.grouped import GroupedRoute

    return GroupedRoute(route == routes.DEQUANT_GEMM)


def own_dtypes(x: Tensor) -> torch.autocast:
    """No autocast inside the operator: it would round the update's factors to half precision on the way."""
    return torch.autocast(x.device.type, enabled=False)


def _check(x_RK: Tensor, weight: Nf4Bytes, offsets_E: Tensor, updates: Sequence[LoraUpdate]) -> None:
    if x_RK.ndim != 2 or x_RK.shape[1] != weight.columns:
        raise ValueError(f"x must be [rows, {weight.columns}], got {tuple(x_RK.shape)}")
    if x_RK.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x_RK.dtype}")
    if offsets_E.ndim != 1 or offsets_E.dtype != torch.int64:
        raise ValueError(f"offsets must be int64 [experts], got {offsets_E.dtype} {tuple(offsets_E.shape)}")
    num_experts = offsets_E.shape[0]
    if num_experts == 0 or weight.packed.shape[0] % num_experts:
        raise ValueError(f"{weight.packed.shape[0]} matrices cannot be shared out to {num_experts} experts")
    for tensor, what in ((weight.packed, "weight"), (offsets_E, "offsets")):
        if tensor.device != x_RK.device:
            raise ValueError(f"{what} is on {tensor.device}, x is on {x_RK.device}")
    for update in updates:
        rank = update.a_ErK.shape[1] if update.a_ErK.ndim == 3 else None
        if tuple(update.a_ErK.shape) != (num_experts, rank, weight.columns):
            raise ValueError(f"A must be [{num_experts}, r, {weight.columns}], got {tuple(update.a_ErK.shape)}")
        if tuple(update.b_ENr.shape) != (num_experts, weight.rows, rank):
            raise ValueError(f"B must be [{num_experts}, {weight.rows}, {rank}], got {tuple(update.b_ENr.shape)}")
        if update.a_ErK.dtype not in _DTYPES:
            raise ValueError(f"A must be float32, float16 or bfloat16, got {update.a_ErK.dtype}")
        if update.b_ENr.dtype != update.a_ErK.dtype:
            raise ValueError(f"B is {update.b_ENr.dtype}, A is {update.a_ErK.dtype}")
        for held, what in ((update.a_ErK, "A"), (update.b_ENr, "B"), (update.x_RK, "the update's x")):
            if held is not None and held.device != x_RK.device:
                raise ValueError(f"{what} is on {held.device}, x is on {x_RK.device}")
        if not 0 <= update.part < weight.packed.shape[0] // num_experts:
            raise ValueError(f"part must be below {weight.packed.shape[0] // num_experts}, got {update.part}")
        if update.x_RK is not None and update.x_RK.shape != x_RK.shape:
            raise ValueError(f"the update's x must be {tuple(x_RK.shape)}, got {tuple(update.x_RK.shape)}")
