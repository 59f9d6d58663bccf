"""The run record: whole or absent, readable everywhere."""

import json
import os
import time
from pathlib import Path

import pytest

from expertune.errors import CheckpointError
from expertune.run.record import RunRecord
from expertune.storage import write_json


def test_record_is_there_after_each_update_and_read_back(tmp_path: Path) -> None:
    record = RunRecord.start(tmp_path)
    record.update("train", loss=[[1, 2.5]])
    record.update("train", steps=1)
    again = RunRecord.load(tmp_path)
    assert again["train"] == {"loss": [[1, 2.5]], "steps": 1}
    assert "expertune" in again["versions"]


def test_section_of_the_preflight_check_is_read_under_its_earlier_name(tmp_path: Path) -> None:
    record = RunRecord.start(tmp_path)
    record.update("proof", passed=True)
    assert RunRecord.load(tmp_path)["preflight"] == {"passed": True}


def test_phase_of_the_preflight_check_in_a_plan_is_read_under_its_earlier_name(tmp_path: Path) -> None:
    record = RunRecord.start(tmp_path)
    record.update("plan", memory={"peak_bytes": 2, "moment": "proof", "moments": {"proof": 2, "loss": 1}})
    memory = RunRecord.load(tmp_path)["plan"]["memory"]
    assert memory == {"peak_bytes": 2, "moment": "preflight", "moments": {"preflight": 2, "loss": 1}}


def test_change_of_the_preflight_check_for_memory_is_read_under_its_earlier_names(tmp_path: Path) -> None:
    change = {"step": 0, "during": "proof", "error": "e", "change": "less", "setting": {"proof_tokens": 64}}
    RunRecord.start(tmp_path).update("train", recoveries=[change])
    renamed = change | {"during": "preflight", "setting": {"preflight_tokens": 64}}
    assert RunRecord.load(tmp_path)["train"]["recoveries"] == [renamed]


def test_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert os.listdir(tmp_path) == ["record.json"]  # noqa: PTH208 - hidden files too


def test_loss_that_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"loss": [float("nan"), float("inf")]})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"loss": ["nan", "inf"]}


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 99}'])
def test_file_that_is_no_record_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"record\.json"):
        RunRecord.load(tmp_path)


def test_peak_of_a_resumed_run_is_the_highest_of_its_processes(tmp_path: Path) -> None:
    first = RunRecord.start(tmp_path)
    first.keep_peak(900)
    first.save()
    resumed = RunRecord.load(tmp_path)
    resumed.keep_peak(800)
    assert resumed["memory"] == {"peak_bytes": 900}
    resumed.keep_peak(1000)
    assert resumed["memory"] == {"peak_bytes": 1000}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def phases_in(folder: Path) -> dict[str, float]:
    phases: dict[str, float] = json.loads((folder / "record.json").read_text())["run"]["phases"]
    return phases


def test_save_within_a_phase_has_its_time_so_far_and_no_time_is_counted_twice(
    tmp_path: Path, clock: list[float]
) -> None:
    record = RunRecord.start(tmp_path)
    record.add("run", status="running")
    with record.phase("training"):
        clock[0] = 100
        record.save()
        assert phases_in(tmp_path) == {"training": 100}
        with record.phase("evaluation"):
            clock[0] = 130
            record.save()
            assert phases_in(tmp_path) == {"training": 100, "evaluation": 30}
            clock[0] = 150
        clock[0] = 160
    clock[0] = 200  # in no phase
    record.save()
    assert phases_in(tmp_path) == {"training": 110, "evaluation": 50}


def test_short_phases_add_up_and_a_resumed_run_adds_to_them(tmp_path: Path, clock: list[float]) -> None:
    for total in (2, 4):
        record = RunRecord.load(tmp_path) if (tmp_path / "record.json").exists() else RunRecord.start(tmp_path)
        record.update("run", status="running")
        for _ in range(50):
            with record.phase("evaluation"):
                clock[0] += 0.04
            record.save()
        assert phases_in(tmp_path) == {"evaluation": total}
