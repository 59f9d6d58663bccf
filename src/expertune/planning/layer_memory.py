"""What one layer of a micro-batch takes: what it keeps from forward for backward, and what it computes with.

All of it is in bytes, and an upper bound from shapes. Suffixes are those of `expertune.planning.memory`.
"""

from expertune.experts.spec import ExpertsSpec
from expertune.kernels.amounts import (
    BFLOAT16,
    FLOAT32,
    LINEAR_PART_BYTES,
    PANEL_BYTES,
    TILE_BYTES,
    bytes_per_gained_token,
    bytes_per_routed_token,
    kept_bytes_per_routed_token,
    scratch_bytes,
)
from expertune.kernels.processor import processor
from expertune.planning.inventory import Layer
from expertune.planning.settings import Workload

FLOAT32_BYTES = 4


def kept_by_layer(w: Workload, layer: Layer) -> int:
    """What a layer's forward keeps for its backward.

    A norm keeps its input in float32. PEFT keeps the input of each adapted linear in the adapter's dtype (a GPU's
    dropout a copy beside it), and x @ A. A linear outside attention keeps its output, and what an activation makes of
    it. A router keeps its logits, and indices and weights of the chosen experts. Where experts are shared out, a
    process keeps a row for each of its experts that a token is for.
    """
    attention = w.inventory.attention
    # On a CPU attention of short sequences computes in float32.
    attended = FLOAT32_BYTES if w.device == "cpu" else w.compute_dtype.itemsize
    per_token = FLOAT32_BYTES * sum(layer.norms) + attended * attention.widths + FLOAT32_BYTES * attention.heads
    copies = 2 if w.dropout and w.device != "cpu" else 1
    for name, (out_features, in_features) in layer.linears.items():
        if name in w.targets.linears:
            rank = w.given_ranks * w.targets.linears[name].rank
            per_token += (copies * in_features + rank) * w.adapter_dtype.itemsize
        if "att" not in name.split(".")[-2]:
            per_token += 2 * out_features * w.compute_dtype.itemsize
    for spec in layer.experts.values():
        per_token += spec.num_experts * FLOAT32_BYTES + 16 * w.inventory.top_k
        per_token += w.rows_per_token * spec.hidden_size * w.compute_dtype.itemsize
    return w.tokens * per_token + _kept_scores(w) + kept_by_experts(w, layer) + w.given_factor_bytes(layer)


def kept_by_experts(w: Workload, layer: Layer) -> int:
    """What a layer's experts keep: [T, D], their input or what they return, and x @ A of each projection [R, r]."""
    per_token = 0
    for name, spec in layer.experts.items():
        ranks = sum(rank for rank, _ in w.targets.experts.get(name, {}).values())
        per_token += spec.hidden_size * w.compute_dtype.itemsize
        per_token += w.inventory.top_k * w.given_ranks * ranks * w.adapter_dtype.itemsize
    return w.tokens * per_token


def gate_up(w: Workload) -> list[int]:
    """Gate and up [R, P * F] of all routed tokens: what an expert layer keeps for backward if told to.

    Of each expert layer that has a backward, the last first: in this order layers are told to. Where experts are shared
    out, an upper bound: all ranks' tokens may choose the experts that a rank has.
    """
    ranks = w.inventory.distribution.expert_ranks
    return [
        ranks
        * w.tokens
        * min(w.inventory.top_k, w.inventory.experts_here(spec))
        * kept_bytes_per_routed_token(spec.intermediate_size, len(spec.projections) - 1, w.compute_dtype)
        for layer in w.inventory.layers[_first_with_backward(w) :]
        for spec in layer.experts.values()
    ][::-1]


def _first_with_backward(w: Workload) -> int:
    """The first layer in which something is adapted; 0 where something is that lies in none by its name."""
    adapted = {*w.targets.linears, *w.targets.experts, *w.targets.router}
    found = [adapted.intersection(layer.linears.keys() | layer.experts.keys()) for layer in w.inventory.layers]
    if adapted.difference(*found):
        return 0
    return next((index for index, names in enumerate(found) if names), 0)


def computing(w: Workload, layer: Layer) -> int:
    """What a layer computes with: routed tokens, a linear, or scores; and the dequantized weights of one linear.

    Of a linear its output and its update in float32, and their gradients.
    """
    widest = max((out_features for out_features, _ in layer.linears.values()), default=0)
    around_linears = 4 * w.tokens * widest * FLOAT32_BYTES
    routed = sum(_between_gemms(w, spec) for spec in layer.experts.values())
    dequantized = [rows * columns * w.compute_dtype.itemsize for rows, columns in layer.linears.values()]
    if w.targets.use_dora:
        dequantized += [_dora_of_linear(w, *layer.linears[name]) for name in w.targets.linears.keys() & layer.linears]
    # On a GPU dequantized experts are in the working set.
    tile = max(TILE_BYTES["cpu"], _scratch_of_threads(w, layer)) if w.device == "cpu" else 0
    # Of factors that are put together for a layer, the gradient, and the sum of its halves.
    given = w.given_factor_bytes(layer) * 3 // 2
    return max(routed, around_linears, scores(w, 3 * w.sequence_length)) + max(tile, *dequantized, 0) + given


