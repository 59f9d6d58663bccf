"""Cut a batch into smaller ones, between its rows: a collated one by tokens, a plain sequence of rows by rows.

The parts of a collated batch are what `expertune.data.collate` would have made of fewer rows, so that a step whose loss
is divided by the label tokens of the whole step has the same loss and gradients, up to the order of sums.

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


def size(batch: Any) -> int:
    """Tokens of a collated batch, rows of a sequence of rows."""
    return num_tokens(batch) if isinstance(batch, Mapping) else len(batch)


def cut(batch: Any, most: int | None) -> list[Any]:
    """Halve a collated batch, and its halves, until each has at most so many tokens or a single row.

    Args:
        batch: `input_ids`, `labels` and whatever else goes with them by row: [B, L], or [1, T] with `cu_seq_lens_q`,
            int32 [N + 1]. Or a sequence of rows, which is not halved but taken `most` rows at a time.
        most: see `size`; None leaves the batch whole.

    Returns:
        The parts in the order of their rows; the batch itself where it is not cut.
    """
    if most is None or size(batch) <= most:
        return [batch]
    if not isinstance(batch, Mapping):
        return [batch[first : first + most] for first in range(0, len(batch), most)]
    return [part for half in halve(batch) for part in cut(half, most)] or [batch]


def halve(batch: Any) -> list[Any]:
    """Two parts, cut between the rows nearest to the middle; empty where there is a single row.

    Of two places as near, the later one: three rows of one length become two and one.
    """
    if not isinstance(batch, Mapping):
        middle = -(-len(batch) // 2)
        return [batch[:middle], batch[middle:]] if len(batch) > 1 else []
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
