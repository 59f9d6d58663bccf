"""What one process makes of the runs that several are compared with: computed once."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_jobs
from tests.distributed.test_replicated import BEFORE, ONE, train, write_place

TASK = ["task.metric=exact-match", "task.max_new_tokens=4", "task.batch_size=2"]
RUNS = {
    "mixtral-1": ["model=mixtral", *ONE, *TASK],
    "qwen3_moe-1": ["model=qwen3_moe", *ONE],
    "gpt_oss-1": ["model=gpt_oss", *ONE, "data.packing=padded"],
    "few-1": [*ONE, "data.train=rows.jsonl[0:3]"],
    # Of one process it decides nothing.
    "uneven-1": ["training.per_device_train_batch_size=3", "data.train=rows.jsonl[0:9]", "distributed.experts=shard"],
}


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, rows, a run file and the finished `RUNS`; to be copied."""
    folder = write_place(tmp_path_factory.mktemp("one-process") / "place")
    done = run_jobs({name: train(1, name, arguments) for name, arguments in RUNS.items()}, folder, BEFORE)
    assert all(of_rank.status == 0 for ended in done.values() for of_rank in ended)
    return folder
