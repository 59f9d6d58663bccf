"""Room on the disk for what a run will write."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from expertune.errors import StorageError
from expertune.planning.disk import Disk, require_room
from expertune.train.schedule import checkpoints_at_once

DISK = Disk(None, 0, adapter_bytes=10**9, checkpoint_bytes=3 * 10**9, checkpoints_kept=None)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("training", "count"),
    [
        ({"max_steps": 9, "save_steps": 3}, 3),
        ({"max_steps": 10, "save_steps": 3}, 4),
        ({"max_steps": 9, "save_strategy": False}, 0),
        ({"max_steps": 9, "save_strategy": "no"}, 0),
        ({"num_train_epochs": 3, "save_strategy": "epoch"}, 3),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, 1),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 10}, 10),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 0.25}, 4),
        ({"max_steps": 100, "save_steps": 1, "save_total_limit": 3}, 4),
        ({"max_steps": 100, "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}, 3),
        ({"max_steps": 2, "save_steps": 1, "save_total_limit": 3}, 2),
    ],
)
def test_checkpoints_that_lie_in_a_run_folder_at_once(training: dict[str, Any], count: int) -> None:
    assert checkpoints_at_once(training, num_examples=100) == count


@pytest.mark.parametrize(("free", "fits"), [(13 * 10**9, True), (13 * 10**9 - 1, False)])
def test_run_that_does_not_fit_on_the_disk_is_refused_with_what_it_will_write(
    free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    training = {"max_steps": 4, "save_steps": 1}
    if fits:
        require_room(DISK, training, 100, tmp_path)
        return
    with pytest.raises(
        StorageError, match=r"will write 13\.00 GB here .*4 checkpoints of 3\.00 GB.* 13\.00 GB are free"
    ):
        require_room(DISK, training, 100, tmp_path)


def test_checkpoints_of_a_run_that_resumes_are_not_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with (tmp_path / "checkpoint-1" / "optimizer.pt").open("wb") as file:
        file.truncate(3 * 10**9)  # without a block on the disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10 * 10**9))
    require_room(DISK, {"max_steps": 4, "save_steps": 1}, 100, tmp_path)
