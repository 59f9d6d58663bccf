"""Runs whose experts are offloaded to disk: the same adapter to the byte, recorded, resumed and opened again alike."""

from pathlib import Path
from typing import Any

import pytest

from expertune import evaluate, finetune
from expertune.checkpoint.quantize import quantize
from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.run.record import RunRecord

Values = dict[str, Any]


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_finetune_gives_the_same_adapter_whether_experts_lie_in_memory_or_on_disk_and_evaluate_finds_them(
    run_values: Values, small_mixtral: Path, three_steps: Path, tmp_path: Path
) -> None:
    quantize(str(small_mixtral), tmp_path / "nf4")
    run_values["training"] |= {"max_steps": 3}
    on_disk = finetune(parse_config(run_values | {"model": str(tmp_path / "nf4"), "placement": "disk"})).record
    straight = RunRecord.load(three_steps)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(three_steps)
    assert on_disk["train"]["loss"] == straight["train"]["loss"]
    placement = on_disk["placement"]
    assert placement["layers"] == {"disk": 2}
    assert set(placement["places"].values()) == {"disk"}
    assert placement["transfers"] > 0
    assert straight["placement"]["layers"] == {"device": 2}
    tokens = straight["preflight"]["learning"]["tokens"]
    resident, compared = straight["preflight"]["effective"], on_disk["preflight"]["effective"]
    assert resident["tokens"] == resident["expert_tokens"] == compared["tokens"] == tokens
    assert 0 < compared["expert_tokens"] < tokens / 2
    # A few tokens for each expert reach what all tokens would, up to those that other layers route otherwise.
    assert compared["experts_compared"] >= resident["experts_compared"] - 1
    learning = on_disk["preflight"]["learning"]
    assert learning["factors_without_tokens"] <= 12  # two of the eight experts
    assert evaluate(tmp_path / "run")["loss"] == pytest.approx(on_disk["eval"]["loss"][-1][1], rel=1e-6)


def test_disk_without_an_nf4_folder_is_refused_with_the_command_that_writes_one(run_values: Values) -> None:
    with pytest.raises(ConfigError, match="expertune quantize"):
        finetune(parse_config(run_values | {"placement": "disk"}))
    assert not Path(run_values["output_dir"]).exists()
