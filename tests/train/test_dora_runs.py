"""Whole runs with DoRA and with noise on the embeddings."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from expertune import finetune
from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.run.record import RunRecord
from tests.train.scarce import adapter_bytes


def test_run_with_dora_and_noise_resumes_to_the_same_bytes(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["lora"] |= {"use_dora": True, "targets": ["attention", "experts"]}
    run_values["training"] |= {"max_steps": 4, "save_steps": 2, "eval_steps": 4, "neftune_noise_alpha": 5.0}
    run_values["data"]["merge_accumulation"] = False
    whole, resumed = tmp_path / "run", tmp_path / "resumed"
    finetune(parse_config(run_values), console=Console(file=io.StringIO()))
    record = RunRecord.load(whole)
    assert record["preflight"]["passed"]
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "adapter", "record.json"))
    text = (whole / "record.json").read_text(encoding="utf-8").replace(str(whole), str(resumed))
    (resumed / "record.json").write_text(text, encoding="utf-8")
    values = run_values | {"output_dir": str(resumed)}
    again = finetune(parse_config(values), resume=True, console=Console(file=io.StringIO())).record
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert again["train"]["loss"] == record["train"]["loss"]


@pytest.mark.parametrize("experts", ["shard", "parallel"])
def test_dora_is_refused_where_processes_share_the_weights_out(experts: str, run_values: dict[str, Any]) -> None:
    run_values |= {"distributed": {"experts": experts}}
    run_values["lora"]["use_dora"] = True
    with pytest.raises(ConfigError, match=r"lora\.use_dora needs the norms of all weights on each process"):
        parse_config(run_values)


def test_pefts_name_of_rslora_is_read_and_both_names_at_once_are_refused(run_values: dict[str, Any]) -> None:
    run_values["lora"]["use_rslora"] = True
    assert parse_config(run_values).lora.rslora
    run_values["lora"]["rslora"] = True
    with pytest.raises(ConfigError, match="rslora is the same key; remove one of them"):
        parse_config(run_values)
