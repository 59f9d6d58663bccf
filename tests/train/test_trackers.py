"""Trackers receive the run through their own real clients, offline."""

import json
import re
import sqlite3
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from expertune.record import RunRecord
from tests.processes import run_copies
from tests.train.conftest import nine_steps

SETTINGS = {"wandb": {}, "trackio": {"run_name": "named"}}


class Tracked(NamedTuple):
    """A run of four steps by the command line, and the folder in which its tracker wrote."""

    folder: Path
    record: RunRecord


@pytest.fixture(scope="module")
def tracked(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tracked]:
    """A run for each tracker, in processes of their own, as trackers hold on to theirs until they end."""
    folder, codes = tmp_path_factory.mktemp("tracked"), []
    for tracker, settings in SETTINGS.items():
        values = nine_steps(small_mixtral, rows_file, folder / tracker / "run")
        values["training"] |= {"report_to": tracker, "max_steps": 4, "save_strategy": "no"} | settings
        (folder / tracker).mkdir()
        (folder / tracker / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        codes.append(
            f"import os, sys; from expertune.cli import main; os.chdir({str(folder / tracker)!r}); "
            "sys.argv[1:] = ['train', 'run.yaml']; main()"
        )
    # Their settings and caches lie here too, and a service that is slow to start is waited for.
    places = {f"WANDB_{name}_DIR": str(folder / "wandb-home") for name in ("CONFIG", "CACHE", "DATA")}
    environment = {"WANDB_MODE": "offline", "WANDB_PROJECT": "viggo-finetune", "WANDB_INIT_TIMEOUT": "900"} | places
    environment["TRACKIO_DIR"] = str(folder / "trackio" / "files")
    (folder / "output").mkdir()
    for ended in run_copies("import expertune.api", codes, folder / "output", **environment):
        assert ended.status == 0, ended.err[-4000:]
    return {name: Tracked(folder / name, RunRecord.load(folder / name / "run")) for name in SETTINGS}


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


def test_weights_and_biases_holds_project_run_name_and_losses(tracked: dict[str, Tracked]) -> None:
    (file,) = tracked["wandb"].folder.glob("wandb/offline-run-*/run-*.wandb")
    content = without_blocks(file.read_bytes())
    assert b"viggo-finetune" in content
    assert re.search(rb"run-\d{4}-\d{2}-\d{2}-\d{2}-\d{2}", content)  # <output folder>-%Y-%m-%d-%H-%M
    assert b"train/loss" in content
    for mean in logged_means(tracked["wandb"].record):
        assert json.dumps(mean).encode() in content


def test_trackio_database_holds_the_losses(tracked: dict[str, Tracked]) -> None:
    (file,) = tracked["trackio"].folder.glob("files/*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    database.close()
    assert {name for name, _ in rows} == {"named"}
    losses = [metrics["train/loss"] for metrics in (json.loads(row) for _, row in rows) if "train/loss" in metrics]
    assert losses == pytest.approx(logged_means(tracked["trackio"].record))
