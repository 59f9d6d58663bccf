"""`plan`, `data` and `doctor`: what is printed, on which stream, and with which exit code."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import expertune
from expertune.errors import ConfigError


def plan_of(fits):
    return SimpleNamespace(
        model="a model", fits=fits, to_json=lambda: {"peak_bytes": 23, "fits": fits}, render=lambda: "peak 23 GB"
    )


def test_plan_prints_its_table(run, run_file, api):
    seen = []
    api.plan = lambda config, **options: seen.extend((config, options)) or plan_of(fits=True)
    asked = ("lora.r=16", "training.learning_rate=1e-4", "--gpu", "rtx-4090", "--memory", "20GB", "--devices", "8")
    assert run("plan", "run.yaml", *asked) == (0, "peak 23 GB\n", "")
    assert seen[1] == {"gpu": "rtx-4090", "memory": "20GB", "devices": 8, "trust_remote_code": False}
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
    assert err == "expertune: error: a model does not fit: see the plan above\n"


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


@pytest.mark.parametrize("columns", [None, "0"])
def test_init_writes_a_run_file_shows_an_example_and_overwrites_nothing(run, toy_run, tmp_path, monkeypatch, columns):
    if columns is not None:  # of a terminal that does not know them
        monkeypatch.setenv("COLUMNS", columns)
    model = str(Path(expertune.__file__).parent / "assets" / "tiny-mixtral")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Nobody."}\n' * 4)
    code, out, err = run("init", model, "rows.jsonl", "--out", "new.yaml", "lora.r=4")
    assert (code, out) == (0, "new.yaml\n")
    assert "| <s>Question: Who?" in err
    assert "The run:        expertune train new.yaml" in err
    assert expertune.load_config(tmp_path / "new.yaml").lora.r == 4
    before = (tmp_path / "run.yaml").read_text()
    code, out, err = run("init", model, "rows.jsonl")
    assert (code, out) == (2, "")
    assert "run.yaml: is there already" in err
    assert (tmp_path / "run.yaml").read_text() == before


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("sft", "note: data.eval: 1 of 2 evaluation examples are trained on, token for token"),
        ("grpo", "note: data.eval: 2 of 2 have a prompt that the training examples have too"),
    ],
)
def test_init_tells_of_evaluation_examples_that_are_trained_on(run, tmp_path, objective, said):
    model = str(Path(expertune.__file__).parent / "assets" / "tiny-mixtral")
    rows = ['{"prompt": "Who?", "completion": "Nobody."}\n', '{"prompt": "When?", "completion": "Never."}\n']
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "held.jsonl").write_text(rows[0] + rows[1].replace("Never", "Now"))
    asked = [f"objective={objective}", "data.eval=held.jsonl"]
    if objective == "grpo":
        asked += ["rewards=[{function: exact-match}]", "training.num_generations=2"]
        asked += ["training.per_device_train_batch_size=2"]
    code, _, err = run("init", model, "rows.jsonl", "--out", "new.yaml", *asked)
    assert code == 0, err
    assert said in err
    assert said.removeprefix("note: data.eval: ") in " ".join(
        (tmp_path / "new.yaml").read_text().replace("#", "").split()
    )


def test_commands_that_init_names_are_whole_lines_that_a_shell_takes(run, tmp_path):
    model = str(Path(expertune.__file__).parent / "assets" / "tiny-mixtral")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": "Nobody."}\n' * 4)
    out = f"a  {'long ' * 20}name.yaml"
    err = run("init", model, "rows.jsonl", "--out", out)[2]
    assert f"The run:        expertune train '{out}'\n" in err
    assert f"# The run:        expertune train '{out}'\n" in (tmp_path / out).read_text()


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
    assert err.startswith(
        "expertune: error: data.train: rows.jsonl: the examples have a column text, but role beside it"
    )


@pytest.mark.parametrize("command", ["data", "plan"])
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "other.jsonl: no such file"),
        ('{"prompt": "Who?"\n', "other.jsonl: not one of 1 examples can be read; other.jsonl: row 1"),
        ('{"question": "Who?"}\n', "other.jsonl: "),
    ],
)
def test_the_key_of_the_examples_that_are_wrong_is_named(run, toy_run, tmp_path, command, key, rows, said):
    if rows is not None:
        (tmp_path / "other.jsonl").write_text(rows)
    code, out, err = run(command, "run.yaml", f"{key}=other.jsonl")
    told = " ".join((out + err).split())
    assert code == (2 if command == "data" else 0)
    assert f"{'error' if command == 'data' else 'would stop at this'}: {key}: {said}" in told


def test_a_memory_that_is_no_size_is_told_with_the_option(run, toy_run):
    message = "--memory: '12XB' is not a size; write it as 24GB, 16GiB or a number of bytes"
    assert run("plan", "run.yaml", "--memory", "12XB") == (2, "", f"expertune: error: {message}\n")
    with pytest.raises(ConfigError, match="memory: '12XB' is not a size"):
        expertune.plan("run.yaml", memory="12XB")


@pytest.fixture
def doctor(monkeypatch):
    fake = SimpleNamespace(collect=lambda: {"cpu_cores": 2}, render=lambda found: f"{found['cpu_cores']} cores")
    monkeypatch.setitem(sys.modules, "expertune.doctor", fake)


def test_doctor_prints_what_it_found(run, doctor):
    assert run("doctor") == (0, "2 cores\n", "")
    code, out, err = run("doctor", "--json")
    assert (code, json.loads(out), err) == (0, {"cpu_cores": 2}, "")
