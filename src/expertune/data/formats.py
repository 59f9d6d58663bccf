"""Layouts: how an example's columns become a prompt and an answer, or a conversation.

Every layout that is not a conversation also offers its columns under the names `prompt` and `completion`, so that any
template written for these two (`question-answer`, `viggo`, a user's own) works on all of them.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from expertune.config import DataConfig, ObjectiveName
from expertune.config.yaml_file import shortened
from expertune.data.lint import ExampleError, FlaggedError, check_answer
from expertune.data.messages import (
    FLAGS,
    Message,
    is_conversation,
    parse_conversation,
    truth,
    until_last_answer,
)
from expertune.errors import DataError

SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"
_TOOLS = ("tools", "functions")
# Flags of a whole example as numbers too; `loss` and `training` only as booleans, for they may be measured there.
_NUMERIC_FLAGS = ("weight", "train", "trainable")


@dataclass(frozen=True)
class Example:
    """An example in the form that templates take.

    Attributes:
        values: column -> value; empty for conversations.
        answers: the names in `values` that hold the answer.
        messages: the example as a conversation, None where it has no prompt (plain text).
        columns: the columns that `messages` were made of.
    """

    values: Mapping[str, Any]
    answers: tuple[str, ...]
    messages: list[Message] | None
    columns: frozenset[str] = frozenset()

    @property
    def has_empty_prompt(self) -> bool:
        """Whether the first answer follows nothing, or a user's turn holds no text."""
        if self.messages is None:
            return False
        first = next((i for i, turn in enumerate(self.messages) if turn.role == "assistant"), len(self.messages))
        silent = any(turn.role == "user" and not turn.content.strip() for turn in self.messages)
        return silent or not any(turn.content.strip() for turn in self.messages[:first])


