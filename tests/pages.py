"""The pages of the repository, and the code blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md", "notebooks/*.md")
    for path in ROOT.glob(pattern)
)


@dataclass
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line of content, from 1
    kind: str  # the language that its fence names
    text: str

    def __str__(self) -> str:
        return f"{page_id(self.page)}:{self.line}"


def page_id(page: object) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix() if isinstance(page, Path) else str(page)


def blocks(page: Path, *kinds: str) -> list[Block]:
    """The fenced blocks of a page, in a list or not; of some kinds where these are named."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text[: match.start()].count("\n") + 2, match[2], dedent(match[3]))
        for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    ]
    return [block for block in found if not kinds or block.kind in kinds]


def prose(page: Path) -> str:
    """A page's text without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