def experts_compute_in(w: Workload, layer: Layer) -> int:
    """On a CPU: a chunk of routed tokens, tokens and their gradient in float32, and what threads lay out for GEMMs.

    All of it is the fused route's, which makes no dropped inputs.
    """
    if w.device != "cpu":
        return 0
    routed = sum(_routed_at_once(w, spec, dropped=False) for spec in layer.experts.values())
    copied = 0 if w.compute_dtype == FLOAT32 else 2 * w.tokens * w.inventory.hidden_size * FLOAT32_BYTES
    return routed + copied + _scratch_of_threads(w, layer)


def linears_compute_in(w: Workload) -> int:
    """On a CPU: what linears are given and give in float32 where tokens are of 16 bits.

    The output head is among them where all logits are made on a CPU that multiplies no 16-bit floats: some of its
    features at a time, and beside its input's gradient what the others have given.
    """
    if w.device != "cpu" or w.compute_dtype == FLOAT32:
        return 0
    shapes = [shape for layer in w.inventory.layers for shape in layer.linears.values()]
    each = w.tokens * max((size for shape in shapes for size in shape), default=0) * FLOAT32_BYTES
    if not w.full_logits or processor().gemm_dtype(w.compute_dtype) != FLOAT32:
        return 2 * each
    hidden_states = w.tokens * w.inventory.hidden_size * FLOAT32_BYTES
    part = min(LINEAR_PART_BYTES, w.tokens * w.inventory.vocab_size * FLOAT32_BYTES)
    return 2 * max(each, hidden_states, part) + hidden_states


def _scratch_of_threads(w: Workload, layer: Layer) -> int:
    """Panels of each thread; and an expert's tokens as GEMMs in bfloat16 lay them out, at most all at one expert."""
    here = processor()
    if w.compute_dtype != BFLOAT16 or here.gemm_dtype(BFLOAT16) != BFLOAT16:
        return here.threads * PANEL_BYTES
    contracted = [size for shape in layer.linears.values() for size in shape]
    for spec in layer.experts.values():
        contracted += [spec.hidden_size, (len(spec.projections) - 1) * spec.intermediate_size]
    return here.threads * (PANEL_BYTES + scratch_bytes(w.tokens, max(contracted, default=0)))


def _dora_of_linear(w: Workload, out_features: int, in_features: int) -> int:
    """What PEFT computes a linear's norms from: an identity, the update and W, each twice, and what it makes of tokens.

    W is the identity's size at most where that is square; the update is kept in the adapter's dtype.
    """
    wide = max(out_features, in_features)
    matrices = 4 * out_features * in_features + in_features * in_features
    return FLOAT32_BYTES * (matrices + 3 * w.tokens * wide)


def _between_gemms(w: Workload, spec: ExpertsSpec) -> int:
    """Routed tokens between an expert layer's GEMMs, and its input, output and their gradients [T, D] in float32.

    On a GPU half of the working set is for routed tokens and half for dequantized weights, of one expert at least.
    """
    D, F, num_parts = spec.hidden_size, spec.intermediate_size, len(spec.projections) - 1
    routed = _routed_at_once(w, spec, dropped=w.dropout)  # by either route
    around = 4 * (1 + w.rows_per_token) * w.tokens * D * FLOAT32_BYTES
    if w.device == "cpu":
        return routed + around
    half, one_expert = w.working_set_bytes // 2, (num_parts + 1) * D * F * w.compute_dtype.itemsize
    return routed + min(w.inventory.experts_here(spec) * one_expert, max(half, one_expert)) + around


def _routed_at_once(w: Workload, spec: ExpertsSpec, dropped: bool) -> int:
    """A chunk of routed tokens between the GEMMs, with dropped inputs or without."""
    D, F, num_parts = spec.hidden_size, spec.intermediate_size, len(spec.projections) - 1
    in_gemm = spec.has_gate and not spec.has_bias  # the activation, as far as shapes tell
    per_routed_token = bytes_per_routed_token(D, F, num_parts, in_gemm, dropped, w.device)
    if w.targets.use_dora:
        per_routed_token += bytes_per_gained_token(D, F, num_parts)
    budget = w.working_set_bytes if w.device == "cpu" else w.working_set_bytes // 2
    return min(w.tokens * w.inventory.top_k * per_routed_token, budget)


def scores(w: Workload, num_tokens: int) -> int:
    """Attention scores that a layer computes with.

    An eager attention has those of all sequences at once: masked, beside what they were before, and their softmax,
    perhaps in float32. So has torch's own on a CPU where values are not as wide as keys, but sequence by sequence: then
    in float32, of so many tokens.
    """
    attention = w.inventory.attention
    if attention.eager:
        return attention.heads * _eager_scores(w) * (2 * w.compute_dtype.itemsize + FLOAT32_BYTES)
    return FLOAT32_BYTES * attention.heads * num_tokens * w.sequence_length if _math_on_cpu(w) else 0


def _kept_scores(w: Workload) -> int:
    """Attention scores kept for backward: in float32, and of an eager attention also as it uses them."""
    attention = w.inventory.attention
    if attention.eager:
        return attention.heads * _eager_scores(w) * (FLOAT32_BYTES + w.compute_dtype.itemsize)
    return attention.heads * w.tokens * w.sequence_length * FLOAT32_BYTES if _math_on_cpu(w) else 0


def _eager_scores(w: Workload) -> int:
    """Scores of a head of an eager attention: [T, S], and [T, T] where a mask alone keeps the sequences apart."""
    return w.tokens * (w.tokens if w.concatenates else w.sequence_length)


def _math_on_cpu(w: Workload) -> bool:
    """Whether torch's attention computes all scores of a sequence at once."""
    return w.device == "cpu" and w.inventory.attention.query != w.inventory.attention.output
