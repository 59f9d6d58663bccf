"""The whole expert layer: y[t] = sum over k of w[t, k] * down(gate(gate_up(x[t]))) of expert index[t, k], with LoRA.

One operator, `expertune::expert_mlp`, whose backward keeps the layer's input, the routing and x @ A. It computes gate
and up again, or has kept these too (`ExpertLayer.keeps`), and needs no GEMM of down_proj for that: the router's
gradient is <inter, dInter> with dInter taken before the router's weight is applied. Gradients go to the input, the
router's weights, A and B; the weights are frozen.

Tokens are worked on in chunks, so that what lies between the GEMMs stays within `KernelSettings.working_set_bytes`
whatever the batch is. Tokens are sorted by expert, stably, and combined by the inverse permutation: no atomics, and two
runs give identical bytes. Experts with biases have them added after each GEMM; where something comes after each
expert (a norm), it is differentiated by autograd from the expert's output, computed again.

Routes on a CPU: `fused.py` dequantizes inside the GEMM, all experts in one call; `dequant_gemm.py` dequantizes a
tile once for the recomputation and for the gradient, expert by expert, and runs on any device. On a GPU both are
`grouped.py`, all experts in each launch. `reference.py` is plain float32 with autograd, what all are tested against.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R = T * K routed tokens, E experts, P
parts of the first GEMM (gate and up: 2; ungated: 1), r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.kernels.expert_mlp import operator
from expertune.kernels.expert_mlp.few_tokens import Experts
from expertune.kernels.expert_mlp.layer import ExpertLayer, LayerHandle
from expertune.kernels.expert_mlp.operator import DTYPES, run
from expertune.kernels.expert_mlp.plan import Activation, Chunk
from expertune.kernels.lora import LoraUpdate
from expertune.kernels.nf4 import Nf4Stack

__all__ = ["Activation", "Chunk", "ExpertLayer", "LayerHandle", "LoraUpdate", "expert_mlp", "of_answer"]


def expert_mlp(
    hidden_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    layer: ExpertLayer,
    updates: Sequence[LoraUpdate] = (),
    replay: Sequence[Tensor] = (),
    biases: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Send each token through its experts and sum what comes back.

    Args:
        hidden_TD: [T, D], float32, float16 or bfloat16.
        top_k_index_TK: int64 [T, K].
        top_k_weights_TK: [T, K], floating point.
        gate_up: E * P matrices [F, D]; matrix e * P + p is part p of expert e.
        down: E matrices [D, F].
        layer: the activation between the GEMMs, and how they run.
        updates: low-rank updates; those of one projection are summed.
        replay: what an earlier call with the same arguments returned, laid flat; it is returned again and not computed,
            which is how activation checkpointing is spared the second forward.
        biases: frozen, floating point: of the first GEMM [E, P * F], its parts side by side, and of down [E, D].

    Returns:
        [T, D] of hidden's dtype, and for each update x @ A [R, r] in A's dtype, routed tokens sorted within a chunk.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the value received.
    """
    _check(hidden_TD, top_k_index_TK, top_k_weights_TK, gate_up, down, layer, updates, biases)
    weights = [*gate_up.bytes, *down.bytes, *(biases or ())]
    tokens = Chunk(hidden_TD, top_k_index_TK, top_k_weights_TK)
    inner_size = gate_up.num_matrices // down.num_matrices * gate_up.out_features
    return run(tokens, weights, layer, updates, replay, inner_size)


def of_answer(
    tokens: Chunk,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    layer: ExpertLayer,
    updates: Sequence[LoraUpdate],
    biases: tuple[Tensor, Tensor] | None,
) -> Experts | None:
    """The layer for few tokens while an answer is written, as many as these; None where `expert_mlp` computes it.

    What is given of weights and updates stays as it is meanwhile. Arguments and errors: see `expert_mlp`.
    """
    hidden_TD, top_k_index_TK, top_k_weights_TK = tokens[:3]
    _check(hidden_TD, top_k_index_TK, top_k_weights_TK, gate_up, down, layer, updates, biases)
    return operator.of_answer(tokens, [*gate_up.bytes, *down.bytes, *(biases or ())], layer, updates)