@dataclass(frozen=True)
class Layout:
    """The columns of a kind of example.

    Attributes:
        name: its name under `data.format`.
        prompt: the columns that make the prompt, joined by a blank line where more than one holds text.
        answer: the column that holds the answer, or the conversation.
        template: the template where `data.template` names none.
        optional: those of `prompt` and `answer` that an example may lack.
        is_conversation: whether the columns hold lists of turns.
        rejected: of pairs, the column that holds the answer that `answer` is preferred to.
        label: the column that says whether the answer is a good one, where there is one.
    """

    name: str
    prompt: tuple[str, ...]
    answer: str
    template: str
    optional: tuple[str, ...] = ()
    is_conversation: bool = False
    rejected: str = ""
    label: str = ""

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns of the prompt that every example must have."""
        return tuple(name for name in self.prompt if name not in self.optional)

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that every example must have."""
        answers = (self.answer, self.rejected, self.label)
        return (*self.asked, *(name for name in answers if name and name not in self.optional))

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The columns that an example is made of, the preferred answer's alone of a pair."""
        return tuple(name for name in (*self.prompt, self.answer, self.rejected, self.label) if name)

    @property
    def main_column(self) -> str:
        """The column that a question given as one text goes to."""
        return self.prompt[0] if self.prompt else self.answer if self.is_conversation else "prompt"

    def read(self, raw: Mapping[str, Any]) -> Example:
        """Turn an example's columns into an `Example`.

        Raises:
            ExampleError: a column is missing or of the wrong type, the answer is empty, or a conversation is malformed.
            FlaggedError: the example, or every answer in it, is flagged not to be trained.
        """
        if missing := [name for name in self.needed if name not in raw]:
            raise ExampleError(f"column {missing[0]} is missing; the example has {_names(raw)}")
        for name in FLAGS:
            if _is_off(name, raw.get(name)) and not any(raw[name] is raw[column] for column in self.needed):
                raise FlaggedError(f"{name} is {raw[name]!r}")
        if self.is_conversation:
            if tools := [name for name in _TOOLS if raw.get(name)]:
                raise ExampleError(
                    f"column {tools[0]} holds functions, which are not supported; drop the example or the column"
                )
            turns = self._answer(raw)
            if self.prompt and not any(turn.role == "assistant" for turn in turns):
                raise ExampleError(f"no assistant turn in the {self.answer}, so there is nothing to train on; add one")
            return self._conversation(raw, until_last_answer([*self._question(raw), *turns]))
        answer = _text(raw, self.answer)
        check_answer(self.answer, answer)
        return self._example(raw, answer)

    def read_question(self, raw: Mapping[str, Any]) -> Example:
        """Turn the columns of an example whose answer is still to be written into an `Example`.

        Raises:
            ExampleError: a column of the prompt is missing or of the wrong type, or a conversation is malformed.
        """
        if missing := [name for name in (self.main_column, *self.asked) if name not in raw]:
            raise ExampleError(f"column {missing[0]} is missing; the question has {_names(raw)}")
        if not self.is_conversation:
            return self._example(raw, "")
        return self._conversation(raw, self._question(raw) if self.prompt else _turns(raw, self.answer, "user"))

    def _question(self, raw: Mapping[str, Any]) -> list[Message]:
        """Turns in a column of their own: all of them are context, so none is trained."""
        turns = _turns(raw, self.prompt[0], "user") if self.prompt else []
        return [Message(turn.role, turn.content, trained=False, extra=turn.extra) for turn in turns]

    def _answer(self, raw: Mapping[str, Any]) -> list[Message]:
        if self.prompt:
            return _turns(raw, self.answer, "assistant")
        return parse_conversation(raw[self.answer], self.answer)

    def _conversation(self, raw: Mapping[str, Any], turns: list[Message]) -> Example:
        column, system = _system(raw)
        if system and (own := [turn.content for turn in turns if turn.role in ("system", "developer")]):
            if own[0].strip() != system.strip():
                raise ExampleError(
                    f"column {column} and the conversation have different system prompts; keep one of them"
                )
        elif system:
            turns = [Message("system", system), *turns]
        used = {*self.prompt, self.answer} | ({column} if system else set())
        return Example({}, (), turns, frozenset(used))

    def _example(self, raw: Mapping[str, Any], answer: str) -> Example:
        parts = {name: _text(raw, name) for name in self.prompt}
        prompt = "\n\n".join(part for part in parts.values() if part)
        column, system = _system(raw)
        history = _history(raw.get(HISTORY))
        # A file may have columns of its own called prompt or completion; those are what its templates mean then.
        answers = (self.answer,) if "completion" in raw else tuple({self.answer: None, "completion": None})
        values = {"prompt": prompt, "completion": answer, **raw, **parts, self.answer: answer}
        if system:
            values["system"] = system
        if not self.prompt:
            return Example(values, answers, None)
        turns = [Message("system", system)] if system else []
        turns += [*history, Message("user", prompt), Message("assistant", answer)]
        used = {*self.prompt, self.answer} | ({column} if system else set()) | ({HISTORY} if history else set())
        return Example(values, answers, turns, frozenset(used))


LAYOUTS = (
    Layout("preference", ("prompt",), "chosen", "question-answer", rejected="rejected"),
    Layout(
        *("preference-messages", ("prompt",), "chosen", "chat"),
        optional=("prompt",),
        is_conversation=True,
        rejected="rejected",
    ),
    Layout("unpaired-preference", ("prompt",), "completion", "question-answer", label="label"),
    Layout("unpaired-preference-messages", ("prompt",), "completion", "chat", is_conversation=True, label="label"),
    Layout("messages", (), "messages", "chat", is_conversation=True),
    Layout("sharegpt", (), "conversations", "chat", is_conversation=True),
    Layout("dolly", ("instruction", "context"), "response", "dolly", optional=("context",)),
    Layout("alpaca", ("instruction", "input"), "output", "alpaca", optional=("input",)),
    Layout("prompt-completion", ("prompt",), "completion", "question-answer"),
    Layout("prompt-completion", ("question",), "answer", "question-answer"),
    Layout("prompt-completion-messages", ("prompt",), "completion", "chat", is_conversation=True),
    Layout("text", (), "text", "plain"),
    Layout("prompt-only", ("prompt",), "completion", "question-answer", optional=("completion",)),
    Layout(
        *("prompt-only-messages", ("prompt",), "completion", "chat"), optional=("completion",), is_conversation=True
    ),
)
"""Every layout. `auto` takes the first whose needed columns are there, so the more telling ones come first."""

