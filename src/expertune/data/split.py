"""Split a batch into smaller ones, between its sequences.

The parts of a collated batch are what `expertune.data.collate` would have made of fewer sequences, so that a step whose
loss is divided by the label tokens of the whole step has the same loss and gradients, up to the order of sums.

Shape suffixes: B sequences of a padded batch, L their length, T tokens of a concatenated batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]

NUM_EXAMPLES = "num_examples"
"""In a batch of pairs or labeled answers: how many examples it has, none of which is ever in two parts."""


def size(batch: Any) -> int:
    """Tokens of a collated batch as they are computed on, padding included; the length of a list of prompts."""
    return int(batch["input_ids"].numel()) if isinstance(batch, Mapping) else len(batch)


def split(batch: Any, most: int | None) -> list[Any]:
    """Halve a collated batch, and its halves, until each has at most `most` tokens or a single sequence.

    Args:
        batch: `input_ids`, `labels` and what else belongs to each sequence: [B, L], or [1, T] with `cu_seq_lens_q`,
            int32 [num_sequences + 1]. Or one of `NUM_EXAMPLES`, split between examples. Or a list of prompts, which is
            taken `most` at a time.
        most: see `size`; None leaves the batch whole.
    """
    if most is None or size(batch) <= most:
        return [batch]
    if not isinstance(batch, Mapping):
        return [batch[first : first + most] for first in range(0, len(batch), most)]
    return [part for half in halve(batch) for part in split(half, most)] or [batch]


def halve(batch: Any) -> list[Any]:
    """Two parts, split between the sequences nearest to the middle; empty where there is a single sequence.

    Of two places as near, the later one: three sequences of one length become two and one.
    """
    if not isinstance(batch, Mapping):
        middle = -(-len(batch) // 2)
        return [batch[:middle], batch[middle:]] if len(batch) > 1 else []
    if NUM_EXAMPLES in batch:
        return _halve_examples(batch)
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].tolist()
    else:
        num_sequences, length = batch["input_ids"].shape
        bounds = [sequence * length for sequence in range(num_sequences + 1)]
    places = range(1, len(bounds) - 1)
    if not places:
        return []
    at = min(places, key=lambda place: (abs(2 * bounds[place] - bounds[-1]), -place))
    return [_take(batch, bounds, 0, at), _take(batch, bounds, at, len(bounds) - 1)]


def _halve_examples(batch: Batch) -> list[Any]:
    """Two parts of a batch whose examples have several sequences, or none.

    Row i of a tensor belongs to example i modulo their number: the chosen answers of all pairs come first.
    """
    count = batch[NUM_EXAMPLES]
    if count < 2 or "KL_input_ids" in batch:  # which makes a term of all of them together
        return []
    at = -(-count // 2)
    return [_take_examples(batch, range(at)), _take_examples(batch, range(at, count))]


def _take_examples(batch: Batch, examples: range) -> Batch:
    count, taken = batch[NUM_EXAMPLES], dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            taken[name] = value.unflatten(0, (-1, count))[:, examples.start : examples.stop].flatten(0, 1)
    taken[NUM_EXAMPLES] = len(examples)
    taken["example_ids"] = batch.get("example_ids", [])[examples.start : examples.stop]
    return taken


def _take(batch: Batch, bounds: list[int], first: int, end: int) -> Batch:
    """Sequences `first` to `end`; `bounds` says in tokens where each starts, and where the last one ends."""
    concatenated = "cu_seq_lens_q" in batch
    taken = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == batch["input_ids"].shape:
            part = value[:, bounds[first] : bounds[end]] if concatenated else value[first:end]
            taken[name] = part.contiguous()
    example_ids = batch.get("example_ids")
    if example_ids is not None and len(example_ids) == len(bounds) - 1:
        taken["example_ids"] = example_ids[first:end]
    if concatenated:
        starts = torch.tensor([bound - bounds[first] for bound in bounds[first : end + 1]], dtype=torch.int32)
        taken["cu_seq_lens_q"] = taken["cu_seq_lens_k"] = starts.to(batch["cu_seq_lens_q"].device)
        taken["max_length_q"] = taken["max_length_k"] = int(starts.diff().max())
    return taken
