"""The data check: it stops a run before a step is spent on examples that cannot teach what they should.

Readers, layouts and templates raise `ExampleError` for a single example; the checks on finished token examples are
here. What happens to the examples that failed is one decision in one place: `stop_or_skip`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertune.config.yaml_file import shortened
from expertune.data.examples import IGNORE_INDEX, TokenizedExamples
from expertune.errors import DataError

NUM_SHOWN = 5
NUM_KEPT = 20


class ExampleError(DataError):
    """One example cannot be used. The message says what is wrong and how to fix it; the place is added later."""


class FlaggedError(ExampleError):
    """The data's own flags say that nothing of the example is trained: it is left out and counted, not refused."""


@dataclass(frozen=True)
class Problem:
    """An example that failed: its place and what is wrong with it."""

    place: str
    message: str

    def __str__(self) -> str:
        # A message may quote the example, which may hold anything.
        return f"{self.place}: {shortened(self.message, 500)}"


@dataclass
class Problems:
    """The examples of a source that failed: how many, and the first of them.

    Attributes:
        num: how many.
        first: the first `NUM_KEPT`, in order.
    """

    num: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, place: str, message: str) -> None:
        """One more."""
        self.num += 1
        if self.num <= NUM_KEPT:
            self.first.append(Problem(place, message))


def check_answer(name: str, answer: str) -> None:
    """An answer must hold something to learn.

    Raises:
        ExampleError: it is empty or white space only.
    """
    if not answer.strip():
        raise ExampleError(f"empty completion: {name} holds no text; fill it in or delete the example")


def check_unicode(text: str) -> None:
    """A text must be encodable: JSON's \\ud83d without its second half reads as a string, but it is no character.

    Raises:
        ExampleError: the text holds half a surrogate pair.
    """
    if half := half_character(text):
        raise ExampleError(
            f"half a surrogate pair, {half!a}, is not a character; repair the text or delete the example"
        )


def half_character(text: str) -> str | None:
    """The first half of a surrogate pair that a text holds by itself; None where it can be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def check_tokens(input_ids: Sequence[int], labels: Sequence[int], uncut_length: int, tokenizer: Any) -> None:
    """Check a finished example: something is trained, the answer's end is trained, and no padding lies inside.

    Args:
        input_ids: the example's ids after the cut.
        labels: its labels, as long as `input_ids`.
        uncut_length: tokens before the cut at `max_length`.
        tokenizer: the tokenizer that made the ids.

    Raises:
        ExampleError: one of the three does not hold.
    """
    truncated = uncut_length > len(input_ids)
    trained = [label for label in labels if label != IGNORE_INDEX]
    if not trained and truncated:
        raise ExampleError(
            f"no label is left: the example has {uncut_length} tokens and the cut at {len(input_ids)} falls before its "
            "answer; raise data.max_length or shorten the prompt"
        )
    if not trained:
        raise ExampleError("every label is masked, so the example teaches nothing; check the template's answer part")
    if not truncated and trained[-1] != tokenizer.eos_token_id:
        raise ExampleError(
            f"the end of the answer is masked: the last trained token is not {tokenizer.eos_token}, so the model "
            "would not learn to stop; put the end-of-turn token inside the template's {% generation %} block, "
            "or set data.template"
        )
    pad = tokenizer.pad_token_id
    if pad is not None and pad not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        count = list(input_ids).count(pad)
        if count:
            raise ExampleError(f"the text holds the padding token {tokenizer.pad_token} {count} times; remove it")


def check_context(tokenized: TokenizedExamples, context: int | None, part: str) -> None:
    """No example may be longer than the model's context: past it, a model has learned no positions.

    Args:
        tokenized: the examples after the cut at `data.max_length`.
        context: tokens that the model's context holds; None where it names no limit.
        part: how the error calls the examples.

    Raises:
        DataError: counts the examples that are longer, and names the longest.
    """
    lengths = np.asarray(tokenized.lengths)
    if context is None or not (num_longer := int((lengths > context).sum())):
        return
    longest = tokenized.examples[int(lengths.argmax())]
    raise DataError(
        f"{part}: {num_longer} of {len(lengths)} examples are longer than the model's context of {context} tokens; the "
        f"longest: {longest.place}, {len(longest.input_ids)} tokens. Set data.max_length: {context} to cut them there, "
        "or shorten them"
    )


def stop_or_skip(problems: Problems, num_rows: int, source: str, on_error: str) -> None:
    """Stop at bad examples, or let the good ones pass.

    Args:
        problems: the examples that failed.
        num_rows: examples of the source, good and bad.
        source: the source as the run file names it.
        on_error: `DataConfig.on_error`.

    Raises:
        DataError: there are problems and `on_error` is `stop`, or not one example is left.
    """
    if not problems.num or (on_error == "skip" and problems.num < num_rows):
        return
    first = "\n".join(f"  {problem}" for problem in problems.first[:NUM_SHOWN])
    more = f"\n  ... and {problems.num - NUM_SHOWN} more" if problems.num > NUM_SHOWN else ""
    fix = (
        "No example is left to train on."
        if problems.num == num_rows
        else "Fix these examples, or set data.on_error: skip to drop and count them."
    )
    raise DataError(f"{source}: {problems.num} of {num_rows} examples cannot be used; first:\n{first}{more}\n{fix}")


def skip_report(problems: Problems) -> dict[str, Any]:
    """Dropped examples for the run record: how many, and the first messages."""
    return {"num_skipped": problems.num, "skipped": [str(problem) for problem in problems.first]}