COLUMNS = frozenset({name for layout in LAYOUTS for name in layout.read_columns}).union(
    SYSTEM, (HISTORY,), _TOOLS, FLAGS
)
"""Every column that a layout reads."""

_PAIRS = tuple(layout for layout in LAYOUTS if layout.rejected)
_LABELED = tuple(layout for layout in LAYOUTS if layout.label)
_PROMPTS = tuple(layout for layout in LAYOUTS if layout.answer in layout.optional)
_ANSWERS = tuple(layout for layout in LAYOUTS if layout not in (*_PAIRS, *_LABELED, *_PROMPTS))
_LAYOUTS_OF = {
    "sft": _ANSWERS,
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "kto": (*_LABELED, *_PAIRS),
    "grpo": (*(layout for layout in _ANSWERS if layout.prompt or layout.is_conversation), *_PROMPTS),
}
_NEEDS = {
    "sft": "learns one answer to each prompt",
    "dpo": "compares two answers to each prompt: columns prompt, chosen and rejected",
    "orpo": "compares two answers to each prompt: columns prompt, chosen and rejected",
    "kto": "needs columns prompt, completion and label (true for a good answer), or prompt, chosen and rejected",
    "grpo": "needs a prompt to write answers to: a column prompt, or any layout that has a prompt",
}


def find_layout(
    data: DataConfig,
    columns: Collection[str],
    source: str = "data.train",
    turns: Collection[str] = (),
    objective: ObjectiveName = "sft",
) -> Layout:
    """The layout that `data.format` names, or that the columns show.

    Args:
        data: the run's data section.
        columns: column names after `rename`.
        source: how the error calls the source.
        turns: those of `columns` that hold lists of turns.
        objective: of the run, which decides what layouts there are.

    Raises:
        DataError: `auto` recognizes none, or the layout is none of the objective's; names the columns found and the
            ways out.
    """
    known = _LAYOUTS_OF[objective]
    candidates = [layout for layout in known if data.format in ("auto", layout.name)]
    fitting = [layout for layout in candidates if all(name in columns for name in layout.needed)]
    # What the user has named goes before what the file happens to hold besides.
    named = [layout for layout in fitting if any(name in data.columns for name in (*layout.prompt, layout.answer))]
    if not candidates:
        raise DataError(f"{source}: data.format: {data.format} does not go with {_objective(objective, columns)}")
    if not fitting:
        if data.format != "auto":
            return candidates[0]
        reason = _no_layout(columns, turns) if objective == "sft" else _objective(objective, columns)
        raise DataError(f"{source}: {reason}")
    layout = (named or fitting)[0]
    if data.format == "auto" and layout.rejected and layout.is_conversation and not set(turns) & set(columns):
        raise DataError(
            f"{source}: chosen and rejected are texts, and there is no column prompt to which they are answers; name "
            "it under data.columns ({prompt: your_question}), or write chosen and rejected as lists of messages"
        )
    for other in known:
        if other.name == f"{layout.name}-messages" and other.prompt == layout.prompt:
            return other if set(layout.read_columns) & set(turns) else layout
    return layout


def _objective(objective: ObjectiveName, columns: Collection[str]) -> str:
    """What an objective needs, beside the columns that were found."""
    columns = set(columns)
    if objective in ("sft", "grpo") and {"chosen", "rejected"} <= columns:
        instead = "; with these columns set objective: dpo, orpo or kto"
    elif objective != "kto" and {"prompt", "completion", "label"} <= columns:
        instead = "; with these columns set objective: kto"
    else:
        lacking = next(_lacking(objective, columns), "")
        missing, example = (
            (f"; {lacking} is missing", f"{lacking}: your_column") if lacking else ("", "prompt: your_question")
        )
        instead = f"{missing}; name your columns under data.columns, e.g. {{{example}}}" + (
            ", or set objective: sft" if objective != "grpo" else ""
        )
    return f"objective: {objective}, which {_NEEDS[objective]}; found are {_names(sorted(columns))}{instead}"


