"""What MkDocs calls while it builds the site (`make docs`).

Pages link to files as these lie in the repository, so that a link leads somewhere in a checkout and on a Git host too.
What lies outside of `docs/` and is linked becomes a part of the site, below `repository/`. Pages below `docs/zh/` are
Chinese, and those whose names end in `.zh-CN.md`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = get_plugin_logger(__name__)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)\s#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of `docs/`, and what these link to."""
    open_pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while open_pages:
        page = open_pages.pop()
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if _outside(target) and (uri := _uri(target)) not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(target), inclusion=InclusionLevel.NOT_IN_NAV))
                if target.suffix == ".md":
                    open_pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between `docs/` and the rest of the repository to where the site has their files."""
    source = Path(str(page.file.abs_src_path))

    def lead(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.is_file() or not (_outside(target) or _outside(source)):
            return match[1]
        return posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri))

    return LINK.sub(lead, markdown)


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Any) -> dict[str, Any]:
    """Menus in the language of the page, and a switch to the same page in the other language where there is one."""
    uri = page.file.src_uri
    config.theme["language"] = "zh" if uri.startswith("zh/") or uri.endswith(".zh-CN.md") else "en"
    pages = {other.file.src_uri: other for other in nav.pages}
    for language in config.extra["alternate"]:
        folder = "zh/" if language["lang"] == "zh" else ""
        twin = pages.get(folder + uri.removeprefix("zh/")) or pages[f"{folder}index.md"]
        language["link"] = twin.url or "./"
    return context


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Stop the build where a page would load something from a network.

    The theme's script asks for a sitemap beside each alternate in the head, where there is none; the menu has them too.
    """
    output = re.sub(r'\s*<link rel="alternate"[^>]*>', "", output)
    if loaded := re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", output):
        log.warning("%s would load from a network: %s", page.file.src_uri, loaded)
    return output


def _outside(path: Path) -> bool:
    return path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    return f"repository/{path.relative_to(ROOT)}" if _outside(path) else str(path.relative_to(DOCS))
