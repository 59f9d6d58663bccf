"""A page as its reader sees it: elements, attributes and text, read from the HTML; and a browser where one is."""

import json
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """The parsed page.

    Attributes:
        tags: (name, attributes) of each element.
        text: what stands between them, scripts and styles left out.
        scripts: (type, content) of each script.
        marked: the text of each `mark`.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[str, str]] = []
        self.marked: list[str] = []
        self._texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("script", "style", "mark"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts.append((self.tags[-1][1].get("type", ""), data))
        elif inside != "style":
            self._texts.append(data)
            self.marked += [data] if inside == "mark" else []


def require_contained(html: str) -> Page:
    """Check that a page loads nothing and runs one script, whatever its record holds."""
    page = Page(html)
    assert [kind for kind, _ in page.scripts if kind != "application/json"] == [""]
    for kind, content in page.scripts:
        if kind:
            json.loads(content)
    for tag, attributes in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "form", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))
    assert "url(" not in html
    assert "@import" not in html
    return page


def browse(html: str, folder: Path, width: int, probe: str) -> tuple[dict[str, Any], list[str]]:
    """Show a page in headless Chromium, in a frame: a window of its own would be at least 500 pixels wide.

    Args:
        html: the page.
        folder: where the browser's files are put.
        width: of the frame, in pixels.
        probe: JavaScript that returns plain values; in it `document` and `window` are the page's.

    Returns:
        What the probe returned, and the console's messages.
    """
    frame = f'<iframe srcdoc="{escape(html)}" style="width:{width}px;height:900px;border:0"></iframe>'
    reading = f"""<script>onload = () => {{
        const window = document.querySelector("iframe").contentWindow;
        const read = (document) => {{{probe}}};
        document.documentElement.dataset.probe = JSON.stringify(read(window.document));
    }}</script>"""
    path = folder / "frame.html"
    path.write_text(f"<!doctype html><html><body>{frame}{reading}</body></html>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1800,1000"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = next(attributes.get("data-probe", "{}") for tag, attributes in Page(done.stdout).tags if tag == "html")
    return json.loads(found), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
