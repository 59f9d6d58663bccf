"""The section `data`."""

from typing import Literal

from pydantic import Field

from expertune.config.sections import PathText, Section, Sources

_Answers = Literal["dolly", "alpaca", "prompt-completion", "prompt-completion-messages", "messages", "sharegpt", "text"]
_Preferences = Literal["preference", "preference-messages", "unpaired-preference", "unpaired-preference-messages"]
DataFormat = Literal["auto", _Answers, _Preferences, "prompt-only", "prompt-only-messages"]


class DataConfig(Section):
    """Where the examples come from and how they become token sequences.

    Attributes:
        train: path, glob or hub name of the training examples, with an optional `[a:b]` slice of each file, e.g.
            `rows.jsonl[0:800]`; or a list of these.
        eval: the same for evaluation examples; None means no evaluation.
        format: layout of an example; `auto` recognizes it from the first example's columns and the run's objective.
        columns: renames before the layout is read: our column name -> the file's, e.g. `{prompt: ref, completion: mr}`.
        template: name of a template that ships with Expertune, path of a Jinja file, `chat` for the tokenizer's own
            chat template, or None for the layout's default.
        parse_special_tokens: special tokens that the examples' own text spells out (`</s>`) become special tokens. Off,
            they are text, and only the template writes special tokens.
        max_length: tokens of an example after which it is cut.
        train_on: `completion` takes the loss on the answer only, `all` on the prompt as well (padding never).
        packing: `padding-free` concatenates a micro-batch's sequences; `packed` fills sequences of `max_length` tokens
            in advance; `padded` pads every sequence on the left to `max_length`. Attention never crosses examples.
        merge_accumulation: run a step's accumulated micro-batches as one, or as few, where the plan's memory allows it
            and the step stays the same; not with `padded`.
        on_error: `stop` refuses the run at a bad example; `skip` drops bad examples and counts them.
    """

    train: Sources
    eval: Sources | None = None
    format: DataFormat = "auto"
    columns: dict[str, str] = {}
    template: PathText | None = None
    parse_special_tokens: bool = False
    max_length: int = Field(default=1024, ge=8)
    train_on: Literal["completion", "all"] = "completion"
    packing: Literal["padding-free", "packed", "padded"] = "padding-free"
    merge_accumulation: bool = True
    on_error: Literal["stop", "skip"] = "stop"
