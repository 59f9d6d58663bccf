"""Runs on an NF4 folder, and the command that writes one."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import expertune
from expertune.cli import app
from expertune.config import parse_config
from tests.processes import run_program
from tests.train.conftest import rows_file, run_values, small_mixtral, three_steps
from tests.train.scarce import adapter_bytes

__all__ = ["rows_file", "run_values", "small_mixtral", "three_steps"]  # fixtures


@pytest.fixture(scope="module")
def folder(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "small-mixtral"
    expertune.quantize(str(small_mixtral), out)
    return out


def test_run_on_a_folder_trains_what_a_run_on_its_source_trains(
    folder: Path, run_values: dict[str, Any], three_steps: Path
) -> None:
    values = run_values | {"model": str(folder), "training": run_values["training"] | {"max_steps": 3}}
    on_folder = expertune.finetune(parse_config(values))
    assert on_folder.record["train"]["loss"] == expertune.RunRecord.load(three_steps)["train"]["loss"]
    assert adapter_bytes(on_folder.output_dir) == adapter_bytes(three_steps)
    assert expertune.evaluate(on_folder.output_dir)["loss"] == expertune.evaluate(three_steps)["loss"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_command_prints_the_folder_and_little_else(small_mixtral: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, messages = run("quantize", str(small_mixtral), str(out))
    assert (code, said) == (0, f"{out}\n")
    assert len(messages.splitlines()) <= 12  # how far it is after ten seconds, which this model does not need
    for path in folder.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_command_takes_every_setting(small_mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, _ = run("quantize", str(small_mixtral), str(out), "--no-double-quantization", "--dtype", "bfloat16")
    manifest = json.loads((out / "expertune.json").read_text(encoding="utf-8"))
    assert code == 0
    assert manifest["quantization"]["double_quantization"] is False
    assert manifest["dtype"] == "bfloat16"


def test_command_verifies_a_folder(folder: Path) -> None:
    count = len(list(folder.iterdir())) - 2  # all but the manifest and README.md
    assert run("quantize", "--verify", str(folder)) == (
        0,
        f"{folder}: {count} files as written\n",
        "",
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("no/such/folder/at-all", "out"), "expertune: error: model no/such/folder/at-all: neither a folder here"),
        (("--verify", "."), "no expertune.json here; is it an NF4 folder?"),
        (("model",), "give the folder to write"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, error = run("quantize", *arguments)
    assert (code, said) == (2, "")
    assert told in error
    assert "Traceback" not in error


def test_interrupted_command_says_how_to_go_on(small_mixtral: Path, tmp_path: Path) -> None:
    code = """
import sys
from expertune.checkpoint.writer import HashedFile
def interrupt(file, view):
    raise KeyboardInterrupt
HashedFile.write = interrupt
from expertune.cli import main
main()
"""
    out = tmp_path / "out"
    ended = run_program(code, "quantize", str(small_mixtral), str(out))
    assert ended.status == 130
    assert f"expertune: interrupted; the same command resumes {out}" in ended.err
    assert [path.name for path in out.iterdir()] == ["expertune.partial.json"]
