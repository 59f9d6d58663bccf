"""What rich lays out on a terminal, as HTML: the same words, escaped."""

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from expertune.notebook.html import as_html
from tests.report.pages import Page


def test_tables_and_lines_become_tables_and_paragraphs_in_their_order() -> None:
    table = Table("memory", "bytes", title="what it takes")
    table.columns[1].justify = "right"
    table.add_row("weights", "24.48 GB")
    table.add_row("peak", "29.10 GB", style="bold")
    page = Page(as_html(Group(Text("fits", style="bold green"), "", table, "a line")))
    assert page.text == "fits what it takes memory bytes weights 24.48 GB peak 29.10 GB a line"
    assert ("p", {"class": "good strong"}) in page.tags
    assert [attributes["class"] for tag, attributes in page.tags if tag == "tr" and attributes] == ["", "strong"]
    assert ("td", {"class": "number"}) in page.tags


class _Folding:
    """What chooses its layout by the width that there is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("wide" if options.max_width > 200 else "narrow")


def test_what_folds_for_a_narrow_terminal_is_wide() -> None:
    assert Page(as_html(_Folding())).text == "wide"


def test_text_is_no_html_and_moves_nothing() -> None:
    table = Table("<b>head</b>")
    table.add_row("<script>alert(1)</script>\u202e")
    page = Page(as_html(Group(table, Text("[bold]<img src=x onerror=alert(1)>"))))
    assert {tag for tag, _ in page.tags} <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert page.text == "<b>head</b> <script>alert(1)</script>\\u202e [bold]<img src=x onerror=alert(1)>"
