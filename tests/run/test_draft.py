"""A first run file: what is chosen for a model and examples, and that it runs."""

import json
import shutil
from pathlib import Path

import pytest

import expertune
from expertune import load_config
from expertune.errors import ConfigError, DataError
from expertune.planning import reading
from expertune.planning.devices import Machine
from expertune.planning.plan import plan_for
from expertune.planning.recall import recall_shapes
from expertune.run.draft import draft_run_file

MODEL = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with examples of questions."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_is_written_is_planned_and_trained_as_it_stands(folder):
    draft = draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"))
    (folder / "run.yaml").write_text(draft.text)
    config = load_config("run.yaml")
    assert (config.data.train, config.data.eval) == ("rows.jsonl[0:36]", "rows.jsonl[36:40]")
    assert (config.data.template, config.data.max_length) == ("question-answer", 64)
    assert (config.lora.r, config.training["learning_rate"]) == (16, 2e-4)
    assert expertune.plan(config).fits
    run = expertune.finetune(config, ["training.max_steps=2", "training.eval_steps=1", "training.save_steps=1"])
    assert run.record["train"]["steps"] == 2
    assert run.output_dir == Path("runs/rows")
    taken = run.record["run"]["phases"]
    assert set(taken) == {"planning", "data", "loading", "preflight", "training", "evaluation"}
    assert sum(taken.values()) <= run.record["run"]["seconds"] + 0.5
    assert run.record["plan"]["run"]["steps"] == 2


def test_the_first_plan_of_what_is_written_reads_no_model_again(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "run.yaml").write_text(
        draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), read=recall_shapes).text
    )
    monkeypatch.setattr(reading, "read_shapes", None)
    config = load_config("run.yaml")
    assert plan_for(config, Machine.of(config), read=recall_shapes).fits


def test_each_choice_has_its_reason_above_it_and_an_override_stands_above_all(folder):
    draft = draft_run_file(str(MODEL), "rows.jsonl", Path("my run.yaml"), ["lora.r=4", "memory_budget=4GB"])
    lines = draft.text.splitlines()
    assert lines[0] == "# What it costs:  expertune plan 'my run.yaml'"
    assert "5e-5" in lines[lines.index("  learning_rate: 0.0002") - 1]
    assert lines[lines.index("  r: 4") - 1] == "  # As given."
    assert lines[lines.index("placement: auto") - 1].startswith("# On this machine (cpu")
    assert "memory_budget: 4GB" in lines
    assert draft.preview["examples"][0]["parts"][-1]["trained"]


@pytest.mark.parametrize(
    ("given", "evaluated", "says"),
    [
        ("data.train=rows.jsonl[0:36]", None, "Nothing is held out of it"),
        ("data.train=rows.jsonl", None, "Nothing is held out of it"),
        ("data.eval=null", None, "As given."),
        ("data.eval=[other.jsonl]", ["other.jsonl"], "As given."),
        ("data.eval=other.jsonl[10:30]", "other.jsonl[10:30]", "As given."),
    ],
)
def test_nothing_is_held_out_where_an_override_names_examples(folder, given, evaluated, says):
    shutil.copy("rows.jsonl", "other.jsonl")
    draft = draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), [given])
    (folder / "run.yaml").write_text(draft.text)
    config = load_config("run.yaml")
    assert config.data.eval == evaluated
    assert says in draft.text
    num_rows = 36 if "36" in given else 40  # not fewer by the size of another file's slice
    assert draft.plan.run_time.steps == 3 * -(-num_rows // config.training["gradient_accumulation_steps"])


def test_rows_that_are_evaluated_and_trained_on_are_noted_in_the_file(folder):
    draft = draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), ["data.eval=rows.jsonl[30:40]"])
    assert "10 of 10 evaluation examples are trained on" in " ".join(draft.text.replace("#", "").split())
    cut = ["data.train=rows.jsonl[0:30]", "data.eval=rows.jsonl[30:40]"]
    assert "are trained on" not in draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), cut).text


def test_a_metric_is_asked_for_without_evaluation_examples_where_some_are_held_out(folder):
    draft = draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), ["task.metric=exact-match"])
    (folder / "run.yaml").write_text(draft.text)
    config = load_config("run.yaml")
    assert (config.task.metric, config.data.eval) == ("exact-match", "rows.jsonl[36:40]")
    asked = ["task.metric=exact-match", "data.eval=null"]
    with pytest.raises(ConfigError, match=r"task\.metric needs data\.eval"):
        draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), asked)


def test_the_models_chat_template_is_taken_where_it_has_one(folder):
    model = shutil.copytree(MODEL, folder / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    text = draft_run_file("model", "rows.jsonl", Path("run.yaml")).text
    assert "  # The model's own chat template, in which it was tuned.\n  template: chat\n" in text


def test_what_does_not_fit_is_changed_so_that_it_does_and_says_so(folder):
    at_once = ["training.per_device_train_batch_size=64", "kernels={working_set: 2GiB, keep: 0}"]
    peak = draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), at_once).plan.memory.peak_bytes
    draft = draft_run_file(str(MODEL), "rows.jsonl", Path("run.yaml"), [*at_once, f"memory_budget={peak - 2**20}"])
    assert draft.plan.fits
    assert "# So that the run fits on this machine: " in draft.text


def test_columns_that_no_layout_has_are_named(folder):
    (folder / "rows.csv").write_text("ref;mr\na;b\n")
    with pytest.raises(DataError, match="no layout fits the columns ref, mr"):
        draft_run_file(str(MODEL), "rows.csv", Path("run.yaml"))
    drafted = draft_run_file(str(MODEL), "rows.csv", Path("run.yaml"), ["data.columns={prompt: ref, completion: mr}"])
    assert "eval:" not in drafted.text  # too few examples to hold any out
