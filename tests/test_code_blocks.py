"""Every code block of the pages is what its fence says: it is compiled, or read by what a reader would give it to."""

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints, is_typeddict

import jinja2
import pytest
import typer
import yaml

import expertune
from expertune import load_config
from expertune.cli import app
from expertune.config import check_training_arguments, parse_config
from tests.pages import PAGES, ROOT, Block, blocks, page_id

# `text` is output, and other things that nobody types; `tree`, `layers` and `walk` are held in test_architecture.py.
KINDS = {"bash", "jinja", "json", "layers", "python", "text", "tree", "walk", "yaml"}

# A run file around a block that shows one section only.
RUN_FILE = {"model": "m", "data": {"train": "t"}, "output_dir": "o"}

# The commands that take overrides; the others take a run directory.
TAKE_OVERRIDES = ("plan", "data", "train")

ALL = [block for page in PAGES for block in blocks(page)]
RUN_FILES = [block for block in ALL if block.kind == "yaml" and "\noutput_type:" not in block.text]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def of_kind(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in ALL if block.kind == kind], ids=str)


def commands(script: str) -> Iterator[list[str]]:
    """The commands of a script as words, without variables in front and without Python and launchers of it."""
    script = re.sub(r"(^|\s)#.*$", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(script, posix=True, punctuation_chars="|&;\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word.strip("|&;\n"):
            words.append(word)
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if "-m" in words[:-1]:
            words = words[words.index("-m") + 1 :]
        if words:
            yield words
        words = []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_closed_and_names_its_language(page: Path) -> None:
    fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))
    assert [str(block) for block in blocks(page) if block.kind not in KINDS] == []


def test_nothing_to_be_typed_stands_in_a_block_of_text() -> None:
    typed = re.compile(r"^(\$ )?(expertune|make|pip|python3?|torchrun) [\w./-]+", re.MULTILINE)
    # The synopsis of all commands, which test_pages.py holds to them.
    allowed = blocks(ROOT / "docs" / "guides" / "commands.md", "text")[:1]
    assert [str(block) for block in ALL if block.kind == "text" and typed.search(block.text)] == list(map(str, allowed))


@of_kind("bash")
def test_shell_block_is_read_by_bash(block: Block) -> None:
    ran = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert ran.stderr == ""


@of_kind("bash")
def test_commands_are_read_by_the_command_lines_own_parser(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for program, *words in commands(block.text):
        if program != "expertune":
            continue
        with warnings.catch_warnings():  # parsing `--verbose` silences libraries
            name, *arguments = words
            given = COMMANDS[name].make_context(name, list(arguments)).params
        if name in TAKE_OVERRIDES:
            config = load_config(RUN_FILE, given["overrides"] or ())
            check_training_arguments(config.training)


@of_kind("bash")
def test_files_of_the_repository_that_commands_name_are_there(block: Block) -> None:
    for _, *words in commands(block.text):
        for word in words:
            if re.match(r"(examples|benchmarks|tests|tools|src|notebooks)/", word):
                assert (ROOT / word).exists(), word


# What has an output_type is a task file, which tests/evaluation/test_harness.py gives to the harness.
@pytest.mark.parametrize("block", RUN_FILES, ids=str)
def test_run_file_has_no_wrong_key(block: Block) -> None:
    values = yaml.safe_load(block.text)
    assert isinstance(values, dict)
    needs = {"objective": "grpo"} if "rewards" in values else {}
    config = parse_config(RUN_FILE | needs | values)
    check_training_arguments(config.training, objective=config.objective)


@of_kind("json")
def test_json_can_be_parsed(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():  # an object on each
            assert isinstance(json.loads(line), dict)


@of_kind("jinja")
def test_template_can_be_parsed(block: Block) -> None:
    jinja2.Environment().parse(block.text)


def public_names_only(code: str) -> None:
    """Compiles a piece of Python and holds what it uses of the package to the public names."""
    public = {*expertune.__all__, "__version__"}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "expertune":
            assert node.module == "expertune"
            assert {alias.name for alias in node.names} <= public
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("expertune.")]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "expertune":
            assert node.attr in public


@of_kind("python")
def test_python_compiles_and_uses_only_public_names(block: Block) -> None:
    public_names_only(block.text)


@of_kind("python")
def test_public_functions_take_the_arguments_that_they_are_given(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("expertune."):
            function = getattr(expertune, ast.unparse(node.func).split(".")[1])
            if inspect.isfunction(function):
                named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(function).bind(*node.args, **named)
                assert set(named) <= arguments(function)


def arguments(function: Callable[..., Any]) -> set[str]:
    """The names of a function's arguments, with those of a TypedDict that it unpacks."""
    hints = get_type_hints(function)
    options = [part for hint in hints.values() for part in get_args(hint) if is_typeddict(part)]
    return {*hints, *(name for each in options for name in get_type_hints(each))}


def test_notebooks_use_only_public_names() -> None:
    for notebook in sorted([*ROOT.glob("examples/**/*.ipynb"), *ROOT.glob("notebooks/*.ipynb")]):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                public_names_only("\n".join(line for line in lines if not line.startswith(("!", "%"))))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_that_imports_the_package_stands_in_a_block_that_is_checked(page: Path) -> None:
    checked = "\n".join(block.text for block in blocks(page, "python"))
    # A quotation of a file's content, such as a run file, holds no import; nor does prose begin a line with one.
    imports = re.findall(r"^\s*(?:>>> )?((?:from|import) expertune\b.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert [line for line in imports if line not in checked] == []
