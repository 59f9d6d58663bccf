"""Markdown of values that come from others: no text in it becomes a link, code or HTML, or names a path."""

import re
from collections.abc import Mapping
from typing import Any

from expertune.text import counted


def titled(title: str, body: str) -> list[str]:
    """A body under a heading; nothing where it is empty."""
    return [f"## {title}", body] if body else []


def table(head: tuple[str, ...], rows: Any) -> str:
    """A table of rows of text; empty where there are none."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines]) if lines else ""


def _cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


def plain(text: str) -> str:
    """A text in one line that is no Markdown link, code or HTML: records come from others as well."""
    return "".join(each if each not in "<>`[]" else " " for each in " ".join(text.split()))[:200]


def words(text: str) -> str:
    """What an engine said, in one line that is no markup; whatever may be a path is left out."""
    text = re.sub(r"\S*[/\\]\S*", "...", " ".join(text.split()))
    return re.sub(r"([`*_\[\]<>|])", r"\\\1", text[:400])


def figure(value: Any) -> str:
    """A loss or a score; a dash where there is none."""
    return f"{value:.4f}" if isinstance(value, int | float) else "-" if value is None else str(value)


def how_many(value: Any, noun: str) -> str:
    """So many of something; a dash where that is no number."""
    return counted(value, noun) if isinstance(value, int | float) else f"- {noun}s"


def exact(value: Any) -> str:
    """A difference, which may be tiny; a dash where there is none."""
    return f"{value:.1e}" if isinstance(value, int | float) else "-"


def with_error(found: Mapping[str, Any]) -> str:
    """A figure of the harness with its standard error, where it has one."""
    error = found.get("stderr")
    return figure(found.get("value")) + (f" ± {figure(error)}" if error is not None else "")
