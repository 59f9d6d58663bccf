"""Start-up is light: a command imports what it uses, and help or a mistake none of the libraries of a run."""

import ast
import json
from pathlib import Path

import pytest

from tests.processes import RUN, Ended, run_copies, run_program

# Of torch a part: the module alone is there unread where a command only tokenizes.
HEAVY = ["torch.nn", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib", "numpy"]
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
    ["plan", "{good}", "--gpu", "rtx-4900"],
    ["plan", "{good}", "--memory", "much"],
    ["plan", "{tuned}"],
    ["plan", "{tuned}", "lora.init_from=no-such-folder"],
    ["train", "{tuned}"],
    ["export", "{run}", "--to", "peft", "--adapter", "checkpoint-7"],
    ["trian"],
]

# What these commands have no use for, on top of torch.
NOT_OF_A_PLAN = [
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "pandas",
    "peft",
    "sklearn",
    "torch._inductor.compile_fx",
    "transformers.trainer",
    "transformers.training_args",
    "trl",
    "expertune.api",
    "expertune.train.oom",
]
NOT_OF_DOCTOR = [*NOT_OF_A_PLAN, "transformers", "accelerate", "scipy", "expertune.planning", "expertune.data"]
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
    good = "model: m\noutput_dir: o\ndata: {train: a.jsonl}\n"
    (folder / "good.yaml").write_text(good)
    (folder / "tuned.yaml").write_text(f"{good}lora: {{init_from: {adapter_of_rank_4(folder / 'adapter')}, r: 8}}\n")
    given = {f"{{{name}}}": str(folder / f"{name}.yaml") for name in ("unknown", "good", "tuned")}
    given["{run}"] = str(folder)
    codes = {
        str(arguments): run.format([given.get(each, each) for each in arguments]) for arguments in (*HELP, *MISTAKES)
    }
    codes |= {module: f"import {module}\ntell()" for module in (*MODULES, "expertune.cli")}
    codes = {name: f"{TELL}\n{code}" for name, code in codes.items()}
    # What is light is loaded once for all of them.
    light = "import pydantic, rich.console, typer, yaml"
    processes = run_copies(light, list(codes.values()), tmp_path_factory.mktemp("imports"))
    return dict(zip(codes, processes, strict=True))


def adapter_of_rank_4(folder: Path) -> Path:
    """As much of an adapter's folder as is read at a glance."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    settings = {"r": 4, "alpha": 16, "rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    header = json.dumps({"__metadata__": {"expertune.lora": json.dumps(settings)}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def loaded(process: Ended) -> tuple[int, list[str]]:
    """How many modules a process has loaded, and which heavy ones."""
    number, heavy = json.loads(process.err.splitlines()[-1])
    return number, heavy


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str], ended: dict[str, Ended]) -> None:
    process = ended[str(arguments)]
    assert loaded(process)[1] == []
    assert process.status == 0


def test_help_loads_nothing_of_a_run_file() -> None:
    code = """
import sys
sys.argv[1:] = ["--help"]
from expertune.cli import main
try:
    main()
finally:
    print({"pydantic", "yaml", "jinja2"} & sys.modules.keys(), file=sys.stderr)
"""
    ended = run_program(code, imports="import sys")
    assert (ended.status, ended.err.splitlines()[-1]) == (0, "set()")


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


def test_values_that_an_adapter_contradicts_are_told_with_both(ended: dict[str, Ended]) -> None:
    assert "lora.r is 8, but the adapter at " in ended[str(["plan", "{tuned}"])].err


def run_command(arguments: list[str], unused: list[str], imports: str, cache: Path) -> tuple[Ended, list[str]]:
    """A command with some imports already made; and what of `unused` it has loaded."""
    code = f"""
import sys
from expertune.cli import main
sys.argv[1:] = {arguments}
try:
    main()
finally:
    print([name for name in {unused} if name in sys.modules], file=sys.stderr)
"""
    ended = run_program(code, imports=imports, HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(cache))
    assert ended.status == 0, ended.err
    return ended, ast.literal_eval(ended.err.splitlines()[-1])


def test_doctor_imports_no_more_than_it_uses(tmp_path: Path) -> None:
    assert run_command(["doctor"], NOT_OF_DOCTOR, "import torch", tmp_path)[1] == []


def test_the_first_plan_imports_nothing_that_trains_and_the_next_one_no_heavy_library(tmp_path: Path) -> None:
    command = ["plan", "examples/demo.yaml", "--memory", "16GB"]
    first, loaded = run_command(command, NOT_OF_A_PLAN, "import sys", tmp_path)
    assert loaded == []
    again, loaded = run_command(command, [*HEAVY, "tokenizers", "huggingface_hub"], "import sys", tmp_path)
    assert loaded == []
    assert again.out == first.out
    # Examples that are new take a tokenizer, and no torch.
    other = [*command, "data.train=src/expertune/assets/viggo/viggo-valid.csv"]
    assert (
        run_command(other, [name for name in HEAVY if name not in ("transformers", "numpy")], "import sys", tmp_path)[1]
        == []
    )
    # Another rank and another batch need nothing that the model does not say.
    changed = [*command, "lora.r=64", "training.per_device_train_batch_size=4"]
    assert run_command(changed, HEAVY, "import sys", tmp_path)[1] == []


def test_a_run_does_not_import_what_other_objectives_need() -> None:
    ended = run_program("import sys; print({'trl'} & sys.modules.keys())", imports=RUN)
    assert ended.out.splitlines() == ["set()"], ended.err
