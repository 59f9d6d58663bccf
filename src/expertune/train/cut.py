"""Cut a collated micro-batch into smaller ones, between its rows.

The parts are what `expertune.data.collate` would have made of fewer rows, so that a step whose loss is divided by the
label tokens of the whole step has the same loss and gradients, up to the order of sums.

Shape suffixes: B rows of a padded batch, L their length, T tokens of a concatenated batch, N its rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch as they are computed on, padding included."""
    return int(batch["input_ids"].numel())


def cut(batch: Batch, most_tokens: int | None) -> list[Batch]:
    """Halve a batch, and its halves, until each has at most so many tokens or a single row.

    Args:
        batch: `input_ids`, `labels` and whatever else goes with them by row: [B, L], or [1, T] with `cu_seq_lens_q`,
            int32 [N + 1].
        most_tokens: see `num_tokens`; None leaves the batch whole.

    Returns:
        The parts in the order of their rows; the batch itself where it is not cut.
    """
    if most_tokens is None or num_tokens(batch) <= most_tokens:
        return [batch]
    return [part for half in halve(batch) for part in cut(half, most_tokens)] or [batch]


def halve(batch: Batch) -> list[Batch]:
    """Two parts, cut between the rows nearest to the middle; empty where there is a single row.

    Of two places as near, the later one: three rows of one length become two and one.
    """
    bounds = _bounds(batch)
    tokens = bounds[-1]
    places = range(1, len(bounds) - 1)
    if not places:
        return []
    at = min(places, key=lambda place: (abs(2 * bounds[place] - tokens), -place))
    return [_take(batch, bounds, 0, at), _take(batch, bounds, at, len(bounds) - 1)]


def _bounds(batch: Batch) -> list[int]:
    """Where rows begin, in tokens, and where the last one ends."""
    if "cu_seq_lens_q" in batch:
        bounds: list[int] = batch["cu_seq_lens_q"].tolist()
        return bounds
    num_rows, length = batch["input_ids"].shape
    return [row * length for row in range(num_rows + 1)]


def _take(batch: Batch, bounds: list[int], first: int, end: int) -> Batch:
    """Rows `first` to `end`."""
    concatenated = "cu_seq_lens_q" in batch
    shape = batch["input_ids"].shape
    taken = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            part = value[:, bounds[first] : bounds[end]] if concatenated else value[first:end]
            taken[name] = part.contiguous()
    row_ids = batch.get("row_ids")
    if row_ids is not None and len(row_ids) == len(bounds) - 1:
        taken["row_ids"] = row_ids[first:end]
    if concatenated:
        starts = torch.tensor([bound - bounds[first] for bound in bounds[first : end + 1]], dtype=torch.int32)
        taken["cu_seq_lens_q"] = taken["cu_seq_lens_k"] = starts.to(batch["cu_seq_lens_q"].device)
        longest = max(bounds[row + 1] - bounds[row] for row in range(first, end))
        taken["max_length_q"] = taken["max_length_k"] = longest
    return taken
