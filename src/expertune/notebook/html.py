"""HTML for the outputs of a notebook: readable on light and dark themes, and where no style sheet is let through."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from rich.console import Console, ConsoleRenderable, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from expertune.text import html_templates

_TEMPLATES = Path(__file__).parent / "templates"

# Wider than any line: what rich would fold for a terminal, the browser folds.
_WIDTH = 1000


def render(template: str, **values: Any) -> str:
    """A template of this folder, whose values are escaped."""
    return _environment().get_template(template).render(values)


def as_html(renderable: RenderableType) -> str:
    """Tables and lines that rich lays out on a terminal, as HTML's own."""
    return render("rich.html", parts=list(_parts(renderable, Console(width=_WIDTH, force_jupyter=False))))


@cache
def _environment() -> Environment:
    environment = html_templates(_TEMPLATES)
    environment.globals["style"] = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment


def _parts(renderable: Any, console: Console) -> Iterator[dict[str, Any]]:
    if isinstance(renderable, Group):
        for each in renderable.renderables:
            yield from _parts(each, console)
    elif isinstance(renderable, Table):
        yield _table(renderable)
    elif isinstance(renderable, str | Text):
        if str(renderable):
            yield {"text": str(renderable), "classes": _classes(getattr(renderable, "style", ""))}
    elif isinstance(renderable, ConsoleRenderable):
        for part in renderable.__rich_console__(console, console.options):
            yield from _parts(part, console)


def _table(table: Table) -> dict[str, Any]:
    columns = [list(column.cells) for column in table.columns]
    numbers = ["number" if column.justify == "right" else "" for column in table.columns]
    rows = []
    for row, cells in zip(table.rows, zip(*columns, strict=True), strict=True):
        classes = [
            " ".join(filter(None, [number, _classes(getattr(cell, "style", "")), _classes(column.style)]))
            for cell, number, column in zip(cells, numbers, table.columns, strict=True)
        ]
        rows.append({"classes": _classes(row.style or ""), "cells": list(zip(map(str, cells), classes, strict=True))})
    heads = [str(column.header) for column in table.columns]
    return {
        "rows": rows,
        "title": str(table.title or ""),
        "heads": list(zip(heads, numbers, strict=True)) if table.show_header and any(heads) else [],
    }


def _classes(style: str | Style) -> str:
    """The style sheet's names for what rich would do with a text."""
    style = Style.parse(style) if isinstance(style, str) else style
    color = style.color.name if style.color else None
    named = {"green": "good", "red": "bad", "yellow": "bad"}.get(color or "", "")
    return " ".join(filter(None, [named, "strong" if style.bold else "", "quiet" if style.dim else ""]))
