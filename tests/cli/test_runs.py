"""`train`, `evaluate`, `generate` and `chat`: results alone on stdout, and how each is interrupted."""

import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from expertune.config import DataConfig
from expertune.distributed.mesh import Ranks
from expertune.errors import DataError
from tests.cli.conftest import type_lines


def test_train_prints_the_run_folder(run, run_file, api):
    seen = []

    def finetune(config, resume, console, trust_remote_code):
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
    assert run("evaluate", run_dir) == (130, "", "expertune: interrupted\n")


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


def test_evaluate_as_json(run, run_dir, api):
    api.evaluate = lambda *_, **__: SCORES
    code, out, err = run("evaluate", run_dir, "--json")
    assert (code, json.loads(out), err) == (0, SCORES, "")


def test_generate_prints_the_answer_only(run, run_dir, api):
    seen = []

    def generate(run_dir, prompt, **options):
        print("a library's note")
        logging.getLogger("transformers.generation").warning("a developer's note")
        warnings.warn("a developer's warning", UserWarning, stacklevel=1)
        seen.append((prompt, options))
        return "inform(name[FIFA 12])"

    api.generate = generate
    arguments = ["generate", run_dir, "--prompt", "I like it.", "--max-new-tokens", "7", "--adapter", "checkpoint-2"]
    assert run(*arguments) == (0, "inform(name[FIFA 12])\n", "a library's note\n")
    options = {
        "max_new_tokens": 7,
        "base_only": False,
        "adapter": "checkpoint-2",
        "trust_remote_code": False,
        "other_base": False,
        "model": None,
    }
    assert seen == [("I like it.", options)]


def test_verbose_lets_warnings_of_libraries_through(run, run_dir, api):
    api.generate = lambda *_, **__: str(warnings.warn("a developer's warning", UserWarning, stacklevel=1))
    with pytest.warns(UserWarning, match="a developer's warning"):
        run("generate", run_dir, "--prompt", "Who?", "--verbose")


def test_generate_reads_its_prompt_from_stdin(run, run_dir, api, monkeypatch):
    api.generate = lambda run_dir, prompt, **_: f"<{prompt}>"
    type_lines(monkeypatch, "two", "lines", "")
    assert run("generate", run_dir, "--prompt", "-")[1] == "<two\nlines>\n"


class FakeModel:
    adapter_is_off = False

    def disable_adapter(self):
        self.adapter_is_off = True
        return warnings.catch_warnings()  # any context manager will do


@pytest.fixture
def chat(run, run_dir, api, monkeypatch):
    """Chat with a model that repeats the question; `fail` maps a question to the error that it meets."""
    model, fail = FakeModel(), {}

    def open_run(run_dir, adapter, **_):
        data = DataConfig(train="rows.jsonl", template="viggo")
        config = SimpleNamespace(model="base")
        return SimpleNamespace(model=model, tokenizer=None, config=config, data=data, adapter=adapter or "adapter")

    def stream(model, tokenizer, prompt, max_new_tokens):
        for word in prompt.split(" "):
            if word in fail:
                raise fail[word]
            yield word

    class Conversation:
        def __init__(self, data, tokenizer):
            assert data.template == "viggo"

        def prompt(self, message):
            return message

        def answered(self, message, answer):
            pass

    monkeypatch.setattr("expertune.generation.chat.stream", stream)
    monkeypatch.setattr("expertune.generation.chat.Conversation", Conversation)
    api.open_run = open_run

    def talk(*lines, options=()):
        type_lines(monkeypatch, *lines)
        return run("chat", run_dir, *options)

    return SimpleNamespace(talk=talk, model=model, fail=fail, run_dir=run_dir)


def test_chat_answers_each_line_and_ends_with_the_input(chat):
    code, out, err = chat.talk("one two", "  ", "three")
    assert (code, out) == (0, "onetwo\nthree\n")
    assert err == f"{chat.run_dir}: base with its final adapter. /exit or Ctrl-D ends.\n"


def test_chat_ends_at_exit(chat):
    assert chat.talk("one", "/exit", "two")[:2] == (0, "one\n")


def test_chat_says_which_adapter_answers(chat):
    assert "base with the adapter of checkpoint-50" in chat.talk(options=["--adapter", "checkpoint-50"])[2]
    assert not chat.model.adapter_is_off
    assert "base without its final adapter" in chat.talk(options=["--base-only"])[2]
    assert chat.model.adapter_is_off


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(chat):
    chat.fail["long"] = DataError("the prompt has 9 tokens, but the model's context holds 8; shorten it")
    code, out, err = chat.talk("long", "one")
    assert (code, out) == (0, "one\n")
    assert "expertune: error: the prompt has 9 tokens" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat):
    chat.fail["now"] = KeyboardInterrupt()
    assert chat.talk("stop now please", "one")[:2] == (0, "stop ...\none\n")
