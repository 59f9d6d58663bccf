import json
import logging
import os
import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

import expertune
from expertune.cli import _LIBRARIES, main
from expertune.config import DataConfig
from expertune.distributed.mesh import Ranks
from expertune.errors import DataError
from expertune.run.record import RunRecord

RUN_FILE = "model: base\ndata: {train: rows.jsonl}\noutput_dir: runs/first\n"
COMMANDS = ["plan", "data", "train", "evaluate", "generate", "chat", "quantize", "doctor"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    # What a command changes in its process is undone.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}

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
    return str(record.path.parent)


@pytest.fixture
def api(monkeypatch):
    """Stands for the functions of `expertune`; a test sets those that it needs."""

    class Functions:
        def __setattr__(self, name, function):
            monkeypatch.setattr(expertune, name, function, raising=False)

    return Functions()


def type_lines(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, read=lambda: "\n".join(lines)))
    remaining = iter(lines)

    def read(prompt=""):
        assert prompt == ""
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


# --- what is wrong is said in one message, with exit code 2 -------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "data", "train"])
@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], "run.yaml: no such run file"),
        ("model: [", [], "run.yaml: not valid YAML"),
        ("just text", [], "run.yaml: a run file is a mapping of keys"),
        (RUN_FILE + "lroa: {r: 8}", [], "run.yaml: unknown key lroa; did you mean lora?"),
        (RUN_FILE + "lora: {rnak: 8}", [], "run.yaml: unknown key lora.rnak"),
        (RUN_FILE, ["lora.r"], "override 'lora.r': write it as section.key=value"),
        (RUN_FILE, ["lora.r=0"], "lora.r: Input should be greater than or equal to 1, got 0"),
        (RUN_FILE, ["lora.rnk=4"], "unknown key lora.rnk"),
    ],
)
def test_a_wrong_run_file_or_override_is_named(run, tmp_path, command, text, overrides, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    code, out, err = run(command, "run.yaml", *overrides)
    assert code == 2
    assert out == ""
    assert err.startswith("expertune: error: ")
    assert message in err


@pytest.mark.parametrize("command", [["evaluate"], ["chat"], ["generate", "--prompt", "Who?"]])
def test_a_folder_without_a_record_is_no_run_folder(run, tmp_path, command):
    code, out, err = run(*command, str(tmp_path))
    assert (code, out) == (2, "")
    assert err == f"expertune: error: {tmp_path}: no record.json here; is it a run directory?\n"


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(run, run_dir, prompt):
    code, out, err = run("generate", run_dir, "--prompt", prompt)
    assert (code, out) == (2, "")
    assert "the prompt holds no text" in err


def test_an_empty_prompt_on_stdin_is_refused(run, run_dir, monkeypatch):
    type_lines(monkeypatch, "")
    assert "the prompt holds no text" in run("generate", run_dir, "--prompt", "-")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "runs/first", "--prompt", "Who?", "--max-new-tokens", "0"],
        ["chat", "runs/first", "--max-new-tokens", "many"],
        ["evaluate", "runs/first", "--rows", "0"],
        ["generate", "runs/first"],
        ["train"],
        ["train", "run.yaml", "--resmue"],
        ["finetune"],
    ],
)
def test_a_usage_error_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: expertune" in err


def test_no_line_of_an_error_is_wrapped(run, tmp_path):
    path = tmp_path / ("long-name-" * 20) / "run.yaml"
    assert run("train", str(path))[2] == f"expertune: error: {path}: no such run file\n"


def test_a_mistake_shows_no_traceback_in_a_real_process(tmp_path):
    script = "from expertune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "run.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "expertune: error: run.yaml: no such run file\n"


def test_the_console_script_is_this_main():
    (script,) = entry_points(group="console_scripts", name="expertune")
    assert script.load() is main


def test_a_bug_is_a_traceback_and_not_an_error_message(run_file, api, monkeypatch):
    def make_plan(config, **options):
        raise ZeroDivisionError

    api.plan = make_plan
    monkeypatch.setattr(sys, "argv", ["expertune", "plan", str(run_file)])
    with pytest.raises(ZeroDivisionError):
        main()


# --- help and version ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: expertune {command}" in out


def test_version(run):
    assert run("--version") == (0, f"expertune {expertune.__version__}\n", "")


# --- plan ---------------------------------------------------------------------------------------------------------


def plan_of(fits):
    return SimpleNamespace(
        model="a model", fits=fits, to_json=lambda: {"peak_bytes": 23, "fits": fits}, render=lambda: "peak 23 GB"
    )


def test_plan_prints_its_table(run, run_file, api):
    seen = []
    api.plan = lambda config, **options: seen.extend((config, options)) or plan_of(fits=True)
    asked = ("lora.r=16", "training.learning_rate=1e-4", "--gpu", "rtx-4090", "--memory", "20GB")
    assert run("plan", "run.yaml", *asked) == (0, "peak 23 GB\n", "")
    assert seen[1] == {"gpu": "rtx-4090", "memory": "20GB", "trust_remote_code": False}
    assert seen[0].lora.r == 16
    assert seen[0].training == {"learning_rate": 1e-4}


