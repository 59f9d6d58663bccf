"""A run's page: one HTML file with everything in it, that needs no network and knows no torch.

Text from data, from a record or from a model's answer is escaped by the template, and its control characters are
spelled out. Besides, the page's content security policy allows one script, by its hash.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from expertune.report import sections
from expertune.report.answers import answers
from expertune.report.data_reports import data_reports
from expertune.report.expert_maps import expert_maps, load_over_time
from expertune.report.values import figure, section
from expertune.storage import write_text
from expertune.text import html_templates

PAGE_NAME = "report.html"

_TEMPLATES = Path(__file__).parent / "templates"


def write_page(record: Mapping[str, Any], run_dir: Path) -> Path:
    """Write `report.html` into a run directory, whole or not at all.

    Args:
        record: the run record's values; sections may be missing.
        run_dir: the run directory.

    Returns:
        The page.
    """
    path = run_dir / PAGE_NAME
    write_text(path, render_page(record, str(run_dir)))
    return path


def render_page(record: Mapping[str, Any], run_dir: str) -> str:
    """The page of a run as HTML.

    Args:
        record: the run record's values; sections may be missing.
        run_dir: the run directory, as commands name it.
    """
    return render(
        "report.html",
        title=Path(run_dir).name or run_dir,
        model=str(section(record, "config").get("model", "")),
        device=str(section(record, "model").get("device", "")),
        status=sections.status(record),
        outcome=sections.outcome(record),
        charts=sections.charts(record),
        experts=expert_maps(record),
        load=load_over_time(record),
        answers=answers(record),
        data=data_reports(record),
        plan=sections.plan(record),
        preflight=sections.preflight(record),
        settings=sections.settings(record),
        notes=sections.notes(record),
        versions=sections.versions(record),
        commands=sections.commands(record, run_dir),
        run_file=sections.run_file(record),
    )


def render(template: str, **values: Any) -> str:
    """A template of this folder, with the style sheet and the script inside."""
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(style=Markup(_asset("page.css")), script=Markup(script), script_digest=digest, **values)
    )


@cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = html_templates(_TEMPLATES)
    environment.filters["figure"] = figure
    return environment
