"""Conversations: OpenAI's `messages` and ShareGPT's `conversations` as one list of messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertune.data.lint import RowError, check_answer

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
_ROLES = ("system", "developer", "user", "assistant")
_UNSUPPORTED = ("tool_calls", "function_call", "weight")


@dataclass(frozen=True)
class Message:
    """One turn: its role (`system`, `developer`, `user`, `assistant`) and its text."""

    role: str
    content: str


def parse_messages(value: Any) -> list[Message]:
    """Read OpenAI's layout: objects with `role` and `content` (a string or a list of text parts).

    Raises:
        RowError: not a list of such objects, an unknown role, or a part that is not text.
    """
    turns = []
    for number, item in enumerate(_items("messages", value), start=1):
        for name in _UNSUPPORTED:
            if item.get(name) is not None:
                raise RowError(f"message {number} has {name}, which is not supported; take it out or drop the row")
        role = item.get("role")
        if role not in _ROLES:
            raise RowError(f"message {number} has the unknown role {role!r}; known: {', '.join(_ROLES)}")
        turns.append(Message(role, _content(number, item.get("content"))))
    return turns


def parse_sharegpt(value: Any) -> list[Message]:
    """Read ShareGPT's layout: objects with `from` and `value`.

    Raises:
        RowError: not a list of such objects, or an unknown speaker.
    """
    turns = []
    for number, item in enumerate(_items("conversations", value), start=1):
        speaker = item.get("from")
        if speaker not in _SHAREGPT_ROLES:
            raise RowError(f"turn {number} is from the unknown {speaker!r}; known: {', '.join(_SHAREGPT_ROLES)}")
        turns.append(Message(_SHAREGPT_ROLES[speaker], _content(number, item.get("value"))))
    return turns


def until_last_answer(turns: list[Message]) -> list[Message]:
    """A conversation up to its last assistant turn; what follows leads to nothing that could be learnt.

    Raises:
        RowError: there is no assistant turn, or one is empty.
    """
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn, so there is nothing to train on; add one or delete the row")
    for index in answers:
        check_answer(f"assistant message {index + 1}", turns[index].content)
    return turns[: answers[-1] + 1]


def _items(column: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"column {column} must be a list of objects, got {type(value).__name__}")
    return value


def _content(number: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"message {number} has content of type {type(content).__name__}, not text")
    return "".join(_part(number, part) for part in content)


def _part(number: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise RowError(f"message {number} has a content part of type {kind!r}; only text can be trained on")
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise RowError(f"message {number} has a text part without text")
    return text