def _lacking(objective: ObjectiveName, columns: Collection[str]) -> Iterator[str]:
    """The columns that alone keep a pair or a labeled answer from being one."""
    for layout in _LAYOUTS_OF[objective]:
        missing = [name for name in layout.needed if name not in columns]
        if len(missing) == 1 and (layout.rejected or layout.label):
            yield missing[0]


def rename(raw: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give an example our column names; its own names stay beside them for templates that use them.

    Args:
        example: an example as its source holds it.
        columns: our name -> the file's name (`DataConfig.columns`).

    Raises:
        ExampleError: the example lacks a column that `columns` names.
    """
    if missing := [(ours, theirs) for ours, theirs in columns.items() if theirs not in raw]:
        ours, theirs = missing[0]
        raise ExampleError(f"column {theirs}, named by data.columns.{ours}, is missing; the example has {_names(raw)}")
    return {**raw, **{ours: raw[theirs] for ours, theirs in columns.items()}}


def _no_layout(columns: Collection[str], turns: Collection[str]) -> str:
    """What the columns that no layout fits seem to be, and the way out."""
    found = f"no layout fits the columns {_names(columns)}. "
    if turns:
        other = sorted(turns)[0]
        return f"{found}Column {other} holds turns: set data.columns: {{messages: {other}}}"
    if "role" in columns or "from" in columns:
        return f"{found}The examples are single messages; {WHOLE_CONVERSATIONS}"
    if {"chosen", "rejected"} <= set(columns):
        return (
            f"{found}The examples are preferences: set objective: dpo (or orpo, kto); to train on the chosen answers "
            "alone, set data.columns: {prompt: prompt, completion: chosen}"
        )
    known = "; ".join(f"{layout.name} ({', '.join(layout.needed)})" for layout in _ANSWERS)
    return (
        f"{found}Set data.format, or name your columns under data.columns, e.g. {{prompt: your_question, "
        f"completion: your_answer}}. Known: {known}"
    )


WHOLE_CONVERSATIONS = (
    'put each conversation into one example: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", '
    '"content": "..."}]}'
)


def _turns(raw: Mapping[str, Any], name: str, role: str) -> list[Message]:
    value = raw[name]
    return [Message(role, value)] if isinstance(value, str) else parse_conversation(value, name)


def _system(raw: Mapping[str, Any]) -> tuple[str, str]:
    """The column that holds a system prompt, and the prompt; two empty texts where there is none."""
    for name in SYSTEM:
        text = raw.get(name)
        if isinstance(text, str) and text.strip():
            return name, text
    return "", ""


def _history(value: Any) -> list[Message]:
    """Earlier turns as LLaMA-Factory's alpaca examples hold them: pairs of a question and an answer."""
    if not isinstance(value, list):
        return []
    turns = []
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            return []
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _is_off(name: str, value: Any) -> bool:
    """Whether its own flag leaves an example out. What is no flag by its value (a weight in kilograms) is kept."""
    if isinstance(value, bool):
        return not value
    if name not in _NUMERIC_FLAGS or value is None or isinstance(value, list | dict):
        return False
    try:
        return not truth(name, value)
    except ExampleError:
        return False


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if value is None:
        # CSV and Parquet write "nothing here" as null; an answer that is null is caught as an empty one.
        return ""
    if not isinstance(value, str):
        raise ExampleError(f"column {name} is {_kind(value)}, not text; write it as a string")
    return value


def _kind(value: Any) -> str:
    return "a list of turns" if is_conversation(value) else type(value).__name__


def _names(columns: Collection[str]) -> str:
    return shortened(", ".join(columns), 500) or "no columns"
