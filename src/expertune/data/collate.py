"""Collators: sequences of a micro-batch as tensors.

Legend: B sequences of the micro-batch, T tokens, L the fixed length of padded sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from expertune.config import DataConfig
from expertune.data.examples import IGNORE_INDEX
from expertune.errors import DataError

Feature = Mapping[str, list[int]]
"""A sequence of the dataset: `input_ids`, `labels`, `example_ids`, and `position_ids` where it is packed."""


@dataclass(frozen=True)
class PaddingFreeCollator:
    """Concatenate the micro-batch's sequences into one, without padding.

    transformers 5 keeps attention inside each sequence when the positions restart, no attention mask is given, and no
    cache is filled; so the batch holds no mask and switches the cache off, also where the model's config would have it
    on. It says as well where sequences begin, as transformers' `DataCollatorWithFlattening` does: attention that asks
    for it need not search the positions, which on a GPU would have to be waited for.

    Args:
        keep_example_ids: pass the examples' numbers through as `example_ids` (a list of int, not a tensor).
    """

    keep_example_ids: bool = False

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Collate B sequences of T1..TB tokens.

        Returns:
            `input_ids`, `labels`, `position_ids`, int64 [1, T1+..+TB]; `use_cache` False. The first label of each
            sequence is -100: the token before it belongs to another sequence. `cu_seq_lens_q` and `cu_seq_lens_k`,
            int32 [N + 1]: where each of N sequences begins, and T; `max_length_q` and `max_length_k`, int: tokens of
            the longest. The sequences of a pack are counted one by one. Of no sequences: see `_of_none`.
        """
        if not features:
            return _of_none(self.keep_example_ids)
        input_ids: list[int] = []
        labels: list[int] = []
        position_ids: list[int] = []
        for feature in features:
            input_ids += feature["input_ids"]
            labels += [IGNORE_INDEX, *feature["labels"][1:]]
            position_ids += feature.get("position_ids", range(len(feature["input_ids"])))
        bounds = [0, *(index for index, position in enumerate(position_ids) if index and position == 0)]
        bounds.append(len(position_ids))
        cu_seq_lens = torch.tensor(bounds, dtype=torch.int32)
        longest = max(end - start for start, end in pairwise(bounds))
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([input_ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([position_ids]),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "use_cache": False,
        }
        return batch | _example_ids(features, self.keep_example_ids)


@dataclass(frozen=True)
class LeftPaddingCollator:
    """Pad every sequence on the left to one length, each with the positions that it has alone.

    Most families compute the same wherever a sequence begins, for their positions only say how far apart tokens are;
    some scale or turn by the position itself, and would take padding for tokens.

    Args:
        max_length: the length L.
        pad_token_id: id of the padding, which may be EOS: labels are made before padding, so a true EOS is trained.
        keep_example_ids: pass the examples' numbers through as `example_ids` (a list of int, not a tensor).
    """

    max_length: int
    pad_token_id: int
    keep_example_ids: bool = False

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Collate B sequences.

        Returns:
            `input_ids`, `labels` (-100 on padding), `attention_mask` (0 on padding), `position_ids` (0 on padding),
            int64 [B, L].

        Raises:
            DataError: a sequence is longer than L.
        """
        if not features:
            return _of_none(self.keep_example_ids)
        lengths = [len(feature["input_ids"]) for feature in features]
        if max(lengths) > self.max_length:
            raise DataError(
                f"an example has {max(lengths)} tokens, more than the {self.max_length} that it is padded to"
            )
        batch: dict[str, Any] = {
            "input_ids": self._pad([feature["input_ids"] for feature in features], self.pad_token_id),
            "labels": self._pad([feature["labels"] for feature in features], IGNORE_INDEX),
            "attention_mask": self._pad([[1] * length for length in lengths], 0),
            "position_ids": self._pad([list(range(length)) for length in lengths], 0),
        }
        return batch | _example_ids(features, self.keep_example_ids)

    def _pad(self, sequences: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[value] * (self.max_length - len(sequence)) + sequence for sequence in sequences])


def make_collator(
    data: DataConfig, tokenizer: Any, keep_example_ids: bool = False
) -> PaddingFreeCollator | LeftPaddingCollator:
    """The collator that goes with `data.packing`; padding is the tokenizer's pad token, or EOS where it has none."""
    if data.packing == "padded":
        pad = tokenizer.pad_token_id
        return LeftPaddingCollator(data.max_length, tokenizer.eos_token_id if pad is None else pad, keep_example_ids)
    return PaddingFreeCollator(keep_example_ids)


def _of_none(keep_example_ids: bool) -> dict[str, Any]:
    """The batch of a rank that the last examples do not suffice for: no tokens, and no labels."""
    batch: dict[str, Any] = {name: torch.zeros(1, 0, dtype=torch.int64) for name in ("input_ids", "labels")}
    return batch | _example_ids([], keep_example_ids)


def _example_ids(features: Sequence[Feature], keep: bool) -> dict[str, Any]:
    if not keep:
        return {}
    return {"example_ids": [example_id for feature in features for example_id in feature["example_ids"]]}
