"""A command line is run in this process, in an empty folder, over functions that stand for those of `expertune`."""

import io
import logging
import os
import sys
from types import SimpleNamespace

import pytest

import expertune
from expertune.cli import main
from expertune.cli.arguments import LIBRARIES
from expertune.run.record import RunRecord

RUN_FILE = "model: base\ndata: {train: rows.jsonl}\noutput_dir: runs/first\n"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    # What a command changes in its process is undone.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["expertune", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    yield call
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return path


@pytest.fixture
def run_dir(tmp_path):
    record = RunRecord.start(tmp_path / "runs" / "first")
    record.save()
    for checkpoint in ("checkpoint-2", "checkpoint-50"):
        (record.path.parent / checkpoint).mkdir()
    return str(record.path.parent)


@pytest.fixture
def api(monkeypatch):
    """Stands for the functions of `expertune`; a test sets those that it needs."""

    class Functions:
        def __setattr__(self, name, function):
            monkeypatch.setattr(expertune, name, function, raising=False)

    return Functions()


def type_lines(monkeypatch, *lines):
    content = io.BytesIO("\n".join(lines).encode("utf-8"))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=content))
    remaining = iter(lines)

    def read(prompt=""):
        assert prompt == ""
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
