"""Start-up is light: help, a typing mistake and a bad run file answer without loading the libraries of a run."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib", "numpy"]
COMMANDS = ["plan", "train", "evaluate", "generate", "chat", "quantize", "doctor"]

REPORT = """
import atexit, json, sys, time
start = time.process_time()
atexit.register(lambda: print(json.dumps([name for name in {heavy} if name in sys.modules]), file=sys.stderr))
{code}
"""


def heavy_modules_after(code):
    source = REPORT.format(heavy=HEAVY, code=code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    return json.loads(done.stderr.splitlines()[-1]), done


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_no_heavy_library(arguments):
    heavy, done = heavy_modules_after(f"sys.argv[1:] = {arguments}; from expertune.cli import main; main()")
    assert heavy == []
    assert done.returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "no-such-run.yaml"],
        ["plan", "no-such-run.yaml"],
        ["evaluate", "no-such-folder"],
        ["generate", "no-such-folder", "--prompt", "Who?"],
        ["generate", "no-such-folder", "--prompt", ""],
        ["chat", "no-such-folder"],
        ["trian"],
    ],
)
def test_a_mistake_is_told_before_any_heavy_library_is_loaded(arguments):
    heavy, done = heavy_modules_after(f"sys.argv[1:] = {arguments}; from expertune.cli import main; main()")
    assert heavy == []
    assert done.returncode == 2


def test_the_command_line_is_ready_within_a_second():
    _, done = heavy_modules_after("import expertune.cli; print(time.process_time() - start)")
    assert float(done.stdout) < 1.0


@pytest.mark.parametrize("module", ["expertune", "expertune.config", "expertune.metrics", "expertune.record"])
def test_what_describes_a_run_needs_no_heavy_library(module):
    assert heavy_modules_after(f"import {module}")[0] == []
