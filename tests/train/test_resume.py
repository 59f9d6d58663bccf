"""A run that is killed and resumed ends where an uninterrupted one ends, to the byte."""

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from expertune import finetune, load_config
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError
from expertune.run.record import RunRecord
from expertune.train import checkpoints, saving
from expertune.train.checkpoints import MANIFEST_NAME, STAGING_NAME, find_resume_point, seal, verify
from tests.processes import run_program
from tests.train.conftest import nine_steps


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run_dir: Path) -> tuple[list[list[float]], list[list[float]]]:
    record = RunRecord.load(run_dir)
    return record["train"]["loss"], record["eval"]["loss"]


# Files that hold times or the run's own path.
TIMED_OF_CHECKPOINT = ("trainer_state.json", MANIFEST_NAME)
TIMED = {"record.json", "report.html"} | {
    f"checkpoint-{step}/{name}" for step in (3, 6, 9) for name in TIMED_OF_CHECKPOINT
}


def content_of(run_dir: Path) -> dict[str, bytes]:
    """Every file of a run directory by its name."""
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in run_dir.rglob("*") if not path.is_dir()}


def unlike(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.fixture
def uninterrupted(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it, of the test's own."""
    run_dir = tmp_path / "uninterrupted"
    shutil.copytree(whole_run, run_dir)
    record = json.loads((run_dir / "record.json").read_text(encoding="utf-8"))
    record["config"]["output_dir"] = str(run_dir)
    (run_dir / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return run_dir


# A run that keeps what its directory holds at some moments, which is what a kill at each would leave, and is killed at
# the last, as a signal from outside would at that moment.
COMMAND = """
import os, shutil, signal
from pathlib import Path
from expertune import api
from expertune.cli import main
from expertune.train import saving
from expertune.train.callbacks import History

run = Path(os.environ["RUN"])
end_step, seal, publish = History.on_step_end, saving.seal, saving.publish

def keep(moment):
    if not run.with_name(moment).exists():
        shutil.copytree(run, run.with_name(moment))

def on_step_end(*args, **kwargs):
    keep("nothing is saved yet")
    return end_step(*args, **kwargs)

def seal_staged(staged):
    keep("the first checkpoint is being written")
    seal(staged)

def publish_staged(staged, to):
    if staged.name == "checkpoint-6":
        keep("the second checkpoint is sealed and not yet in its place")
    publish(staged, to)
    if staged.name == "checkpoint-6":
        keep("the second checkpoint is there")
    if staged.name == "checkpoint-9":
        keep("the last checkpoint is there and nothing that comes after it")

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

History.on_step_end, saving.seal, saving.publish, api.summary_figure = on_step_end, seal_staged, publish_staged, die
main()
"""
MOMENTS = {
    "nothing is saved yet": {"lengths.png"},
    # Its files are there, but not its manifest, which comes last.
    "the first checkpoint is being written": {"lengths.png", STAGING_NAME},
    "the second checkpoint is sealed and not yet in its place": {"lengths.png", STAGING_NAME, "checkpoint-3"},
    "the second checkpoint is there": {"lengths.png", STAGING_NAME, "checkpoint-3", "checkpoint-6"},
    "the last checkpoint is there and nothing that comes after it": {
        *("lengths.png", STAGING_NAME),
        *("checkpoint-3", "checkpoint-6", "checkpoint-9"),
    },
    "everything is written but the summary": {"lengths.png", "adapter", "checkpoint-3", "checkpoint-6", "checkpoint-9"},
}


@pytest.fixture(scope="module")
def killed_runs(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run files of runs by the command line, each as a kill at its moment leaves it."""
    folder, files = tmp_path_factory.mktemp("killed"), {}
    for moment in MOMENTS:
        files[moment] = folder / f"{moment}.yaml"
        files[moment].write_text(
            yaml.safe_dump(nine_steps(small_mixtral, rows_file, folder / moment)), encoding="utf-8"
        )
    ended = run_program(COMMAND, "train", str(files[moment]), RUN=str(folder / moment))
    assert ended.status == -signal.SIGKILL, ended.err[-4000:]
    return files


# From a checkpoint in its place the run below resumes by default too.
SLOW = {"the second checkpoint is there"}


@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in MOMENTS]
)
def test_resume_after_kill_gives_identical_adapter_and_losses(
    moment: str, killed_runs: dict[str, Path], whole_run: Path
) -> None:
    config = load_config(killed_runs[moment])
    run_dir = Path(config.output_dir)
    left = {path.name for path in run_dir.iterdir() if path.suffix != ".json"}
    assert left - {"report.html"} == MOMENTS[moment]  # the page is there from the first evaluation on

    finetune(config, resume=True)

    assert adapter_bytes(run_dir) == adapter_bytes(whole_run)
    assert losses(run_dir) == losses(whole_run)
    assert RunRecord.load(run_dir)["train"]["steps"] == 9
    assert content_of(run_dir).keys() == content_of(whole_run).keys()
    assert unlike(content_of(run_dir), content_of(whole_run)) <= TIMED


def test_resume_of_a_run_that_logs_and_saves_out_of_step_reports_the_same_means(
    run_values: dict[str, Any], uninterrupted: Path, whole_run: Path
) -> None:
    # Logged every 2 steps and saved every 3: the mean at step 4 spans the checkpoint at step 3.
    for late in ("adapter", "checkpoint-6", "checkpoint-9"):
        shutil.rmtree(uninterrupted / late)

    finetune(parse_config(run_values | {"output_dir": str(uninterrupted)}), resume=True)

    def logged(folder: Path) -> list[tuple[int, float]]:
        state = json.loads((folder / "checkpoint-9" / "trainer_state.json").read_text(encoding="utf-8"))
        return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]

    assert logged(uninterrupted) == logged(whole_run)
    assert adapter_bytes(uninterrupted) == adapter_bytes(whole_run)


def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(uninterrupted: Path) -> None:
    damaged = uninterrupted / "checkpoint-9" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)

    point = find_resume_point(uninterrupted)

    assert point.checkpoint == uninterrupted / "checkpoint-6"
    assert len(point.refused) == 1
    assert "checkpoint-9" in point.refused[0]
    assert "optimizer.pt" in point.refused[0]


def test_checkpoint_that_was_never_sealed_is_not_picked_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="never finished"):
        verify(tmp_path / "checkpoint-5")
    assert find_resume_point(tmp_path).checkpoint is None


def test_sealed_checkpoint_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "a").write_text("a", encoding="utf-8")
    seal(folder)
    verify(folder)
    (folder / "a").unlink()
    with pytest.raises(CheckpointError, match="a is missing"):
        verify(folder)
    assert (folder / MANIFEST_NAME).exists()


def test_starting_over_a_run_folder_is_refused(run_values: dict[str, Any], uninterrupted: Path) -> None:
    before = adapter_bytes(uninterrupted)
    with pytest.raises(ConfigError, match="--resume"):
        finetune(parse_config(run_values | {"output_dir": str(uninterrupted)}))
    assert adapter_bytes(uninterrupted) == before


def test_resume_of_a_finished_run_says_so_and_changes_nothing(whole_run: Path) -> None:
    config = parse_config(RunRecord.load(whole_run)["config"])
    before = content_of(whole_run)
    written = io.StringIO()

    run = finetune(config, resume=True, console=Console(file=written, width=1000))

    assert unlike(before, content_of(whole_run)) == set()
    assert run.record["run"]["status"] == "finished"
    assert "finished, after 9 steps" in written.getvalue()
    assert f"lora.init_from={whole_run}/adapter" in written.getvalue()


def test_resume_of_a_finished_run_with_more_steps_is_told_the_way(whole_run: Path) -> None:
    values = RunRecord.load(whole_run)["config"]
    before = content_of(whole_run)
    values["training"]["max_steps"] = 12
    with pytest.raises(ConfigError, match=r"max_steps was 9 .*lora\.init_from="):
        finetune(parse_config(values), resume=True)
    assert unlike(before, content_of(whole_run)) == set()


def test_resume_from_checkpoints_without_optimizer_state_is_refused(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_values["training"] |= {"save_only_model": True, "max_steps": 2, "save_steps": 1, "eval_strategy": "no"}
    config, run_dir = parse_config(run_values), tmp_path / "run"
    monkeypatch.setattr(saving, "publish", lambda *where: (checkpoints.publish(*where), interrupt())[0])
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    run = RunRecord.load(run_dir)["run"]
    assert (run["status"], run["error"]) == ("interrupted", "interrupted")
    with pytest.raises(ConfigError, match=r"checkpoint-1 holds the adapter without .*save_only_model.*lora\.init_from"):
        finetune(config, resume=True)
    monkeypatch.undo()
    # With all steps taken there is nothing that an optimizer's state would be needed for.
    shutil.rmtree(run_dir)
    finetune(config)
    adapter = adapter_bytes(run_dir)
    shutil.rmtree(run_dir / "adapter")
    finetune(config, resume=True)
    assert adapter_bytes(run_dir) == adapter


def interrupt() -> None:
    raise KeyboardInterrupt


def test_resume_has_each_evaluation_once_where_epochs_end_after_their_checkpoint(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five steps an epoch: killed right after the checkpoint of the step that ends the first.
    del run_values["training"]["eval_steps"]
    run_values["training"] |= {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 5, "max_steps": 7}
    run_values["training"]["eval_on_start"] = True
    whole = finetune(parse_config(run_values | {"output_dir": str(tmp_path / "whole")}))
    assert [step for step, _ in whole.record["eval"]["loss"]] == [0, 5, 7]

    monkeypatch.setattr(saving, "publish", lambda *where: (checkpoints.publish(*where), interrupt())[0])
    with pytest.raises(KeyboardInterrupt):
        finetune(parse_config(run_values))
    monkeypatch.undo()
    finetune(parse_config(run_values), resume=True)

    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")

    def logged(folder: Path) -> list[dict[str, float]]:
        state = json.loads((folder / "checkpoint-7" / "trainer_state.json").read_text(encoding="utf-8"))
        history: list[dict[str, float]] = state["log_history"]
        return history

    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_resume_with_another_learning_rate_is_refused_by_key(run_values: dict[str, Any], uninterrupted: Path) -> None:
    training = run_values["training"] | {"learning_rate": 5e-3}
    with pytest.raises(ConfigError, match=r"training\.learning_rate was 0\.001"):
        finetune(parse_config(run_values | {"training": training, "output_dir": str(uninterrupted)}), resume=True)
