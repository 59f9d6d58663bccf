"""Progress in a notebook: bars and a table of figures in one output, which is updated and never followed by another."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress, Task, TaskID

from expertune.notebook.html import render

# Rows of the table that are shown beside the first: the newest.
_NEWEST = 20
_SECONDS_BETWEEN_UPDATES = 0.25

# What is done sooner has no bar: its output would stay in the cell, empty.
_SECONDS_BEFORE_FIRST = 2.0


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, by what rich takes for one."""
    return Console().is_jupyter


def notebook_console() -> Console:
    """Where messages go in a notebook: to stdout, as text without colors. Lines in a row are then one output.

    rich's own console makes an output of each line, and what is on stderr has the color of errors.
    """
    return Console(force_jupyter=False, force_terminal=False, width=100)


class NotebookProgress(Progress):
    """rich's Progress, drawn as HTML in the cell that is running. rich's own drawing needs ipywidgets, and is not kept.

    Args:
        head: how far a task is, in words.
    """

    def __init__(self, head: Callable[[Task], str]) -> None:
        super().__init__(console=Console(quiet=True), auto_refresh=False)
        self._head = head
        self._figures: dict[str, dict[str, str]] = {}
        self._columns: dict[str, None] = {}
        self._handle: Any = None
        self._drawn = 0.0

    def start(self) -> None:
        """The output is made with the first bar that is needed."""

    def stop(self) -> None:
        """Draw what has not been drawn yet; an output in which nothing stays becomes empty."""
        self.refresh()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """How far a task is; drawn where nothing has been for a moment."""
        super().update(task_id, **changes)
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_UPDATES:
            self.refresh()

    def remove_task(self, task_id: TaskID) -> None:
        """Take a bar away."""
        super().remove_task(task_id)
        self.refresh()

    def add_figures(self, row: str, figures: Mapping[str, str]) -> None:
        """Figures of the table by column, in the row of this name; an empty one is not known yet."""
        self._columns |= dict.fromkeys(figures)
        self._figures.setdefault(row, {}).update({name: figure for name, figure in figures.items() if figure})
        self.refresh()

    def refresh(self) -> None:
        """Draw bars and table."""
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        if self._handle is not None:
            self._handle.update(HTML(self.html))
        elif self._figures or any((task.elapsed or 0) >= _SECONDS_BEFORE_FIRST for task in self.tasks):
            self._handle = display(HTML(self.html), display_id=True)

    @property
    def is_shown(self) -> bool:
        """Whether it has an output."""
        return self._handle is not None

    @property
    def html(self) -> str:
        """What is drawn."""
        if not self.tasks and not self._figures:
            return ""
        return render("progress.html", bars=list(map(self._shown, self.tasks)), figures=self._table())

    def _shown(self, task: Task) -> dict[str, Any]:
        fields = task.fields
        words = [fields["figures"], str(timedelta(seconds=int(task.elapsed or 0))), fields["estimate"].words]
        return {
            "head": self._head(task),
            "done": int(task.completed),
            "total": int(task.total or 0),
            "words": "  ".join(filter(None, words[:2] if task.finished else words)),
        }

    def _table(self) -> dict[str, Any]:
        columns = [name for name in self._columns if any(name in figures for figures in self._figures.values())]
        rows = list(self._figures.items())
        rows = rows if len(rows) <= _NEWEST + 1 else [rows[0], ("...", {}), *rows[-_NEWEST:]]
        cells = [[row, *(figures.get(name, "") for name in columns)] for row, figures in rows]
        return {
            "title": "",
            "heads": [(name, "number") for name in ("step", *columns)],
            "rows": [{"classes": "", "cells": [(cell, "number") for cell in row]} for row in cells],
        }
