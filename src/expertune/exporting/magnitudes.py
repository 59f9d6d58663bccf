"""DoRA folded: rows of W + scale * B @ A, each scaled to its magnitude."""

import torch
from torch import Tensor

NONE = float("nan")
"""In the place of a row's magnitude: the row has none, and stays as it is."""


def scale_rows(rows: Tensor, magnitudes: Tensor) -> Tensor:
    """Scale float32 rows [N, K] in place to the magnitudes [N] of their output features."""
    norms = torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-30)
    return rows.mul_(torch.where(magnitudes.isnan(), 1.0, magnitudes.float() / norms).unsqueeze(1))
