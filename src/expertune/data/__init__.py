"""The data room: from a file or hub dataset to tokenized examples that a model can be trained on.

    source -> layout -> template -> tokens -> data check -> examples -> packing -> collator

`prepare_examples` walks that line; `make_dataset` and `make_collator` hand its examples to the trainer.
"""

from expertune.data.collate import LeftPaddingCollator, PaddingFreeCollator, make_collator
from expertune.data.encode import encode_prompt
from expertune.data.examples import IGNORE_INDEX, TokenizedExample, TokenizedExamples
from expertune.data.lengths import plot_lengths
from expertune.data.packing import make_dataset, pack_examples, sequences_of
from expertune.data.prepare import prepare_examples, prepare_run, settled
from expertune.data.questions import Question, Questions
from expertune.data.template import shipped_templates

__all__ = [
    "IGNORE_INDEX",
    "LeftPaddingCollator",
    "PaddingFreeCollator",
    "Question",
    "Questions",
    "TokenizedExample",
    "TokenizedExamples",
    "encode_prompt",
    "make_collator",
    "make_dataset",
    "pack_examples",
    "plot_lengths",
    "prepare_examples",
    "prepare_run",
    "sequences_of",
    "settled",
    "shipped_templates",
]
