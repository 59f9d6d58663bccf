"""What one process makes of the runs that several are compared with: computed once."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_jobs
from tests.distributed.test_replicated import BEFORE, FEW, OF_FAMILY, ONE, TASK, UNEVEN, train, write_place

RUNS = {f"{family}-1": [f"model={family}", *ONE, *more] for family, more in OF_FAMILY.items()} | {
    "few-1": [*ONE, *FEW, *TASK],
    # Of one process it decides nothing.
    "uneven-1": ["training.per_device_train_batch_size=3", *UNEVEN, "distributed.experts=shard"],
}


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, rows, a run file and the finished `RUNS`; to be copied."""
    folder = write_place(tmp_path_factory.mktemp("one-process") / "place")
    done = run_jobs({name: train(1, name, arguments) for name, arguments in RUNS.items()}, folder, BEFORE)
    assert all(of_rank.status == 0 for ended in done.values() for of_rank in ended)
    return folder
