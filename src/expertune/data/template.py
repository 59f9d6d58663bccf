"""Which template renders a run's rows: one that ships with Expertune, a user's Jinja file, or the tokenizer's own."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jinja2

from expertune.data.chat_template import ChatTemplate
from expertune.data.formats import Layout
from expertune.data.row_template import RowTemplate, Template
from expertune.errors import ConfigError


def load_template(name: str | None, layout: Layout, tokenizer: Any) -> Template:
    """The template of a run.

    Args:
        name: `DataConfig.template`; None means the layout's own.
        layout: the layout of the rows.
        tokenizer: a transformers tokenizer.

    Raises:
        ConfigError: there is no such template, it is not valid Jinja, or it does not go with the layout.
    """
    name = name or layout.template
    source = None if name == "chat" else _read_template(name)
    if source is None or _uses_messages(source):
        if not layout.is_conversation and not layout.prompt:
            raise ConfigError(f"data.template: {name} needs a prompt and an answer; {layout.name} rows hold only text")
        return ChatTemplate(name, source, tokenizer)
    if layout.is_conversation:
        raise ConfigError(
            f"data.template: {name} is written for columns, but {layout.name} rows are conversations; "
            "use chat, chatml, or a Jinja file that loops over messages"
        )
    return RowTemplate(name, source)


def shipped_templates() -> list[str]:
    """Names of the templates that ship with Expertune."""
    return sorted(entry.name.removesuffix(".jinja") for entry in _folder().iterdir() if entry.name.endswith(".jinja"))


def _read_template(name: str) -> str:
    shipped = shipped_templates()
    if name in shipped:
        return (_folder() / f"{name}.jinja").read_text(encoding="utf-8")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.template: {name} is neither a template of Expertune (chat, {', '.join(shipped)}) nor a Jinja file "
            f"that can be read ({error})"
        ) from None


def _uses_messages(source: str) -> bool:
    # Lexed, not parsed: chat templates may hold tags that only transformers knows, such as {% generation %}.
    try:
        tokens = list(jinja2.Environment().lex(source))
    except jinja2.TemplateSyntaxError:
        return False
    return any(kind == "name" and value == "messages" for _, kind, value in tokens)


def _folder() -> Traversable:
    return files("expertune.data") / "templates"
