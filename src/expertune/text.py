"""Text from data, made safe to look at: nothing in it moves a cursor, hides text, turns it round or is read as HTML.

And sizes and counts as people read them.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_SPELLED_OUT = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\n\t\u200c\u200d"  # joiners are part of some scripts and of emoji, and move nothing


# Words and gaps of a line; what stands in backticks is one word with what touches it.
_PARTS = re.compile(r"(?:`[^`]*`|\S)+|\s+")


def printable(text: str, kept: str = "\n\t") -> str:
    """A text with its control characters spelled out, as `\\u202e`.

    Those of format (Cf) are the ones without a width, and the ones that change the direction of what follows. Half
    surrogates (Cs) have no UTF-8.

    Args:
        text: any text.
        kept: characters that stay as they are.
    """
    if text.isprintable():  # most are, and this looks at them in C
        return text
    return "".join(
        char if char in kept or unicodedata.category(char) not in _SPELLED_OUT else ascii(char)[1:-1] for char in text
    )


def shortened(text: str, max_chars: int) -> str:
    """A text without its middle where it is longer than this; the number of characters left out stands there."""
    if len(text) <= max_chars:
        return text
    head, tail = 2 * max_chars // 3, max_chars // 3
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"


def folded(text: str, width: int) -> str:
    """A text whose lines break between words where the columns end.

    What somebody may copy stays whole: a word that is longer than that, as a path is, and a command in backticks.

    Args:
        text: any text.
        width: columns.
    """
    from rich.cells import cell_len

    lines = []
    for line in text.split("\n"):
        folding = gap = ""
        for part in _PARTS.findall(line):
            if part.isspace():
                gap = part
            elif not folding.strip() or cell_len(folding + gap + part) <= width:
                folding, gap = folding + gap + part, ""
            else:
                lines.append(folding)
                folding, gap = part, ""
        lines.append(folding + gap)
    return "\n".join(lines)


def counted(count: float, noun: str) -> str:
    """So many of something: `1 step`, `2,000 steps`.

    Args:
        count: how many; a whole number.
        noun: what, in the singular, with an s in the plural.
    """
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def format_size(num_bytes: int) -> str:
    """Bytes in decimal units, as memory budgets are written: 24.31 GB, 512 MB."""
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.2f} GB"
    return f"{num_bytes / 10**6:.0f} MB" if num_bytes >= 10**6 else f"{num_bytes / 10**3:.0f} kB"


def html_templates(folder: Path) -> Environment:
    """Templates of HTML in a folder. What they are given is escaped, and its control characters are spelled out."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )


def _finalize(value: Any) -> Any:
    """What a template's expression becomes before it is escaped."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value, _KEPT)
