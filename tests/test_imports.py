"""Start-up is light: a command imports what it uses, and help or a mistake none of the libraries of a run."""

import json

import pytest

from tests.processes import BENEATH, RUN, Ended, run_copies, run_program

HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib", "numpy"]
COMMANDS = ["plan", "train", "evaluate", "generate", "chat", "quantize", "doctor"]

HELP = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
MISTAKES = [
    ["train", "no-such-run.yaml"],
    ["plan", "no-such-run.yaml"],
    ["evaluate", "no-such-folder"],
    ["generate", "no-such-folder", "--prompt", "Who?"],
    ["generate", "no-such-folder", "--prompt", ""],
    ["chat", "no-such-folder"],
    ["generate", "{run}", "--prompt", "Who?", "--adapter", "checkpoint-7"],
    ["verify", "{run}"],
    ["plan", "{unknown}"],
    ["trian"],
]

# What these commands have no use for, on top of torch and bitsandbytes.
NOT_OF_A_PLAN = [
    "datasets",
    "pandas",
    "matplotlib",
    "trl",
    "transformers.trainer",
    "expertune.api",
    "expertune.train.oom",
]
NOT_OF_DOCTOR = [*NOT_OF_A_PLAN, "transformers", "peft", "accelerate", "scipy", "expertune.planning", "expertune.data"]
MODULES = ["expertune", "expertune.config", "expertune.evaluation.metrics", "expertune.run.record"]

TELL = f"""
import json, sys

def tell():
    print(json.dumps([len(sys.modules), [name for name in {HEAVY} if name in sys.modules]]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Each command line, and each import, in a process of its own that tells what it has loaded when it ends."""
    run = "try:\n    from expertune.cli import main\n    sys.argv[1:] = {}\n    main()\nfinally:\n    tell()"
    folder = tmp_path_factory.mktemp("given")
    (folder / "record.json").write_text('{"format_version": 1}')
    (folder / "unknown.yaml").write_text("model: m\noutput_dir: o\ndata: {train: a.jsonl}\nlaro: {}\n")
    given = {"{run}": str(folder), "{unknown}": str(folder / "unknown.yaml")}
    codes = {
        str(arguments): run.format([given.get(each, each) for each in arguments]) for arguments in (*HELP, *MISTAKES)
    }
    codes |= {module: f"import {module}\ntell()" for module in (*MODULES, "expertune.cli")}
    codes = {name: f"{TELL}\n{code}" for name, code in codes.items()}
    # What is light is loaded once for all of them.
    light = "import pydantic, rich.console, typer, yaml"
    processes = run_copies(light, list(codes.values()), tmp_path_factory.mktemp("imports"))
    return dict(zip(codes, processes, strict=True))


def loaded(process: Ended) -> tuple[int, list[str]]:
    """How many modules a process has loaded, and which heavy ones."""
    number, heavy = json.loads(process.err.splitlines()[-1])
    return number, heavy


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str], ended: dict[str, Ended]) -> None:
    process = ended[str(arguments)]
    assert loaded(process)[1] == []
    assert process.status == 0


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_told_before_any_heavy_library_is_loaded(arguments: list[str], ended: dict[str, Ended]) -> None:
    process = ended[str(arguments)]
    assert loaded(process)[1] == []
    assert process.status == 2


def test_the_command_line_loads_few_modules(ended: dict[str, Ended]) -> None:
    # Rather than seconds, which another machine takes more of; torch alone is a thousand modules.
    assert loaded(ended["expertune.cli"])[0] < 600


@pytest.mark.parametrize("module", MODULES)
def test_what_describes_a_run_needs_no_heavy_library(module: str, ended: dict[str, Ended]) -> None:
    assert loaded(ended[module])[1] == []


def test_doctor_and_plan_import_no_more_than_they_use() -> None:
    code = f"""
import sys
import expertune.cli, expertune.doctor
print([name for name in {NOT_OF_DOCTOR} if name in sys.modules])
import expertune.run.planning
print([name for name in {NOT_OF_A_PLAN} if name in sys.modules])
"""
    ended = run_program(code, imports=BENEATH)
    assert ended.out.splitlines() == ["[]", "[]"], ended.err


def test_a_run_does_not_import_what_other_objectives_need() -> None:
    ended = run_program("import sys; print({'trl'} & sys.modules.keys())", imports=RUN)
    assert ended.out.splitlines() == ["set()"], ended.err
