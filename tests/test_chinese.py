"""Pages in Chinese say what the English ones say: the same commands, figures, names and links."""

import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.pages import PAGES, ROOT, Block, blocks, page_id, prose

HOME = {"README.zh-CN.md": "README.md"}
# The index of pages in Chinese lists what there is of them, and has no original.
PAIRS = {
    page: ROOT / HOME.get(page_id(page), page_id(page).replace("docs/zh/", "docs/"))
    for page in PAGES
    if page_id(page) in HOME or (page_id(page).startswith("docs/zh/") and page_id(page) != "docs/zh/index.md")
}
HAN = re.compile(r"[\u4e00-\u9fff]")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def code(block: Block) -> tuple[str, list[str]]:
    """A block's language and its lines, without comments and the space before these, which are translated."""
    comment = r"\s*(?:^|(?<=\s))#\s.*$" if block.kind in ("bash", "yaml", "python") else r"(?!)"
    return block.kind, [re.sub(comment, "", line) for line in block.text.splitlines()]


def inline_code(page: Path) -> Counter[str]:
    return Counter(" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page)))


def figures(page: Path) -> Counter[str]:
    text = LINK.sub("", re.sub(r"`[^`]+`|\d+ 月", "", prose(page)))  # English has names for months
    return Counter(re.findall(r"(?<![\w.])\d[\d,.:]*\d(?!\w)|(?<![\w.])\d(?![\w.]\w)", text))


def targets(page: Path) -> Counter[str]:
    """What a page links to, from the root; a page in Chinese counts as its original, and a heading does not count."""
    links = (link.partition("#")[0] for link in LINK.findall(prose(page)))
    found = (os.path.relpath(page.parent / link, ROOT) for link in links if link)
    return Counter(target.replace("docs/zh/", "docs/").replace(".zh-CN.ipynb", ".ipynb") for target in found)


@pytest.mark.parametrize("page", PAIRS, ids=page_id)
def test_blocks_of_code_are_those_of_the_english_page(page: Path) -> None:
    assert list(map(code, blocks(page))) == list(map(code, blocks(PAIRS[page])))


@pytest.mark.parametrize("page", PAIRS, ids=page_id)
def test_names_in_the_text_are_those_of_the_english_page(page: Path) -> None:
    assert inline_code(page) == inline_code(PAIRS[page])


@pytest.mark.parametrize("page", PAIRS, ids=page_id)
def test_figures_are_those_of_the_english_page(page: Path) -> None:
    assert figures(page) == figures(PAIRS[page])


@pytest.mark.parametrize("page", PAIRS, ids=page_id)
def test_links_are_those_of_the_english_page(page: Path) -> None:
    found, expected = targets(page), targets(PAIRS[page])
    for home in {*HOME, *HOME.values()}:  # each leads to the other
        found.pop(home, None)
        expected.pop(home, None)
    assert found == expected


@pytest.mark.parametrize("page", PAIRS, ids=page_id)
def test_headings_and_tables_are_as_many_as_in_the_english_page(page: Path) -> None:
    def shape(page: Path) -> list[str]:
        marks = (re.match(r"#+ |\||[-*] |\d+\. ", line) for line in prose(page).splitlines())
        return [re.sub(r"\d+", "1", mark.group()) for mark in marks if mark]

    assert shape(page) == shape(PAIRS[page])


@pytest.mark.parametrize("page", PAIRS, ids=page_id)
def test_a_page_in_chinese_is_in_chinese(page: Path) -> None:
    for paragraph in re.split(r"\n\s*\n", prose(page)):
        words = re.sub(r"`[^`]+`|\]\([^)]*\)", "", paragraph)
        if len(re.findall(r"[A-Za-z]{2,}", words)) > 8:
            assert HAN.search(words), paragraph


# Browsers show a line break as a space, which Chinese does not have between words.
def test_a_paragraph_in_chinese_is_one_line() -> None:
    texts = [prose(page) for page in PAGES if page_id(page) in HOME or page_id(page).startswith("docs/zh/")]
    notebook = json.loads((ROOT / "notebooks" / "mixtral-qlora.zh-CN.ipynb").read_text(encoding="utf-8"))
    texts += ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    begins = r"\s*$|#+ |\||!\[|\s*[-*] |\s*\d+\. "
    for text in texts:
        for line, following in pairwise(text.splitlines()):
            assert not line.strip() or re.match(begins, following), f"{line}\n{following}"


def test_notebook_in_chinese_has_the_cells_and_outputs_of_the_english_one() -> None:
    def cells(name: str, kind: str) -> list[dict[str, Any]]:
        notebook = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))
        return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]

    def links(cell: dict[str, Any]) -> Counter[str]:
        return Counter(link.replace("docs/zh/", "docs/") for link in LINK.findall("".join(cell["source"])))

    english, chinese = "mixtral-qlora.ipynb", "mixtral-qlora.zh-CN.ipynb"
    assert cells(chinese, "code") == cells(english, "code")
    originals, translations = cells(english, "markdown"), cells(chinese, "markdown")
    assert list(map(links, translations)) == list(map(links, originals))
    assert all(HAN.search("".join(cell["source"])) for cell in translations)
