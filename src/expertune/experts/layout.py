"""How one expert's tensors lie in the family's live module, and how they lie in this one: both ways.

Here an expert is separate matrices [out_features, in_features], one for each projection, and its biases stand part by
part. A family may multiply from the other side (`is_transposed`), and its gate and up outputs may alternate instead of
standing side by side (`is_concatenated` is false). Everything that knows of this is in this file.

Shape suffixes: D hidden size, F intermediate size, P parts of the first product (gate and up: 2; ungated: 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.experts.contract import ExpertsSpec


def fused_projections(spec: ExpertsSpec, weight: str) -> tuple[str, ...]:
    """The projections that one of `spec.weight_names` holds, or its bias."""
    return ("down",) if weight.startswith("down") else spec.projections[:-1]


def to_matrices(spec: ExpertsSpec, weight: str, live: Tensor) -> tuple[Tensor, ...]:
    """One expert's slice of a live stack as a matrix for each projection.

    Args:
        spec: of the experts module.
        weight: which of `spec.weight_names`.
        live: the slice, laid out as the family does: [P * F, D] or [D, F], or the transpose of these.

    Returns:
        For each of `fused_projections` a matrix [out_features, in_features]; views where possible.
    """
    return split_rows(spec, weight, live.T if spec.is_transposed else live)


def split_rows(spec: ExpertsSpec, weight: str, rows: Tensor) -> tuple[Tensor, ...]:
    """The same of one expert's rows [out_features, ...], whatever stands in a row: weights, bytes, scales; views."""
    count = len(fused_projections(spec, weight))
    return rows.chunk(count) if spec.is_concatenated else tuple(rows[part::count] for part in range(count))


def are_rows_together(spec: ExpertsSpec, weight: str) -> bool:
    """Whether the rows of each projection follow each other."""
    return spec.is_concatenated or len(fused_projections(spec, weight)) == 1


def to_bias(spec: ExpertsSpec, weight: str, live_EN: Tensor) -> Tensor:
    """Biases of all experts, part by part, from the family's: both [E, P * F] or [E, D]."""
    return torch.cat(split_rows(spec, weight, live_EN.T), dim=0).T.contiguous()


def to_activation(spec: ExpertsSpec, gate_up: Tensor) -> Tensor:
    """Rows [R, P * F] of the first product, part by part, as the family's own `_apply_gate` takes them."""
    if spec.is_concatenated:
        return gate_up
    return gate_up.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def join_rows(spec: ExpertsSpec, weight: str, parts: Sequence[Tensor]) -> Tensor:
    """The way back from `split_rows`: the family's rows from those of each projection."""
    return torch.cat(tuple(parts)) if spec.is_concatenated else torch.stack(tuple(parts), dim=1).flatten(0, 1)
