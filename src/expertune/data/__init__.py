"""The data room: from a file or hub dataset to token rows that a model can be trained on.

    source -> layout -> template -> tokens -> data check -> rows -> packing -> collator

`prepare_rows` walks that line; `make_dataset` and `make_collator` hand its rows to the trainer.
"""

from expertune.data.collate import LeftPaddingCollator, PaddingFreeCollator, make_collator
from expertune.data.encode import encode_prompt
from expertune.data.lengths import plot_lengths
from expertune.data.packing import make_dataset, pack_rows
from expertune.data.prepare import prepare_rows, prepare_run, render_prompt, settled
from expertune.data.rows import IGNORE_INDEX, TokenizedRow, TokenizedRows
from expertune.data.template import shipped_templates

__all__ = [
    "IGNORE_INDEX",
    "LeftPaddingCollator",
    "PaddingFreeCollator",
    "TokenizedRow",
    "TokenizedRows",
    "encode_prompt",
    "make_collator",
    "make_dataset",
    "pack_rows",
    "plot_lengths",
    "prepare_rows",
    "prepare_run",
    "render_prompt",
    "settled",
    "shipped_templates",
]
