"""A run as a notebook shows it: what came out, the losses, what it took, and where the report is."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from expertune.notebook.html import render
from expertune.report import sections
from expertune.report.answers import answers
from expertune.report.page import PAGE_NAME
from expertune.report.values import Record, figure

_NUM_ANSWERS = 2


def run_html(record: Record, run_dir: Path) -> str:
    """The short form of `report.html`, from the same record.

    Args:
        record: the run record's values; sections may be missing.
        run_dir: the run directory.
    """
    outcome, drawn = sections.outcome(record), sections.charts(record)
    return render(
        "run.html",
        title=run_dir.name,
        status=sections.status(record),
        scores=[(each["label"], figure(each["before"]), figure(each["after"])) for each in outcome["scores"]],
        examples=outcome["examples"] if outcome["scored"] else None,
        took=outcome["tiles"],
        answers=answers(record)["shown"][:_NUM_ANSWERS],
        losses=drawn[0] if drawn else None,
        report=_link(run_dir / PAGE_NAME),
    )


def _link(page: Path) -> dict[str, Any] | None:
    """The page, if it is there; as a link where a notebook beside it would find it."""
    if not page.is_file():
        return None
    return {"path": page.as_posix(), "link": None if page.is_absolute() else quote(page.as_posix())}
