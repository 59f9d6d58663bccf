"""What the pages tell a reader to type, open or import is there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import expertune
from expertune.cli import app
from tests.pages import PAGES, ROOT, blocks, page_id, prose

README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_lines(page: Path, program: str) -> list[list[str]]:
    """Commands of one program in a page's blocks and inline code, as words; brackets of usage lines are taken off."""
    code = [line for block in blocks(page, "bash", "text") for line in block.text.splitlines()]
    code += re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in code:
        words = shlex.split(re.sub(r"(?<!\w)\[|\]|\.\.\.", " ", line), comments=True) if program in line else []
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0] == program and len(words) > 1:
            found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    # A rule may be for several targets.
    targets = set(" ".join(re.findall(r"^([a-z -]+):(?!=)", makefile, re.MULTILINE)).split())
    assert {words[0] for words in command_lines(page, "make")} <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_their_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, *arguments in command_lines(page, "expertune"):
        if not name.isupper():
            assert name in commands
            parameters = commands[name].params
            known = {option for each in parameters for option in [*each.opts, *each.secondary_opts]} | {"--help"}
            assert {word for word in arguments if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_run_files_that_commands_name_are_examples_or_the_readers_own(page: Path) -> None:
    for words in command_lines(page, "expertune"):
        for word in words:
            if word.startswith("examples/"):
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


# These describe the source; all other pages are for users.
ABOUT_THE_SOURCE = (
    *("AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks"),
    *("docs/architecture.md", "docs/reference", "docs/decisions"),
)
FOR_USERS = [page for page in PAGES if not page_id(page).startswith(ABOUT_THE_SOURCE)]


@pytest.mark.parametrize("page", FOR_USERS, ids=page_id)
def test_page_for_users_names_nothing_of_the_package_that_is_not_public(page: Path) -> None:
    named = set(re.findall(r"\bexpertune\.(?!json\b|partial\b)([A-Za-z_]\w*)", page.read_text(encoding="utf-8")))
    assert named <= {*expertune.__all__, "__version__"}


def test_every_public_name_has_its_place_in_the_reference() -> None:
    page = ROOT / "docs" / "reference" / "python.md"
    headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(headings)))
    assert named == set(expertune.__all__)
    for name in expertune.__all__:
        assert getattr(expertune, name).__doc__
    used = {
        node.attr
        for block in blocks(page, "python")
        for node in ast.walk(ast.parse(block.text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "expertune"
    }
    assert set(expertune.__all__) - used <= {"Run", "RunConfig"}


def test_readme_is_short_and_shows_both_commands_first() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    opening = "\n".join(lines[:12])
    assert "make demo" in opening
    assert "make test" in opening


def test_tools_are_compared_in_the_versions_that_were_read() -> None:
    header = next(line for line in README.splitlines() if line.startswith("| | Expertune |"))
    versions = re.findall(r"(\d[\d.]+) \|", header)
    assert len(versions) == 5
    wheels = re.findall(r"`\w+-(\d[\d.]+)`", (ROOT / "docs" / "peers.md").read_text(encoding="utf-8"))
    assert all(wheel.startswith(version) for wheel, version in zip(wheels, versions, strict=True))


def test_every_page_can_be_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    seen, open_pages = set(), [index]
    while open_pages:
        page = open_pages.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        open_pages += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    unreached = [page_id(page) for page in sorted(ROOT.glob("docs/**/*.md")) if page.resolve() not in seen]
    assert unreached == []


def test_every_page_has_its_place_in_the_navigation_of_the_site() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)  # leaves Python's tags alone
    listed = re.findall(r"'([^']+\.md)'", str(site["nav"]))
    docs = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    pages = [path for path in docs if not path.startswith("decisions/0")]  # decisions/README.md leads to these
    assert sorted(path for path in listed if not path.startswith("repository/")) == sorted(pages)


def test_license_is_whole() -> None:
    license = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in license
    assert "END OF TERMS AND CONDITIONS" in license