def _check(
    hidden: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    gate_up: Nf4Stack,
    down: Nf4Stack,
    layer: ExpertLayer,
    updates: Sequence[LoraUpdate],
    biases: tuple[Tensor, Tensor] | None,
) -> None:
    num_experts, columns, rows = down.num_matrices, gate_up.in_features, gate_up.out_features
    if hidden.ndim != 2 or hidden.shape[1] != columns:
        raise ValueError(f"hidden must be [tokens, {columns}], got {tuple(hidden.shape)}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be float32, float16 or bfloat16, got {hidden.dtype}")
    if index.ndim != 2 or index.shape[0] != hidden.shape[0] or index.dtype != torch.int64:
        raise ValueError(f"top_k_index must be int64 [{hidden.shape[0]}, k], got {index.dtype} {tuple(index.shape)}")
    if top_k_weights.shape != index.shape or not top_k_weights.is_floating_point():
        raise ValueError(
            f"top_k_weights must be floating point {tuple(index.shape)}, "
            f"got {top_k_weights.dtype} {tuple(top_k_weights.shape)}"
        )
    if (down.out_features, down.in_features) != (columns, rows):
        raise ValueError(f"down must be matrices {(columns, rows)}, got {(down.out_features, down.in_features)}")
    if num_experts == 0 or gate_up.num_matrices % num_experts:
        raise ValueError(f"{gate_up.num_matrices} matrices cannot be shared out to {num_experts} experts")
    parts = gate_up.num_matrices // num_experts
    stacks = [] if layer.handle is not None else [(gate_up.packed, "gate_up"), (down.packed, "down")]
    for tensor, what in (*stacks, (index, "top_k_index")):
        if tensor.device != hidden.device:
            raise ValueError(f"{what} is on {tensor.device}, hidden is on {hidden.device}")
    for bias, width, what in zip(biases or (), (parts * rows, columns), ("gate_up", "down"), strict=False):
        if tuple(bias.shape) != (num_experts, width) or not bias.is_floating_point():
            wanted = (num_experts, width)
            raise ValueError(
                f"the bias of {what} must be floating point {wanted}, got {bias.dtype} {tuple(bias.shape)}"
            )
        if bias.device != hidden.device:
            raise ValueError(f"the bias of {what} is on {bias.device}, hidden is on {hidden.device}")
    for update in updates:
        _check_update(update, hidden, num_experts, parts, (rows, columns))
    for update in updates:
        others = [each for each in updates if each.part == update.part and each is not update]
        if update.gain is not None and any(_share_experts(update, each) for each in others):
            raise ValueError("an update with a gain must be the only one of its part and experts")


def _share_experts(one: LoraUpdate, other: LoraUpdate) -> bool:
    if one.slots is None or other.slots is None:
        return True
    # Of slots on a GPU, or those of a graph that is compiled, nothing can be read at this point.
    is_readable = one.slots.device.type == other.slots.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_readable and bool(((one.slots >= 0) & (other.slots >= 0)).any())


def _check_update(update: LoraUpdate, hidden: Tensor, num_experts: int, parts: int, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if not 0 <= update.part <= parts:
        raise ValueError(f"part must be from 0 to {parts}, got {update.part}")
    if not 0 <= update.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {update.dropout}")
    width, height = (rows, columns) if update.part == parts else (columns, rows)
    rank = update.a.shape[1] if update.a.ndim == 3 else None
    held = num_experts if update.slots is None else len(update.a)
    if tuple(update.a.shape) != (held, rank, width) or held > num_experts:
        raise ValueError(f"A must be [{num_experts}, r, {width}], got {tuple(update.a.shape)}")
    if tuple(update.b.shape) != (held, height, rank):
        raise ValueError(f"B must be [{held}, {height}, {rank}], got {tuple(update.b.shape)}")
    if update.slots is not None and (update.slots.shape, update.slots.dtype) != ((num_experts,), torch.int64):
        raise ValueError(f"slots must be int64 [{num_experts}], got {update.slots.dtype} {tuple(update.slots.shape)}")
    if update.a.dtype not in DTYPES:
        raise ValueError(f"A must be float32, float16 or bfloat16, got {update.a.dtype}")
    if update.b.dtype != update.a.dtype:
        raise ValueError(f"B is {update.b.dtype}, A is {update.a.dtype}")
    if update.gain is not None and (update.gain.dtype, update.gain.shape) != (torch.float32, (held, height)):
        raise ValueError(
            f"the gain must be float32 [{held}, {height}], got {update.gain.dtype} {tuple(update.gain.shape)}"
        )
    given = (update.a, "A"), (update.b, "B"), (update.slots, "slots"), (update.gain, "the gain")
    for tensor, what in given:
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{what} is on {tensor.device}, hidden is on {hidden.device}")