def test_plan_as_json_is_json_and_nothing_else(run, run_file, api):
    def make_plan(config, **options):
        print("a library's note")
        return plan_of(fits=True)

    api.plan = make_plan
    code, out, err = run("plan", "run.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {"peak_bytes": 23, "fits": True}
    assert err == "a library's note\n"


@pytest.mark.parametrize(("columns", "width"), [("50", 50), ("200", 200), (None, 120), ("many", 120)])
def test_table_in_a_pipe_is_as_wide_as_columns_says(run, run_file, api, monkeypatch, columns, width):
    made = plan_of(fits=True)
    made.render = lambda: "word " * 100
    api.plan = lambda config, **options: made
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    lines = run("plan", "run.yaml")[1].splitlines()
    assert width - 5 <= max(map(len, lines)) <= width


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_plan_that_does_not_fit_is_exit_code_2(run, run_file, api, options):
    api.plan = lambda config, **options: plan_of(fits=False)
    code, out, err = run("plan", "run.yaml", *options)
    assert code == 2
    assert "23" in out
    assert err == "expertune: error: a model does not fit; see what to give up above\n"


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_run(tmp_path):
    """A run file over the embedded model and two rows of questions."""
    rows = [{"prompt": "What is the capital of Malta?", "completion": "Valletta."}, {"prompt": "", "completion": "Oh."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
    (tmp_path / "run.yaml").write_text(f"model: {model}\ndata: {{train: rows.jsonl}}\noutput_dir: out\n")


def test_data_shows_what_a_run_would_train_on_and_starts_nothing(run, toy_run, tmp_path):
    code, out, err = run("data", "run.yaml", "--examples", "1")
    assert (code, err) == (0, "")
    assert "layout    prompt-completion, recognized by the columns" in out
    assert "template  question-answer, chosen for this layout" in out
    assert "1 of 2 examples have an empty prompt" in out
    assert out.endswith("  | <s>Question: What is the capital of Malta?\n  | Answer:\u27e6 Valletta.</s>\u27e7\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run.yaml"]


def test_data_as_json_takes_overrides_and_is_json_alone(run, toy_run):
    code, out, err = run("data", "run.yaml", "data.template=viggo", "--json", "--examples", "2")
    shown = json.loads(out)
    assert (code, err, shown["eval"]) == (0, "", None)
    assert [example["num_trained"] > 0 for example in shown["train"]["examples"]] == [True, True]
    assert shown["train"]["examples"][0]["parts"][-1] == {"text": " Valletta.</s>", "trained": True}
    assert shown["train"]["template"] == "viggo"


def test_data_of_rows_that_a_run_would_refuse_is_exit_code_2(run, toy_run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "Who?", "role": "prompter", "parent_id": null}\n')
    code, out, err = run("data", "run.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("expertune: error: rows.jsonl: the examples have a column text, but role beside it")


# --- train --------------------------------------------------------------------------------------------------------


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


# --- evaluate and generate ----------------------------------------------------------------------------------------

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


# --- chat ---------------------------------------------------------------------------------------------------------


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
    assert err == f"{chat.run_dir}: adapter adapter of base. /exit or Ctrl-D ends.\n"


def test_chat_ends_at_exit(chat):
    assert chat.talk("one", "/exit", "two")[:2] == (0, "one\n")


def test_chat_says_which_adapter_answers(chat):
    assert "adapter checkpoint-50 of base" in chat.talk(options=["--adapter", "checkpoint-50"])[2]
    assert not chat.model.adapter_is_off
    assert "the base model without its adapter" in chat.talk(options=["--base-only"])[2]
    assert chat.model.adapter_is_off


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(chat):
    chat.fail["long"] = DataError("the prompt has 9 tokens, but the model's context holds 8; shorten it")
    code, out, err = chat.talk("long", "one")
    assert (code, out) == (0, "one\n")
    assert "expertune: error: the prompt has 9 tokens" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat):
    chat.fail["now"] = KeyboardInterrupt()
    assert chat.talk("stop now please", "one")[:2] == (0, "stop ...\none\n")


# --- doctor and pipes ---------------------------------------------------------------------------------------------


@pytest.fixture
def doctor(monkeypatch):
    fake = SimpleNamespace(collect=lambda: {"cpu_cores": 2}, render=lambda found: f"{found['cpu_cores']} cores")
    monkeypatch.setitem(sys.modules, "expertune.doctor", fake)


def test_doctor_prints_what_it_found(run, doctor):
    assert run("doctor") == (0, "2 cores\n", "")
    code, out, err = run("doctor", "--json")
    assert (code, json.loads(out), err) == (0, {"cpu_cores": 2}, "")


def test_a_reader_that_goes_away_causes_no_noise():
    script = "from expertune.cli import main; main()"
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([sys.executable, "-c", script, "--version"], stdout=write_end, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")
