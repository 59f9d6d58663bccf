"""A record, or a run directory, in place of a run file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import expertune
from expertune import load_config
from expertune.cli import app
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError
from expertune.run.record import RunRecord
from expertune.run.source import directories
from tests.train.conftest import nine_steps, rows_file, small_mixtral
from tests.train.scarce import adapter_bytes

__all__ = ["rows_file", "small_mixtral"]  # fixtures

RUN_FILE: dict[str, Any] = {
    "model": "models/base",
    "data": {"train": "rows/*.jsonl[0:8]", "eval": "some/dataset", "template": "own.jinja"},
    "lora": {"init_from": "other/adapter"},
    "output_dir": "runs/first",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose run was started in it, by relative paths; the test stands elsewhere."""
    folder = tmp_path / "project"
    for name in ("models/base", "rows", "other/adapter", "runs/first"):
        (folder / name).mkdir(parents=True)
    (folder / "rows" / "a.jsonl").touch()
    (folder / "own.jinja").touch()
    monkeypatch.chdir(folder)
    record = RunRecord.start(folder / "runs" / "first")
    record.values |= {"config": RUN_FILE, "run": {"status": "finished"} | directories(Path("runs/first"))}
    record.save()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


@pytest.mark.parametrize("given", ["runs/first", "runs/first/record.json"])
@pytest.mark.parametrize("moved", [False, True])
def test_relative_paths_of_a_record_are_found_from_where_its_run_file_was(
    given: str, moved: bool, project: Path, tmp_path: Path
) -> None:
    if moved:
        project = project.rename(tmp_path / "received")
    config = load_config(project / given, ["output_dir=second", "lora.r=4"])
    assert config.model == str(project / "models/base")
    assert config.data.train == str(project / "rows/*.jsonl[0:8]")
    assert config.data.template == str(project / "own.jinja")
    assert config.lora.init_from == str(project / "other/adapter")
    assert config.data.eval == "some/dataset"  # of the hub: no such file there
    assert (config.output_dir, config.lora.r) == ("second", 4)


def test_record_alone_is_looked_up_where_its_run_was(project: Path, tmp_path: Path) -> None:
    shutil.copy(project / "runs" / "first" / "record.json", tmp_path / "elsewhere" / "received.json")
    config = load_config("received.json")
    assert config.model == str(project / "models/base")
    assert config.output_dir == "runs/first"


def test_run_of_a_folder_is_resumed_where_the_folder_lies_now(project: Path, tmp_path: Path) -> None:
    moved = project.rename(tmp_path / "received") / "runs" / "first"
    assert load_config(moved, resume=True).output_dir == str(moved)


@pytest.mark.parametrize("given", [".", "record.json"])
def test_run_of_a_folder_is_not_started_over_in_it(given: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "runs" / "first")
    with pytest.raises(ConfigError, match=r"continue it with --resume .* elsewhere with .* output_dir="):
        load_config(given, ["output_dir=."])


@pytest.mark.parametrize("given", ["runs/first", "runs/first/record.json"])
def test_run_that_is_only_looked_at_needs_no_other_folder(given: str, project: Path) -> None:
    moved = project / given
    config = load_config(moved, ["output_dir=" + str(project / "runs/first"), "lora.r=4"], starts=False)
    assert (config.model, config.lora.r) == (str(project / "models/base"), 4)


def test_commit_that_a_branch_resolved_to_is_taken_again(project: Path) -> None:
    path = project / "runs" / "first" / "record.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"model": {"revision": "0a1b2c"}}), encoding="utf-8")
    assert load_config(path, ["output_dir=second"]).revision == "0a1b2c"


def test_run_of_a_record_takes_the_template_that_its_rows_had_and_not_todays_choice(project: Path) -> None:
    record = RunRecord.load(project / "runs/first")
    record.values["config"] = RUN_FILE | {"data": {"train": "rows/*.jsonl"}}
    record.update("data", train={"format": "prompt-completion", "template": "plain"})
    again = load_config(project / "runs/first", ["output_dir=second"])
    assert (again.data.format, again.data.template) == ("prompt-completion", "plain")
    # Other rows are looked at anew.
    other = load_config(project / "runs/first", ["output_dir=second", "data.train=other.jsonl"])
    assert (other.data.format, other.data.template) == ("auto", None)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", CheckpointError, r"cannot be read as JSON.*Restore it from a copy, or start a new run.*lora\.init_from"),
        ("[" * 100_000, CheckpointError, "cannot be read as JSON"),
        ('{"format_version": 99}', CheckpointError, "not a record of format version"),
        ('{"format_version": 1}', CheckpointError, "it holds no `config`"),
        ('{"format_version": 1, "config": {"modle": 1}}', ConfigError, "unknown key modle"),
    ],
)
def test_file_that_is_no_record_is_refused_by_name(
    content: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "record.json").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message) as said:
        load_config(tmp_path / "record.json")
    assert "record.json" in str(said.value)


@pytest.mark.parametrize(
    ("left", "newest"), [(["checkpoint-9", "checkpoint-10"], "checkpoint-10"), (["adapter"], "adapter")]
)
@pytest.mark.parametrize("resume", [True, False])
def test_folder_of_a_run_whose_record_is_missing_is_refused_by_what_is_missing(
    resume: bool, left: list[str], newest: str, tmp_path: Path
) -> None:
    for name in left:
        (tmp_path / name).mkdir()
    missing = rf"record\.json: missing, though \S+ holds {newest}: .* lora\.init_from={tmp_path / newest}$"
    with pytest.raises(CheckpointError, match=missing):
        load_config(tmp_path, resume=resume)
    with pytest.raises(CheckpointError, match=missing):
        RunRecord.load(tmp_path)


def test_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no record\.json here; is it a run directory"):
        load_config(tmp_path)


def test_run_file_in_json_is_a_run_file(tmp_path: Path) -> None:
    values = {"model": "m", "data": {"train": "t"}, "output_dir": "o"}
    (tmp_path / "run.json").write_text(json.dumps(values), encoding="utf-8")
    assert load_config(tmp_path / "run.json").model == "m"


def test_run_starts_again_from_its_folder_on_another_machine_and_is_used_where_its_model_has_moved(
    small_mixtral: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(small_mixtral, here / "model")
    shutil.copy(rows_file, here / "rows.jsonl")
    monkeypatch.chdir(here)
    values = nine_steps(Path("model"), Path("rows.jsonl"), Path("runs/first"))
    values["training"] |= {"max_steps": 2, "eval_strategy": "no"}
    expertune.finetune(parse_config(values))
    monkeypatch.chdir(tmp_path)
    here.rename(there)
    for command in ("data", "plan"):  # which start nothing
        shown = CliRunner().invoke(app, [command, str(there / "runs" / "first")])
        assert shown.exit_code == 0, shown.output

    expertune.finetune(there / "runs" / "first", [f"output_dir={tmp_path / 'second'}"])

    assert adapter_bytes(tmp_path / "second") == adapter_bytes(there / "runs" / "first")
    loss = expertune.evaluate(there / "runs" / "first")["loss"]
    (there / "model").rename(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"If the model has moved, give --model"):
        expertune.evaluate(there / "runs" / "first")
    assert expertune.evaluate(there / "runs" / "first", model=str(tmp_path / "base"))["loss"] == loss
    assert expertune.generate(tmp_path / "second", "What?", max_new_tokens=2, model=str(tmp_path / "base"))
