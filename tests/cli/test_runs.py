"""`train` and `evaluate`: results alone on stdout, and how each is interrupted."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from expertune.cli import training
from expertune.distributed.mesh import Ranks
from expertune.distributed.processes import Launch
from expertune.run.lock import hold_run_directory


def test_train_prints_the_run_folder(run, run_file, api):
    seen = []

    def finetune(config, overrides, resume, console, trust_remote_code, trust_rewards):
        seen.append((config.output_dir, resume, trust_remote_code))
        console.print("step 1")
        print("a library's note")
        return SimpleNamespace(output_dir=Path(config.output_dir), context=SimpleNamespace(ranks=Ranks()))

    api.finetune = finetune
    assert run("train", "run.yaml", "output_dir=runs/second", "--resume", "--trust-remote-code") == (
        0,
        "runs/second\n",
        "step 1\na library's note\n",
    )
    assert seen == [("runs/second", True, True)]


def test_a_folder_that_holds_a_run_is_refused_before_libraries_are_loaded(run, run_file, run_dir, api, tmp_path):
    (tmp_path / "runs" / "first" / "adapter").mkdir()
    api.finetune = lambda *_, **__: pytest.fail("the libraries were loaded")
    code, out, err = run("train", "run.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("expertune: error: runs/first already holds a run; continue it with --resume (")
    assert run("train", "run.yaml", "--resume")[::2] == (
        *(2, "expertune: error: runs/first/record.json: the record of no run: it holds no `config`\n"),
    )


def test_a_folder_that_a_run_writes_to_is_refused_before_libraries_are_loaded(run, run_file, api, tmp_path):
    api.finetune = lambda *_, **__: pytest.fail("the libraries were loaded")
    with hold_run_directory(tmp_path / "runs" / "first"):
        code, _, err = run("train", "run.yaml")
    assert code == 2
    assert "or end it and give the same command again with --resume" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_says_that_libraries_are_loaded(run, run_file, api, monkeypatch, rank):
    said = []
    monkeypatch.setattr(training, "working", lambda what: said.append(what) or nullcontext())
    monkeypatch.setattr(training, "launched", lambda: Launch(rank, 2, rank))
    api.finetune = lambda *_, **__: SimpleNamespace(
        output_dir=Path("runs"), context=SimpleNamespace(ranks=SimpleNamespace(on_main=lambda show: None))
    )
    assert run("train", "run.yaml")[0] == 0
    assert said == ["loading the libraries"][rank:]


@pytest.mark.parametrize(
    ("left", "how"),
    [
        ([], "no checkpoint had been written, so that `{}` starts again from the first step"),
        (["adapter"], "no checkpoint had been written, so that `{} --resume` starts again from the first step"),
        (["checkpoint-3", "checkpoint-12"], "`{} --resume` continues from checkpoint-12"),
    ],
)
def test_an_interrupted_run_says_how_to_continue_by_what_is_there(run, run_file, api, tmp_path, left, how):
    def interrupt(*args, **kwargs):
        for name in left:
            (tmp_path / "runs" / "first" / name).mkdir(parents=True)
        raise KeyboardInterrupt

    api.finetune = interrupt
    code, out, err = run("train", "run.yaml", "data.template=my template.jinja")
    assert (code, out) == (130, "")
    command = "expertune train run.yaml 'data.template=my template.jinja'"
    assert err == f"expertune: interrupted; {how.format(command)}\n"


def test_other_commands_are_interrupted_in_one_line(run, run_dir, api):
    def evaluate(*_, **__):
        raise KeyboardInterrupt

    api.evaluate = evaluate
    code, out, err = run("evaluate", run_dir)
    assert (code, out) == (130, "")
    assert err.splitlines()[1:] == ["expertune: interrupted"]


SCORES = {
    "adapter": "checkpoint-50",
    "loss": 0.25,
    "task": {
        "metric": "slot-f1",
        "rows": 5,
        "slot_f1": 0.75,
        "examples": [{"prompt": "I [like] it.", "expected": "f(a[b])", "answered": "f(a[c])", "right": False}],
    },
}


def test_evaluate_prints_figures_and_examples(run, run_dir, api):
    seen = []
    api.evaluate = lambda run_dir, **options: seen.append(options) or SCORES
    code, out, _ = run("evaluate", run_dir, "--adapter", "checkpoint-50", "--rows", "5", "--base-only")
    assert code == 0
    assert seen == [
        {
            "adapter": "checkpoint-50",
            "rows": 5,
            "base_only": True,
            "trust_remote_code": False,
            "other_base": False,
            "model": None,
        }
    ]
    assert [line.split() for line in out.splitlines()[:5]] == [
        ["adapter", "checkpoint-50"],
        ["loss", "0.2500"],
        ["metric", "slot-f1"],
        ["rows", "5"],
        ["slot_f1", "0.7500"],
    ]
    assert "I [like] it.\n  expected: f(a[b])\n  wrong: f(a[c])" in out


def test_examples_of_an_evaluation_break_between_words_on_a_narrow_terminal(run, run_dir, api, monkeypatch):
    long = {"prompt": "Which of these words? " * 9, "expected": "This one. " * 9, "answered": "None. " * 20}
    scores = SCORES | {"task": SCORES["task"] | {"examples": [SCORES["task"]["examples"][0] | long]}}
    api.evaluate = lambda *_, **__: scores
    assert max(map(len, run("evaluate", run_dir)[1].splitlines())) > 100
    monkeypatch.setenv("COLUMNS", "60")
    out = run("evaluate", run_dir)[1]
    assert max(map(len, out.splitlines())) <= 60
    assert " ".join(long["prompt"].split()) in " ".join(out.split())


def test_evaluate_as_json(run, run_dir, api):
    api.evaluate = lambda *_, **__: SCORES
    code, out, err = run("evaluate", run_dir, "--json")
    assert (code, json.loads(out)) == (0, SCORES)
    assert err == f"{run_dir}: loading the libraries, then the base model with its final adapter\n"
