"""A run that selects its experts: once, for all its ranks and resumptions, and it says which."""

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from expertune import finetune, generate, open_run
from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.run.inputs import probe_batch, sample_batches
from expertune.run.record import RunRecord
from tests.train.scarce import adapter_bytes


def selecting(values: dict[str, Any], **lora: Any) -> dict[str, Any]:
    return values | {"lora": values["lora"] | {"experts": {"share": 0.4}} | lora}


def test_run_selects_experts_once_and_resumes_byte_for_byte(run_values: dict[str, Any], tmp_path: Path) -> None:
    run_values["training"] |= {"max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    values, said, run_dir = selecting(run_values), io.StringIO(), tmp_path / "run"
    finetune(parse_config(values), console=Console(file=said, width=1000))
    record = RunRecord.load(run_dir)
    found, planned = record["adapter"]["selection"], record["plan"]
    assert {len(chosen) for chosen in found["layers"].values()} <= {1, 2}
    assert all(0.4 <= load < 1 for load in found["load"].values())
    assert "have an adapter, and get" in said.getvalue()
    assert "selection" in record["run"]["phases"]
    held = {key: tensor.numel() for key, tensor in load_file(run_dir / "adapter" / "adapter_model.safetensors").items()}
    chosen = {f"layers.{n}.block_sparse_moe.experts.{e}" for n, es in enumerate(found["layers"].values()) for e in es}
    assert {key.partition(".model.model.")[2].rsplit(".", 3)[0] for key in held if ".experts." in key} == chosen
    assert sum(held.values()) == record["adapter"]["trainable"] <= planned["parameters"]["trainable"]
    assert planned["notes"] == ["lora.experts: planned for the most experts that can be selected, 2 of 4 a layer"]
    for page in ("report.html", "adapter/README.md"):
        assert "have an adapter, and get" in (run_dir / page).read_text(encoding="utf-8")

    whole = adapter_bytes(run_dir)
    for late in ("adapter", "checkpoint-4"):
        shutil.rmtree(run_dir / late)
    resumed = finetune(parse_config(values), resume=True, console=Console(file=io.StringIO())).record
    assert adapter_bytes(run_dir) == whole
    assert resumed["adapter"]["selection"] == found
    assert isinstance(generate(open_run(run_dir), "What is 1 plus 2?", max_new_tokens=2), str)


def test_experts_are_scored_on_whole_examples_answers_after_long_prompts_included() -> None:
    config = parse_config({"model": "m", "data": {"train": "rows.jsonl", "max_length": 1024}, "output_dir": "out"})
    row = {"input_ids": [*range(600), *[7] * 100], "labels": [-100] * 600 + [7] * 100, "example_ids": [0]}
    context: Any = SimpleNamespace(config=config, device=torch.device("cpu"))
    inputs: Any = SimpleNamespace(
        dataset=[row] * 4, train=SimpleNamespace(report={}, examples=[row] * 4), tokenizer=None
    )
    batches = list(sample_batches(context, inputs, 1400))
    assert [int((batch["labels"] != -100).sum()) for batch in batches] == [100, 100]
    assert probe_batch(context, inputs, 128)["input_ids"].numel() == 128


@pytest.mark.parametrize(
    ("lora", "distributed", "message"),
    [
        ({"experts": {}}, None, "lora.experts: set share, .* or name them in layers"),
        ({"experts": {"share": 0}}, None, r"lora\.experts\.share"),
        ({"experts": {"share": 1.5}}, None, r"lora\.experts\.share"),
        ({"experts": {"select": "luck", "share": 0.2}}, None, r"lora\.experts\.select"),
        ({"experts": None, "expert_rank": "load", "r": 3}, None, "set an even one"),
        ({"targets": ["attention"]}, None, "lora.targets names none of them"),
        ({}, "parallel", "set distributed.experts to shard or replicate"),
    ],
)
def test_selection_that_cannot_be_is_refused_before_a_model_is_loaded(
    run_values: dict[str, Any], lora: dict[str, Any], distributed: str | None, message: str
) -> None:
    values = selecting(run_values, **lora) | ({"distributed": {"experts": distributed}} if distributed else {})
    with pytest.raises(ConfigError, match=message):
        finetune(values, console=Console(file=io.StringIO()))
    assert not Path(run_values["output_dir"]).exists()
