"""Row layouts: how a row's columns become a prompt and an answer, or a conversation.

Every layout but `messages` and `sharegpt` also offers its row under the names `prompt` and `completion`, so that any
template written for these two (`plain`, `viggo`, a user's own) works on all of them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from expertune.config import DataConfig
from expertune.data.lint import RowError, check_answer
from expertune.data.messages import Message, parse_messages, parse_sharegpt, until_last_answer
from expertune.errors import DataError


@dataclass(frozen=True)
class Example:
    """A row in the form that templates take.

    Attributes:
        values: column -> value; empty for conversations.
        answers: the names in `values` that hold the answer.
        messages: the row as a conversation, None where it has no prompt (plain text).
    """

    values: Mapping[str, Any]
    answers: tuple[str, ...]
    messages: list[Message] | None


@dataclass(frozen=True)
class Layout:
    """The columns of a kind of row.

    Attributes:
        name: its name under `data.format`.
        prompt: the columns that make the prompt, joined by a blank line where more than one holds text.
        answer: the column that holds the answer, or the conversation.
        optional: those of `prompt` that a row may lack.
        template: the template where `data.template` names none.
    """

    name: str
    prompt: tuple[str, ...]
    answer: str
    template: str
    optional: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return (*(name for name in self.prompt if name not in self.optional), self.answer)

    @property
    def is_conversation(self) -> bool:
        """Whether a row is a list of messages."""
        return self.name in ("messages", "sharegpt")

    @property
    def main_column(self) -> str:
        """The column that a question given as one text goes to."""
        return self.prompt[0] if self.prompt else self.answer if self.is_conversation else "prompt"

    def read(self, row: Mapping[str, Any]) -> Example:
        """Turn a row's columns into an `Example`.

        Raises:
            RowError: a column is missing or of the wrong type, the answer is empty, or a conversation is malformed.
        """
        if missing := [name for name in self.needed if name not in row]:
            raise RowError(f"column {missing[0]} is missing; the row has {_names(row)}")
        if self.is_conversation:
            if row.get("tools"):
                raise RowError("column tools holds functions, which are not supported; drop the row or the column")
            return Example({}, (), until_last_answer(self._parse(row[self.answer])))
        answer = _text(row, self.answer)
        check_answer(self.answer, answer)
        return self._example(row, answer)

    def read_question(self, row: Mapping[str, Any]) -> Example:
        """Turn the columns of a row whose answer is still to be written into an `Example`.

        Raises:
            RowError: a column of the prompt is missing or of the wrong type, or a conversation is malformed.
        """
        if missing := [name for name in (self.main_column, *self.needed[:-1]) if name not in row]:
            raise RowError(f"column {missing[0]} is missing; the question has {_names(row)}")
        if not self.is_conversation:
            return self._example(row, "")
        value = row[self.answer]
        return Example({}, (), [Message("user", value)] if isinstance(value, str) else self._parse(value))

    def _parse(self, value: Any) -> list[Message]:
        return parse_messages(value) if self.name == "messages" else parse_sharegpt(value)

    def _example(self, row: Mapping[str, Any], answer: str) -> Example:
        parts = {name: _text(row, name) for name in self.prompt}
        prompt = "\n\n".join(part for part in parts.values() if part)
        messages = [Message("user", prompt), Message("assistant", answer)] if self.prompt else None
        # A file may have columns of its own called prompt or completion; those are what its templates mean then.
        answers = (self.answer,) if "completion" in row else tuple({self.answer: None, "completion": None})
        values = {"prompt": prompt, "completion": answer, **row, **parts, self.answer: answer}
        return Example(values, answers, messages)


LAYOUTS = (
    Layout("messages", (), "messages", "chat"),
    Layout("sharegpt", (), "conversations", "chat"),
    Layout("dolly", ("instruction", "context"), "response", "dolly", optional=("context",)),
    Layout("alpaca", ("instruction", "input"), "output", "alpaca", optional=("input",)),
    Layout("prompt-completion", ("prompt",), "completion", "plain"),
    Layout("prompt-completion", ("question",), "answer", "question-answer"),
    Layout("text", (), "text", "plain"),
)
"""Every layout. `auto` takes the first whose needed columns are there, so the more telling ones come first."""


def find_layout(data: DataConfig, columns: Collection[str], source: str = "data.train") -> Layout:
    """The layout that `data.format` names, or that the columns of the first row show.

    Args:
        data: the run's data section.
        columns: column names after `rename`.
        source: how the error calls the source.

    Raises:
        DataError: `auto` recognises none; names the columns found and the ways out.
    """
    candidates = [layout for layout in LAYOUTS if data.format in ("auto", layout.name)]
    for layout in candidates:
        if all(name in columns for name in layout.needed):
            return layout
    if data.format != "auto":
        return candidates[0]
    known = "; ".join(f"{layout.name} ({', '.join(layout.needed)})" for layout in LAYOUTS)
    raise DataError(
        f"{source}: no layout fits the columns {_names(columns)}. Set data.format, or name your columns under "
        f"data.columns, e.g. {{prompt: your_question, completion: your_answer}}. Known: {known}"
    )


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give a row our column names; its own names stay beside them for templates that use them.

    Args:
        row: a row as its source holds it.
        columns: our name -> the file's name (`DataConfig.columns`).

    Raises:
        RowError: the row lacks a column that `columns` names.
    """
    if missing := [(ours, theirs) for ours, theirs in columns.items() if theirs not in row]:
        ours, theirs = missing[0]
        raise RowError(f"column {theirs}, named by data.columns.{ours}, is missing; the row has {_names(row)}")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        # CSV and Parquet write "nothing here" as null; an answer that is null is caught as an empty one.
        return ""
    if not isinstance(value, str):
        raise RowError(f"column {name} is {type(value).__name__}, not text; write it as a string")
    return value


def _names(columns: Collection[str]) -> str:
    return ", ".join(columns) or "no columns"
