"""What a decoder layer keeps from its forward to its backward, and what it holds while it computes.

Shape suffixes: T tokens of a micro-batch, D hidden size, F intermediate size, P parts of the first product, E experts,
K experts per token, R = T * K routed rows, r rank.
"""

from expertune.checkpoint.targets import ResolvedTargets
from expertune.experts.contract import ExpertsSpec
from expertune.kernels.dequant_gemm import TILE_BYTES
from expertune.kernels.expert_mlp.plan import bytes_per_routed_token
from expertune.planning.inventory import Inventory, Layer
from expertune.planning.settings import Settings

_FLOAT32_BYTES = 4

# Rows of the largest expert over those of the mean one; routing is never even.
_BUSIEST = 1.5


def layer_adapter(layer: Layer, inventory: Inventory, targets: ResolvedTargets) -> int:
    """Weights of the adapter on a layer's linears and experts."""
    adapted = {name: shape for name, shape in layer.linears.items() if name in targets.linears}
    count = sum(targets.linears[name][0] * sum(shape) for name, shape in adapted.items())
    for name, spec in layer.experts.items():
        ranks = targets.experts.get(name, {})
        count += spec.num_experts * sum(rank * sum(spec.shape(part)) for part, (rank, _) in ranks.items())
    return count


def kept_bytes(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that stay of a layer from its forward to its backward."""
    if not settings.checkpointing:
        return kept_by_layer(layer, inventory, targets, settings)
    # A checkpointed layer keeps its input; its experts keep what they returned, so that they are not run again.
    hidden_states = settings.tokens * inventory.hidden_size * settings.compute_dtype.itemsize
    return hidden_states + _kept_by_experts(layer, inventory, targets, settings)


def kept_by_layer(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that a layer's forward keeps for its backward; held to what autograd saves, tensor by tensor."""
    itemsize, attention = settings.compute_dtype.itemsize, inventory.attention
    # A norm computes in float32 and keeps its input so. Rotated queries and keys, values, and what attention gives.
    per_token = _FLOAT32_BYTES * sum(layer.norms) + attention.kept_bytes(itemsize, settings.row_length, settings.device)
    shared = settings.adapter_dtype == settings.compute_dtype and not settings.dropout
    # Dropout keeps a mask beside its result on a GPU; on a CPU it counts instead.
    copies = 2 if settings.dropout and settings.device != "cpu" else 1
    blocks = set()
    for name, (rows, columns) in layer.linears.items():
        block = name.rpartition(".")[0]
        if name in targets.linears:
            # PEFT keeps the adapter's input in the adapter's dtype: a copy for each linear, unless it is the same.
            per_token += 0 if shared else copies * columns * settings.adapter_dtype.itemsize
            per_token += targets.linears[name][0] * settings.adapter_dtype.itemsize
            blocks.add(block)
        if "att" not in block.rpartition(".")[2]:
            # A gated block keeps gate, what the activation makes of it, and up: three halves of what gate and up give.
            per_token += rows * itemsize if rows == inventory.hidden_size else 3 * rows * itemsize // 2
    per_token += len(blocks) * inventory.hidden_size * itemsize if shared else 0
    routed = sum(spec.num_experts * _FLOAT32_BYTES + 2 * inventory.top_k * 8 for spec in layer.experts.values())
    return settings.tokens * (per_token + routed) + _kept_by_experts(layer, inventory, targets, settings)


def _kept_by_experts(layer: Layer, inventory: Inventory, targets: ResolvedTargets, settings: Settings) -> int:
    """Bytes that a layer's experts keep: [T, D], their input or what they return, and x @ A of each update [R, r]."""
    per_token = 0
    for name, spec in layer.experts.items():
        ranks = sum(rank for rank, _ in targets.experts.get(name, {}).values())
        per_token += spec.hidden_size * settings.compute_dtype.itemsize
        per_token += inventory.top_k * ranks * settings.adapter_dtype.itemsize
    return settings.tokens * per_token


def extra_in_backward(layer: Layer, inventory: Inventory, settings: Settings) -> int:
    """Bytes alive in a layer's backward beside what its forward kept: experts' rows, a decoded tile, gradients."""
    itemsize = settings.compute_dtype.itemsize
    rows = [_between_products(spec, inventory, settings) for spec in layer.experts.values()]
    decoded_linears = [rows * columns * itemsize for rows, columns in layer.linears.values()]
    # On a CPU a tile is at most the whole matrix, gate and up side by side; elsewhere it is in the working set.
    tiles = [
        min(TILE_BYTES["cpu"], 2 * spec.hidden_size * spec.intermediate_size * itemsize)
        for spec in layer.experts.values()
        if settings.device == "cpu"
    ]
    # A linear's output and its update in float32, and their gradients.
    widest = max((rows for rows, _ in layer.linears.values()), default=0)
    around_linears = 4 * settings.tokens * widest * _FLOAT32_BYTES
    scores = inventory.attention.scores_bytes(settings.row_length, settings.device)
    return max([sum(rows), around_linears, scores]) + max([0, *decoded_linears, *tiles])


def _between_products(spec: ExpertsSpec, inventory: Inventory, settings: Settings) -> int:
    """Bytes of an expert layer's rows between its products, and of its input, output and their gradients in float32.

    On a GPU half of the working set is for rows and half for decoded weights, of one expert at least.
    """
    parts = len(spec.projections) - 1
    row = bytes_per_routed_token(
        spec.hidden_size, spec.intermediate_size, parts, spec.has_gate, settings.dropout, settings.device
    )
    whole = settings.tokens * inventory.top_k * row
    around = 4 * settings.tokens * spec.hidden_size * _FLOAT32_BYTES
    if settings.device == "cpu":
        held = min(whole, settings.working_set_bytes)
        return (_expert_by_expert(spec, parts, held // row, settings) if settings.expert_by_expert else held) + around
    half = settings.working_set_bytes // 2
    one_expert = (parts + 1) * spec.hidden_size * spec.intermediate_size * settings.compute_dtype.itemsize
    return min(whole, half) + min(spec.num_experts * one_expert, max(half, one_expert)) + around


def _expert_by_expert(spec: ExpertsSpec, parts: int, rows: int, settings: Settings) -> int:
    """The route that decodes first takes one expert's rows at a time, and holds the input's gradient of all, float32.

    An expert's: gate and up and their gradients, what the activation makes of them and keeps, some of it in float32 for
    the adapters.
    """
    itemsize = settings.compute_dtype.itemsize
    inner = (3 * parts + 4) * itemsize + 2 * _FLOAT32_BYTES
    outer = 2 * itemsize + 2 * _FLOAT32_BYTES
    busiest = min(int(_BUSIEST * rows / spec.num_experts) + 1, rows)
    one = busiest * (inner * spec.intermediate_size + outer * spec.hidden_size)
    return rows * spec.hidden_size * _FLOAT32_BYTES + one
