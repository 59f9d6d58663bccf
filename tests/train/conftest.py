"""A small random Mixtral with a real tokenizer, a few real rows, and run files over them."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from expertune import finetune
from expertune.config import parse_config
from expertune.run.record import RunRecord
from tests.train.scarce import Reference, adapter_bytes, run

ASSETS = Path(__file__).parents[2] / "src" / "expertune" / "assets"


def write_small_mixtral(folder: Path, seed: int = 0) -> Path:
    """A 2-layer Mixtral with 4 experts, per-expert names on disk, and the embedded model's tokenizer."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    model = MixtralForCausalLM(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        disk = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("gate_up_proj"):
            for expert, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                tensors[disk.replace("gate_up_proj", f"{expert}.w1.weight")] = gate.contiguous()
                tensors[disk.replace("gate_up_proj", f"{expert}.w3.weight")] = up.contiguous()
        elif name.endswith("down_proj"):
            for expert, rows in enumerate(tensor):
                tensors[disk.replace("down_proj", f"{expert}.w2.weight")] = rows.contiguous()
        else:
            tensors[disk] = tensor.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((ASSETS / "tiny-mixtral" / name).read_bytes())
    return folder


_shared: dict[str, Path] = {}
"""What is made once, by name: a fixture that another module imports is made again for it."""


@pytest.fixture(scope="session")
def small_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "model" not in _shared:
        _shared["model"] = write_small_mixtral(tmp_path_factory.mktemp("models") / "small-mixtral")
    return _shared["model"]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "rows" not in _shared:
        path = _shared["rows"] = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rows = [{"prompt": f"What is {n} plus {n + 1}?", "completion": f"It is {2 * n + 1}."} for n in range(24)]
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return _shared["rows"]


def nine_steps(model: Path, rows: Path, run_dir: Path) -> dict[str, Any]:
    """A run of 9 short steps with dropout, accumulation, evaluation and checkpoints, as a mapping."""
    return {
        "model": str(model),
        # `plain` keeps rows at the length that the tests of scarce memory count on.
        "data": {"train": f"{rows}[0:20]", "eval": f"{rows}[20:24]", "template": "plain", "max_length": 64},
        # What is planned, micro-batches above all, must not depend on the memory that happens to be free.
        "memory_budget": "8GB",
        "quantization": {"compute_dtype": "float32"},
        # A scale of 1.5 does not come back from the adapter's files to the bit.
        "lora": {"r": 4, "alpha": 6, "dropout": 0.1, "targets": ["attention", "experts", "lm_head"]},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 9,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
            "gradient_checkpointing": True,
        },
        "output_dir": str(run_dir),
    }


def shared_run(name: str, model: Path, rows: Path, folders: pytest.TempPathFactory, **training: Any) -> Path:
    """The directory of a run of `nine_steps` with some training arguments changed; tests must not change it."""
    if name not in _shared:
        run_dir = folders.mktemp("shared") / name
        values = nine_steps(model, rows, run_dir)
        values["training"] |= training
        finetune(parse_config(values), console=Console(file=io.StringIO()))
        _shared[name] = run_dir
    return _shared[name]


@pytest.fixture(scope="session")
def whole_run(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `run_values`, never interrupted; tests must not change it."""
    return shared_run("nine", small_mixtral, rows_file, tmp_path_factory)


@pytest.fixture(scope="session")
def three_steps(small_mixtral: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `run_values` in three steps, with an evaluation and a checkpoint at its end; not to be changed."""
    return shared_run("three", small_mixtral, rows_file, tmp_path_factory, max_steps=3)


@pytest.fixture
def run_values(small_mixtral: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """The run of `nine_steps` in a folder of the test's own."""
    return nine_steps(small_mixtral, rows_file, tmp_path / "run")


@pytest.fixture
def values(run_values: dict[str, Any]) -> dict[str, Any]:
    """Six steps of two micro-batches of two rows, with dropout; four layers of experts run in each step.

    Nothing is kept for backward that could be computed again: where memory runs out, batches are what is changed first.
    """
    values = run_values | {"data": run_values["data"] | {"merge_accumulation": False}, "kernels": {"keep": 0}}
    values["training"] |= {"max_steps": 6, "eval_steps": 2, "save_steps": 2}
    return values


@pytest.fixture(scope="session")
def references() -> dict[str, tuple[RunRecord, bytes]]:
    """Undisturbed runs that several tests compare with, by name."""
    return {}


@pytest.fixture
def reference(references: dict[str, tuple[RunRecord, bytes]], values: dict[str, Any], tmp_path: Path) -> Reference:
    """Record and adapter of an undisturbed run; those of one name are run once."""

    def of(name: str, **training: Any) -> tuple[RunRecord, bytes]:
        if name not in references:
            record = run(copy.deepcopy(values), tmp_path / name, training=training)
            references[name] = (record, adapter_bytes(tmp_path / name))
        return references[name]

    return of


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a mapping as a run file."""

    def write(values: dict[str, Any], name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
