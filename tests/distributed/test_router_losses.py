"""Routers' auxiliary losses of a step that several processes take: those of one process."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_jobs
from tests.distributed.test_replicated import (
    BEFORE,
    NOT_TOGETHER,
    ONE,
    TWO,
    Place,
    assert_same_result,
    train,
    write_place,
)

LOSSES = ["router.aux_loss=0.1", "router.z_loss=0.01", "lora.targets=[attention,experts,router]"]
PARALLEL = "distributed.experts=parallel"


@pytest.mark.slow
def test_ranks_take_the_losses_of_routers_over_the_tokens_of_all(tmp_path: Path) -> None:
    folder = write_place(tmp_path / "place")
    jobs = {
        "one": train(1, "one", [*ONE, *LOSSES]),
        "replicated": train(2, "replicated", [*TWO, *LOSSES]),
        "shared out": train(2, "parallel", [*TWO, *LOSSES, PARALLEL]),
    }
    place = Place(folder, run_jobs(jobs, folder, BEFORE))
    for other in ("replicated", "parallel"):
        assert_same_result(place, "one", other)
        for name in ("router_aux_loss", "router_z_loss"):
            ours, theirs = (dict(place.record(run)["train"][name]) for run in ("one", other))
            assert ours == pytest.approx(theirs, abs=NOT_TOGETHER)
