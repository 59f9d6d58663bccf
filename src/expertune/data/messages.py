"""Conversations as one list of messages, whether a file calls them `messages` (OpenAI) or `conversations` (ShareGPT).

A turn is `{role, content}` or `{from, value}` under either column: which of the two it is shows from its keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expertune.data.lint import ExampleError, FlaggedError, check_answer

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_UNSUPPORTED = ("tool_calls", "function_call", "train_detail")
# OpenAI and Mistral write `weight`, ms-swift `loss`, Axolotl `train` or `training`.
FLAGS = ("weight", "loss", "train", "training", "trainable")
_OWN_KEYS = frozenset({"role", "from", "content", "value", *FLAGS, *_UNSUPPORTED})
_NO = frozenset({"0", "0.0", "false", "no"})
_YES = frozenset({"1", "1.0", "true", "yes"})


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: `system`, `developer`, `user` or `assistant`.
        content: its text.
        trained: whether an assistant's turn may take a loss; False where the data say so, or where it is context.
        extra: what else the turn has (`reasoning_content`, `name`); a chat template may use it.
    """

    role: str
    content: str
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        return {**self.extra, "role": self.role, "content": self.content}


def parse_conversation(value: Any, column: str = "messages") -> list[Message]:
    """Read a list of turns.

    Args:
        value: objects with `role` and `content`, or with `from` and `value`; the text is a string or a list of text
            parts. A turn may carry a flag (`weight`, `loss`, `train`) that says whether it is trained.
        column: how errors call the list.

    Raises:
        ExampleError: not a list of such objects, an unknown role, a part that is not text, or a flag that is neither 0
            nor 1.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ExampleError(f"column {column} must be a list of objects, got {type(value).__name__}")
    return [_message(number, item) for number, item in enumerate(value, start=1)]


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns, by its shape."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and bool({"role", "from"} & item.keys()) for item in value)
    )


def truth(name: str, value: Any) -> bool:
    """What a flag or a label says, as a boolean, a number or text.

    Raises:
        ExampleError: it says neither yes nor no; a weight in between is not supported.
    """
    text = str(value).strip().lower()
    if text in _NO:
        return False
    if text in _YES:
        return True
    raise ExampleError(f"{name} is {value!r}; only 0 and 1 (false and true) are supported: take it out or round it")


def until_last_answer(turns: list[Message]) -> list[Message]:
    """A conversation up to the last assistant turn that is trained; what follows leads to nothing to be learned.

    Raises:
        ExampleError: there is no assistant turn, or one that is trained is empty.
        FlaggedError: every assistant turn is flagged not to be trained.
    """
    if not any(turn.role == "assistant" for turn in turns):
        raise ExampleError("no assistant turn, so there is nothing to train on; add one or delete the example")
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    if not answers:
        raise FlaggedError("every assistant turn is flagged not to be trained")
    for index in answers:
        check_answer(f"assistant message {index + 1}", turns[index].content)
    return turns[: answers[-1] + 1]


def _message(number: int, item: Mapping[str, Any]) -> Message:
    for name in _UNSUPPORTED:
        if item.get(name):
            raise ExampleError(f"message {number} has {name}, which is not supported; take it out or drop the example")
    # Parquet and `datasets` give every turn the keys of all turns, null where a turn lacks one.
    speaker = item.get("role") if item.get("role") is not None else item.get("from")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ExampleError(f"message {number} has the unknown role {speaker!r}; known: {', '.join(_ROLES)}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    flags = {name: item[name] for name in FLAGS if item.get(name) is not None}
    trained = all(truth(f"{name} of message {number}", value) for name, value in flags.items())
    extra = {name: value for name, value in item.items() if name not in _OWN_KEYS and value is not None}
    return Message(role, _content(number, content), trained, extra)


def _content(number: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ExampleError(f"message {number} has content of type {type(content).__name__}, not text")
    return "".join(_part(number, part) for part in content)


def _part(number: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise ExampleError(f"message {number} has a content part of type {kind!r}; only text can be trained on")
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise ExampleError(f"message {number} has a text part without text")
    return text
