"""What is wrong is said in one message, with exit code 2; help, version, and a reader that goes away."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import typer

import expertune
from expertune.cli import app, main
from expertune.cli.examples import EXAMPLES
from tests.cli.conftest import RUN_FILE, type_lines

COMMANDS = list(EXAMPLES)


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
        (RUN_FILE, ["lora.r=0"], "lora.r: has to be at least 1, got 0"),
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


@pytest.mark.parametrize("command", [["evaluate"], ["chat"], ["generate", "--prompt", "Who?"], ["report"], ["export"]])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/none", "no such folder; give a run directory, which is the output_dir of a run file"),
        ("runs/frist", "no such folder; did you mean runs/first?"),
        ("runs/first/adapter", "an adapter of the run in {here}/runs/first; give that folder"),
        (
            "runs/first/checkpoint-2",
            "an adapter of the run in {here}/runs/first; give that folder with --adapter checkpoint-2 "
            "(adapter='checkpoint-2' in Python)",
        ),
        ("runs", "no record.json here; give one of the run directories in it: runs/first"),
        ("model", "a model's folder; give a run directory, which is the output_dir of a run file"),
        ("model/lora", "an adapter, which expertune.load_adapter puts on a model; give a run directory, which is the"),
    ],
)
def test_a_folder_that_is_no_run_directory_is_told_with_the_one_that_is(
    run, run_dir, tmp_path, command, given, message
):
    for name in ("runs/first/adapter", "runs/first/checkpoint-2", "model/lora"):
        (tmp_path / name).mkdir(exist_ok=True, parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "model" / "config.json").touch()
    further = ["--to", "peft"] if command == ["export"] else []
    code, out, err = run(*command, given, *further)
    assert (code, out) == (2, "")
    assert err.startswith(f"expertune: error: {given}: {message.format(here=tmp_path)}")


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (None, "no such folder; give one that `expertune export` has written"),
        ("notes.txt", "no verification.json here; give one that `expertune export` has written"),
        ("record.json", "a run directory; an export of it is verified: `expertune export {} --to FORMAT` writes one"),
        ("expertune.json", "an NF4 folder; `expertune quantize --verify {}` hashes its files again"),
    ],
)
def test_what_is_no_export_is_not_verified(run, tmp_path, holds, message):
    folder = tmp_path / "folder"
    if holds:
        folder.mkdir()
        (folder / holds).touch()
    code, out, err = run("verify", str(folder))
    assert (code, out) == (2, "")
    assert err.startswith(f"expertune: error: {folder}: {message.format(folder)}")


def test_a_run_directory_is_not_verified_and_the_commands_that_verify_its_exports_are_named(run, tmp_path):
    (tmp_path / "record.json").touch()
    for name in ("peft", "vllm"):
        (tmp_path / "exports" / name).mkdir(parents=True)
        (tmp_path / "exports" / name / "verification.json").touch()
    exports = " or ".join(f"`expertune verify {tmp_path}/exports/{name}`" for name in ("peft", "vllm"))
    assert run("verify", str(tmp_path))[2].endswith(f"an export of it is verified: {exports}\n")


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
        ["train"],
        ["train", "run.yaml", "--resmue"],
        ["finetune"],
    ],
)
def test_a_usage_error_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: expertune" in err


def test_an_error_breaks_between_words_on_a_narrow_terminal_and_paths_and_commands_stay_whole(
    run, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "expertune.json").touch()
    lines = run("verify", str(tmp_path / "folder"))[2].splitlines()
    assert len(lines) > 1
    command = f"`expertune quantize --verify {tmp_path / 'folder'}`"
    assert sum(command in line for line in lines) == 1
    assert all(len(line) <= 60 or command in line or str(tmp_path) in line for line in lines)


def test_no_line_of_an_error_is_wrapped_in_a_file(run, tmp_path):
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


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: expertune {command}" in out


@pytest.mark.parametrize("columns", ["60", "120"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_names_and_examples_whole_at_any_width(run, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = run(command, "--help")
    takes = typer.main.get_command(app).commands[command].params
    assert all(f"  {name}" in out or f" / {name}" in out for each in takes for name in each.opts if name[0] == "-")
    assert not any(cut in out for cut in ("\u2026", "<bool>", "]...]"))
    assert [f"    {line}" for line in EXAMPLES[command]] == out.splitlines()[-len(EXAMPLES[command]) :]


def test_the_list_of_commands_has_whole_sentences_on_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run("--help")
    listed = " ".join(out.partition("Commands:")[2].split())
    for name, command in typer.main.get_command(app).commands.items():
        assert f"{name} {command.help.partition(chr(10))[0]}" in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_lines_of_a_help_text_break_where_the_terminal_ends(command):
    paragraphs = typer.main.get_command(app).commands[command].help.split("\n\n")
    assert paragraphs
    assert not any("\n" in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_of_the_help_are_taken_by_the_command_that_they_name(line):
    words = shlex.split(line.rpartition("| ")[2].partition(" > ")[0])
    assert words[0] == "expertune"
    typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])


def test_version(run):
    assert run("--version") == (0, f"expertune {expertune.__version__}\n", "")


def test_a_reader_that_goes_away_causes_no_noise():
    script = "from expertune.cli import main; main()"
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([sys.executable, "-c", script, "--version"], stdout=write_end, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("options", [["--include-path", "here"], ["--task-code"], ["--download"]])
def test_an_option_of_tasks_without_tasks_is_told_before_anything_is_loaded(run, run_dir, options):
    message = f"{options[0]}: of use with --tasks TASK only; give one"
    assert run("evaluate", run_dir, *options) == (2, "", f"expertune: error: {message}\n")


@pytest.mark.parametrize("tasks", ["", " , "])
def test_tasks_that_name_none_are_not_taken_for_no_tasks(run, run_dir, tasks):
    pytest.importorskip("lm_eval")
    code, out, err = run("evaluate", run_dir, "--tasks", tasks)
    assert (code, out) == (2, "")
    assert err.endswith("tasks: no task is named; give one, such as viggo\n")


def test_tasks_without_the_harness_are_one_error_with_what_installs_it(run, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # as if it could not be imported
    code, out, err = run("evaluate", run_dir, "--tasks", "viggo")
    assert (code, out) == (2, "")
    message = "tasks are scored by lm-evaluation-harness, which is not installed: pip install 'expertune[eval]'"
    assert " ".join(err.split()).endswith(f"expertune: error: {message}")
