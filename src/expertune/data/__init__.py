"""The data room: from a file or hub dataset to tokenized examples that a model can be trained on.

    source -> layout -> template -> tokens -> data check -> examples -> packing -> collator

`prepare_examples` walks that line; `make_dataset` and `make_collator` hand its examples to the trainer. What the room
gives is imported when it is asked for: a plan finds files of examples without a tokenizer.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "collate": ("LeftPaddingCollator", "PaddingFreeCollator", "make_collator"),
    "encode": ("encode_prompt",),
    "examples": ("IGNORE_INDEX", "TokenizedExample", "TokenizedExamples"),
    "lengths": ("plot_lengths",),
    "packing": ("make_dataset", "pack_examples", "sequences_of"),
    "prepare": ("prepare_examples", "prepare_run", "settled"),
    "questions": ("Question", "Questions"),
    "template": ("shipped_templates",),
}

if not TYPE_CHECKING:  # which would take every name for one of the package's

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(_import_module(f"expertune.data.{module}"), name)
        raise AttributeError(f"module 'expertune.data' has no attribute {name!r}")
