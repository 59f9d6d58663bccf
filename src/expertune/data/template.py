"""Which template renders the examples: one that ships with Expertune, a user's Jinja file, or the tokenizer's own."""

import stat
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from expertune.data.chat_template import ChatTemplate
from expertune.data.column_template import ColumnTemplate, Template, jinja_names
from expertune.data.formats import Layout
from expertune.errors import ConfigError, did_you_mean

_MAX_BYTES = 2**20


def load_template(name: str | None, layout: Layout, tokenizer: Any) -> Template:
    """The template of a run.

    Args:
        name: `DataConfig.template`, or what `default_template` chose; None means the layout's own.
        layout: the layout of the examples.
        tokenizer: a transformers tokenizer.

    Raises:
        ConfigError: there is no such template, it is not valid Jinja, or it does not go with the layout.
    """
    name = name or layout.template
    source = None if name == "chat" else _read_template(name)
    if source is None or "messages" in jinja_names(source):
        if not layout.is_conversation and not layout.prompt:
            raise ConfigError(
                f"data.template: {name} needs a prompt and an answer; {layout.name} examples hold only text"
            )
        return ChatTemplate(name, source, tokenizer)
    if layout.is_conversation:
        raise ConfigError(
            f"data.template: {name} is written for columns, but {layout.name} examples are conversations; "
            "use chat, chatml, or a Jinja file that loops over messages"
        )
    return ColumnTemplate(name, source)


def default_template(layout: Layout, examples: Iterable[Mapping[str, Any]]) -> str:
    """The template of examples where `data.template` names none.

    Examples of a prompt and a completion that bring the white space between the two themselves, as TRL and OpenAI's
    older fine-tuning files do, are taken as they are. The choice is one for all examples: a prompt must read the same
    whether or not its answer is known.

    Args:
        layout: the layout of the examples.
        examples: every example that could be read, after `rename`.
    """
    if layout.template != "question-answer" or "prompt" not in layout.prompt:
        return layout.template
    num_spaced = 0
    for raw in examples:
        prompt = raw.get("prompt")
        for answer in (raw.get(layout.answer), raw.get(layout.rejected)):
            if not (isinstance(prompt, str) and isinstance(answer, str) and prompt and answer):
                continue
            if not (prompt[-1].isspace() or answer[0].isspace()):
                return layout.template
            num_spaced += 1
    return "plain" if num_spaced else layout.template


def is_own_file(name: str | None) -> bool:
    """Whether `data.template` names a file of the user's."""
    return name is not None and name != "chat" and name not in shipped_templates()


def own_file_names(name: str | None) -> frozenset[str]:
    """Every name that the user's own Jinja file uses; none where `data.template` names no such file.

    Raises:
        ConfigError: the file cannot be read.
    """
    text = own_file_text(name)
    return frozenset() if text is None else jinja_names(text)


def own_file_text(name: str | None) -> str | None:
    """The user's own Jinja file; None where `data.template` names no such file.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _read_template(name) if name is not None and is_own_file(name) else None


def shipped_templates() -> list[str]:
    """Names of the templates that ship with Expertune."""
    return sorted(entry.name.removesuffix(".jinja") for entry in _folder().iterdir() if entry.name.endswith(".jinja"))


def shipped_template(name: str) -> str | None:
    """The Jinja text of a template that ships with Expertune; None for any other name."""
    return _read_template(name) if name in shipped_templates() else None


def chat_template_to_share(name: str | None, tokenizer: Any) -> str | None:
    """The chat template that a run's template is, where the base's tokenizer does not have it; None otherwise.

    Raises:
        ConfigError: the template's file cannot be read any longer.
    """
    text = None if name in (None, "chat") else _read_template(str(name))
    return text if text is not None and "messages" in jinja_names(text) and text != tokenizer.chat_template else None


def _read_template(name: str) -> str:
    shipped = shipped_templates()
    if name in shipped:
        return (_folder() / f"{name}.jinja").read_text(encoding="utf-8")
    try:
        path = Path(name).expanduser()
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise ValueError(f"a folder, a device, or more than {_MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        meant = did_you_mean(name, ["chat", *shipped])
        raise ConfigError(f"data.template: {name} is neither a template of Expertune nor a file{meant}") from None
    # A ValueError is text that is not UTF-8 too, or a NUL in the name; a RuntimeError is a ~user that does not exist.
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"data.template: {name} is neither a template of Expertune (chat, {', '.join(shipped)}) nor a Jinja file "
            f"that can be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def _folder() -> Traversable:
    return files("expertune.data") / "templates"
