"""Trackers receive the run through their own real clients, offline."""

import json
import re
import sqlite3
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expertune import finetune
from expertune.config import parse_config
from expertune.run.record import RunRecord
from expertune.train import trackers
from expertune.train.callbacks import History
from tests.processes import run_program
from tests.train.conftest import nine_steps

# Three runs in one process, as in a notebook: the second in two trackers at once, the third interrupted after its third
# step, and resumed.
SWEEP = """
import os
import wandb
from expertune import finetune
from expertune.config import parse_config
from expertune.train.callbacks import History

values = {values!r}
values["training"] |= {{"report_to": "wandb", "logging_steps": 1, "eval_strategy": "no", "save_steps": 2}}

def run(name, steps, resume=False, **training):
    training = values["training"] | {{"max_steps": steps}} | training
    finetune(parse_config(values | {{"output_dir": name, "training": training}}), resume=resume)
    assert wandb.run is None

run("first", 2)
run("second", 4, report_to=["wandb", "trackio"], run_name="named", logging_steps=2)
end_step = History.on_step_end

def interrupt(self, args, state, control, **kwargs):
    if state.global_step == 4:
        raise KeyboardInterrupt

History.on_step_end = lambda *args, **kwargs: (interrupt(*args, **kwargs), end_step(*args, **kwargs))[1]
try:
    run("third", 5)
except KeyboardInterrupt:
    assert wandb.run is None
History.on_step_end = end_step
run("third", 5, resume=True)
"""


class Tracked(NamedTuple):
    """The folder of the runs, and for each that W&B was told of what its file holds, in their order, with its name."""

    folder: Path
    wandb: list[tuple[str, bytes]]

    def record(self, run: str) -> RunRecord:
        return RunRecord.load(self.folder / run)


@pytest.fixture(scope="module")
def tracked(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """The runs, in a process of their own, as trackers hold on to theirs until they end."""
    folder = tmp_path_factory.mktemp("tracked")
    # Their settings and caches lie here too, and a service that is slow to start is waited for.
    environment = {f"WANDB_{name}_DIR": str(folder / "wandb-home") for name in ("CONFIG", "CACHE", "DATA")}
    environment |= {"WANDB_MODE": "offline", "WANDB_PROJECT": "viggo-finetune", "WANDB_INIT_TIMEOUT": "900"}
    environment["TRACKIO_DIR"] = str(folder / "trackio")
    code = SWEEP.format(values=nine_steps(small_mixtral, rows_file, folder))
    ended = run_program(code, folder=folder, **environment)
    assert ended.status == 0, ended.err[-4000:]
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    return Tracked(folder, [(file.stem.removeprefix("run-"), without_blocks(file.read_bytes())) for file in files])


def logged_means(record: RunRecord) -> list[float]:
    """Means over the two steps between logs."""
    losses = [loss for _, loss in record["train"]["loss"]]
    return [sum(losses[at : at + 2]) / 2 for at in range(0, len(losses), 2)]


def without_blocks(content: bytes) -> bytes:
    """What a .wandb file holds; on disk blocks of 32 KiB cut it wherever they end, with a header before each piece."""
    pieces, at = [], 7
    while at + 7 <= len(content):
        if (left := -at % 2**15) and left < 7:
            at += left
        (length,) = struct.unpack_from("<H", content, at + 4)
        pieces.append(content[at + 7 : at + 7 + length])
        at += 7 + length
    return b"".join(pieces)


def test_weights_and_biases_holds_project_run_name_and_losses(tracked: Tracked) -> None:
    (_, first), (_, second) = tracked.wandb[:2]
    assert b"viggo-finetune" in first
    assert re.search(rb"first-\d{4}-\d{2}-\d{2}-\d{2}-\d{2}", first)  # <output folder>-%Y-%m-%d-%H-%M
    assert b"train/loss" in first
    assert b"train/expert_imbalance" in first
    for _, loss in tracked.record("first")["train"]["loss"]:
        assert json.dumps(loss).encode() in first
    assert b"named" in second
    for mean in logged_means(tracked.record("second")):
        assert json.dumps(mean).encode() in second


def test_trackio_database_holds_the_losses(tracked: Tracked) -> None:
    (file,) = tracked.folder.glob("trackio/*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    database.close()
    assert {name for name, _ in rows} == {"named"}
    losses = [metrics["train/loss"] for metrics in (json.loads(row) for _, row in rows) if "train/loss" in metrics]
    assert losses == pytest.approx(logged_means(tracked.record("second")))


def test_two_runs_in_one_process_are_two_of_weights_and_biases_and_a_resumed_one_goes_on(tracked: Tracked) -> None:
    (first, _), (second, _), (third, before), (resumed, after) = tracked.wandb
    assert len({first, second, third}) == 3
    assert resumed == third
    losses = [json.dumps(loss).encode() for _, loss in tracked.record("third")["train"]["loss"]]
    assert [loss in before for loss in losses] == [True, True, True, False, False]
    # Resumed from the checkpoint at step 2; step 3 had been told of.
    assert [loss in after for loss in losses] == [False, False, False, True, True]


def test_resumed_run_goes_on_in_tensorboard_with_no_point_twice(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_values["training"] |= {"report_to": "tensorboard", "logging_steps": 1, "eval_steps": 1, "eval_on_start": True}
    run_values["training"] |= {"max_steps": 5, "save_steps": 2}
    config, end_step = parse_config(run_values), History.on_step_end

    def interrupted_in_the_fourth(self: History, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        end_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(History, "on_step_end", interrupted_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    monkeypatch.undo()
    record = finetune(config, resume=True).record

    files = list(Path(run_values["output_dir"]).rglob("events.out.tfevents*"))
    assert len(files) == 2
    assert len({file.parent for file in files}) == 1
    seen: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(files):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            seen.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
        texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("args")]
        assert texts == ([] if "train/train_loss" in events.Tags()["scalars"] else ["args/text_summary"])
    for tag, steps in (("train/loss", range(1, 6)), ("eval/loss", range(6)), ("train/train_loss", [5])):
        assert [step for step, _ in seen[tag]] == list(steps)
    losses = [loss for _, loss in record["train"]["loss"]]
    assert [value for _, value in seen["train/loss"]] == pytest.approx(losses)
    assert seen["train/train_loss"][0][1] == pytest.approx(sum(losses) / 5)


@pytest.mark.parametrize(
    "damaged",
    [
        "[",
        "[]",
        '{"run_name": 3}',
        '{"TensorBoardCallback": "runs"}',
        '{"TensorBoardCallback": {"folder": "../elsewhere"}}',
        '{"TensorBoardCallback": {"folder": "/tmp/elsewhere"}}',
        '{"TensorBoardCallback": {"told": {"step": "1"}}}',
    ],
)
def test_what_trackers_kept_is_not_used_if_it_is_damaged_or_leads_out_of_the_run(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(damaged, encoding="utf-8")
    assert trackers._read(tmp_path / "trackers.json") == {}


def test_what_trackers_kept_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = {"run_name": "a", "TensorBoardCallback": {"folder": "runs/Nov28_host", "told": {"step": 3}}}
    kept["WandbCallback"] = {"id": "1f", "told": {}}
    (tmp_path / "trackers.json").write_text(json.dumps(kept), encoding="utf-8")
    assert trackers._read(tmp_path / "trackers.json") == kept
