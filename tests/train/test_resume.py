"""A run that is killed and resumed ends where an uninterrupted one ends, to the byte."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertune import finetune, load_config
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError, DataError
from expertune.record import RunRecord
from expertune.train.checkpoints import MANIFEST_NAME, STAGING_NAME, find_resume_point, seal, verify
from tests.train.conftest import start_cli


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run_dir: Path) -> tuple[list[list[float]], list[list[float]]]:
    record = RunRecord.load(run_dir)
    return record["train"]["loss"], record["eval"]["loss"]


@pytest.fixture
def uninterrupted(run_values: dict[str, Any], tmp_path: Path) -> Path:
    run_dir = tmp_path / "uninterrupted"
    finetune(parse_config(run_values | {"output_dir": str(run_dir)}))
    return run_dir


def first_checkpoint_is_being_written(run_dir: Path) -> bool:
    return (run_dir / STAGING_NAME).exists()


def second_checkpoint_is_there(run_dir: Path) -> bool:
    return (run_dir / "checkpoint-6").exists()


def nothing_is_saved_yet(run_dir: Path) -> bool:
    return (run_dir / "lengths.png").exists()


@pytest.mark.parametrize(
    "moment", [nothing_is_saved_yet, first_checkpoint_is_being_written, second_checkpoint_is_there]
)
def test_resume_after_kill_gives_identical_adapter_and_losses(
    moment: Callable[[Path], bool],
    run_values: dict[str, Any],
    run_file: Callable[..., Path],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "killed"
    path = run_file(run_values | {"output_dir": str(run_dir)})
    process = start_cli("train", str(path))
    deadline = time.monotonic() + 120
    while not moment(run_dir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run_dir / "adapter").exists()

    finetune(load_config(path), resume=True)

    assert adapter_bytes(run_dir) == adapter_bytes(uninterrupted)
    assert losses(run_dir) == losses(uninterrupted)
    assert not (run_dir / STAGING_NAME).exists()


def test_resume_of_a_run_that_logs_and_saves_out_of_step_reports_the_same_means(
    run_values: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    # Logged every 2 steps and saved every 3: the mean at step 4 spans the checkpoint at step 3.
    run_dir = tmp_path / "again"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / "adapter")
    for late in ("checkpoint-6", "checkpoint-9"):
        shutil.rmtree(run_dir / late)
    record = json.loads((run_dir / "record.json").read_text(encoding="utf-8"))
    record["config"]["output_dir"] = str(run_dir)
    (run_dir / "record.json").write_text(json.dumps(record), encoding="utf-8")

    finetune(parse_config(run_values | {"output_dir": str(run_dir)}), resume=True)

    def logged(folder: Path) -> list[tuple[int, float]]:
        state = json.loads((folder / "checkpoint-9" / "trainer_state.json").read_text(encoding="utf-8"))
        return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]

    assert logged(run_dir) == logged(uninterrupted)
    assert adapter_bytes(run_dir) == adapter_bytes(uninterrupted)


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


def test_resume_with_another_learning_rate_is_refused_by_key(run_values: dict[str, Any], uninterrupted: Path) -> None:
    training = run_values["training"] | {"learning_rate": 5e-3}
    with pytest.raises(ConfigError, match=r"training\.learning_rate was 0\.001"):
        finetune(parse_config(run_values | {"training": training, "output_dir": str(uninterrupted)}), resume=True)


def test_resume_over_rows_that_have_changed_is_refused_by_file(
    run_values: dict[str, Any], uninterrupted: Path, rows_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(rows_file.read_bytes())
    values = run_values | {"data": run_values["data"] | {"train": str(copy), "eval": None}}
    values["training"] = values["training"] | {"max_steps": 1, "eval_strategy": "no"}
    values["output_dir"] = str(tmp_path / "edited")
    finetune(parse_config(values))
    copy.write_bytes(rows_file.read_bytes().replace(b"plus", b"and"))
    with pytest.raises(DataError, match=r"data\.train: rows\.jsonl has changed"):
        finetune(parse_config(values), resume=True)
