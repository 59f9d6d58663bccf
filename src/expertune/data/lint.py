"""The data check: it stops a run before a step is spent on rows that cannot teach what they should.

Readers, layouts and templates raise `RowError` for a single row; the checks on finished token rows are here. What
happens to the rows that failed is one decision in one place: `stop_or_skip`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expertune.config.yaml_file import shortened
from expertune.data.rows import IGNORE_INDEX, TokenizedRows
from expertune.errors import DataError

NUM_SHOWN = 5


class RowError(DataError):
    """One row cannot be used. The message says what is wrong and how to mend it; the place is added later."""


class FlaggedError(RowError):
    """The data's own flags say that nothing of the example is trained: it is left out and counted, not refused."""


@dataclass(frozen=True)
class Problem:
    """A row that failed: its place and what is wrong with it."""

    place: str
    message: str

    def __str__(self) -> str:
        # A message may quote the row, which may hold anything.
        return f"{self.place}: {shortened(self.message, 500)}"


def check_answer(name: str, answer: str) -> None:
    """An answer must hold something to learn.

    Raises:
        RowError: it is empty or white space only.
    """
    if not answer.strip():
        raise RowError(f"empty completion: {name} holds no text; fill it in or delete the row")


def check_unicode(text: str) -> None:
    """A text must be encodable: JSON's \\ud83d without its second half reads as a string, but it is no character.

    Raises:
        RowError: the text holds half a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RowError(
            f"half a surrogate pair, {half}, is not a character; repair the text or delete the row"
        ) from None


def check_tokens(input_ids: Sequence[int], labels: Sequence[int], uncut_length: int, tokenizer: Any) -> None:
    """Check a finished row: something is trained, the answer's end is trained, and no padding lies inside.

    Args:
        input_ids: the row's ids after the cut.
        labels: its labels, as long as `input_ids`.
        uncut_length: tokens before the cut at `max_length`.
        tokenizer: the tokenizer that made the ids.

    Raises:
        RowError: one of the three does not hold.
    """
    truncated = uncut_length > len(input_ids)
    trained = [label for label in labels if label != IGNORE_INDEX]
    if not trained and truncated:
        raise RowError(
            f"no label is left: the row has {uncut_length} tokens and the cut at {len(input_ids)} falls before its "
            "answer; raise data.max_length or shorten the prompt"
        )
    if not trained:
        raise RowError("every label is masked, so the row teaches nothing; check the template's answer part")
    if not truncated and trained[-1] != tokenizer.eos_token_id:
        raise RowError(
            f"the end of the answer is masked: the last trained token is not {tokenizer.eos_token}, so the model "
            "would not learn to stop; put the end-of-turn token inside the template's {% generation %} block, "
            "or set data.template"
        )
    pad = tokenizer.pad_token_id
    if pad is not None and pad not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        count = list(input_ids).count(pad)
        if count:
            raise RowError(f"the text holds the padding token {tokenizer.pad_token} {count} times; remove it")


def check_context(tokenized: TokenizedRows, context: int | None, part: str) -> None:
    """No example may be longer than the model's context: past it, a model has learnt no positions.

    Args:
        tokenized: the rows after the cut at `data.max_length`.
        context: tokens that the model's context holds; None where it names no limit.
        part: how the error calls the rows.

    Raises:
        DataError: counts the examples that are longer, and names the longest.
    """
    rows = tokenized.rows
    longer = [row for row in rows if context is not None and len(row.input_ids) > context]
    if longer:
        longest = max(longer, key=lambda row: len(row.input_ids))
        raise DataError(
            f"{part}: {len(longer)} of {len(rows)} examples are longer than the model's context of {context} tokens; "
            f"the longest: {longest.place}, {len(longest.input_ids)} tokens. Set data.max_length: {context} to cut "
            "them there, or shorten them"
        )


def stop_or_skip(problems: Sequence[Problem], num_rows: int, source: str, on_error: str) -> None:
    """Stop at bad rows, or let the good ones pass.

    Args:
        problems: the rows that failed, in order.
        num_rows: rows of the source, good and bad.
        source: the source as the run file names it.
        on_error: `DataConfig.on_error`.

    Raises:
        DataError: there are problems and `on_error` is `stop`, or not one row is left.
    """
    if not problems or (on_error == "skip" and len(problems) < num_rows):
        return
    first = "\n".join(f"  {problem}" for problem in problems[:NUM_SHOWN])
    more = f"\n  ... and {len(problems) - NUM_SHOWN} more" if len(problems) > NUM_SHOWN else ""
    mend = (
        "No row is left to train on."
        if len(problems) == num_rows
        else "Mend these rows, or set data.on_error: skip to drop and count them."
    )
    raise DataError(f"{source}: {len(problems)} of {num_rows} rows cannot be used; first:\n{first}{more}\n{mend}")


def skip_report(problems: Sequence[Problem]) -> dict[str, Any]:
    """Dropped rows for the run record: how many, and the first 20 messages."""
    return {"num_skipped": len(problems), "skipped": [str(problem) for problem in problems[:20]]}
