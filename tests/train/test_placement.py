"""Runs whose experts are offloaded to disk: the same adapter to the byte, recorded, resumed and opened again alike."""

from pathlib import Path
from typing import Any

import pytest

from expertune import evaluate, finetune
from expertune.checkpoint.quantize import quantize
from expertune.config import parse_config
from expertune.errors import ConfigError

Values = dict[str, Any]


@pytest.fixture
def nf4_values(run_values: Values, small_mixtral: Path, tmp_path: Path) -> Values:
    """The run on an NF4 folder of the same model."""
    quantize(str(small_mixtral), tmp_path / "nf4")
    run_values["training"] |= {"max_steps": 3}
    return run_values | {"model": str(tmp_path / "nf4")}


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_finetune_gives_the_same_adapter_whether_experts_lie_in_memory_or_on_disk(
    run_values: Values, nf4_values: Values, tmp_path: Path
) -> None:
    straight = finetune(parse_config(run_values | {"output_dir": str(tmp_path / "straight")}))
    on_disk = finetune(parse_config(nf4_values | {"placement": "disk", "output_dir": str(tmp_path / "disk")}))
    assert adapter_bytes(tmp_path / "disk") == adapter_bytes(tmp_path / "straight")
    assert on_disk.record["train"]["loss"] == straight.record["train"]["loss"]
    placement = on_disk.record["placement"]
    assert placement["layers"] == {"disk": 2}
    assert set(placement["places"].values()) == {"disk"}
    assert placement["transfers"] > 0
    assert straight.record["placement"]["layers"] == {"device": 2}


def test_evaluate_uses_the_placement_of_the_run(nf4_values: Values, tmp_path: Path) -> None:
    run = finetune(parse_config(nf4_values | {"placement": "disk"}))
    loss = evaluate(nf4_values["output_dir"])["loss"]
    assert loss == pytest.approx(run.record["eval"]["loss"][-1][1], rel=1e-6)


def test_disk_without_an_nf4_folder_is_refused_with_the_command_that_writes_one(run_values: Values) -> None:
    with pytest.raises(ConfigError, match="expertune quantize"):
        finetune(parse_config(run_values | {"placement": "disk"}))
    assert not Path(run_values["output_dir"]).exists()
