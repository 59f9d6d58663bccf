"""Bytes that ranks send in a step: those that are counted, and those that the plan's formulas give."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.distributed import MODES, planned_bytes
from benchmarks.traffic import sent_bytes

from expertune.planning.communication import RoutedLayer
from tests.distributed.ranks import run_jobs
from tests.distributed.test_replicated import BEFORE, SHARED, write_place

pytestmark = pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="what the machine has sent is read there")

LAYERS = 2
LAYER = RoutedLayer(num_experts=4, top_k=2, hidden_size=64, itemsize=4)
WITHIN = 0.05
DATA = {"train": "rows.jsonl[0:8]", "template": "plain", "max_length": 64}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of two has seen in the second of two steps, by mode."""
    place = write_place(tmp_path_factory.mktemp("traffic") / "place")
    jobs = {}
    for mode in MODES:
        config = {"model": "mixtral", "output_dir": mode, "distributed": {"experts": mode}} | SHARED
        config |= {"data": DATA, "training": TRAINING, "lora": {"r": 16, "targets": ["attention", "experts"]}}
        call = f"from benchmarks.distributed_rank import train\ntrain({config!r}, 1, output="
        jobs[mode] = [f"{call}'{mode}-{rank}.json')" for rank in range(2)]
    for mode, ranks in run_jobs(jobs, place, f"{BEFORE}\nimport benchmarks.distributed_rank").items():
        assert [rank.status for rank in ranks] == [0, 0], (mode, ranks[0].err, ranks[1].err)
    return {mode: [_read(place / f"{mode}-{rank}.json") for rank in range(2)] for mode in MODES}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("mode", MODES)
def test_ranks_send_as_many_bytes_as_the_formulas_say(counted: dict[str, list[dict[str, Any]]], mode: str) -> None:
    ranks = counted[mode]
    mean = sum(sent_bytes(rank["counted"]) for rank in ranks) / len(ranks)
    assert mean == pytest.approx(planned_bytes(mode, [LAYER] * LAYERS, ranks)["routed"], rel=WITHIN)


def test_the_machine_has_sent_as_much_as_was_counted(counted: dict[str, list[dict[str, Any]]]) -> None:
    # Both ranks are on it; it counts headers as well, and whatever else is sent meanwhile.
    ranks = counted["replicate"]
    assert max(rank["loopback_bytes"] for rank in ranks) >= sum(sent_bytes(rank["counted"]) for rank in ranks)
