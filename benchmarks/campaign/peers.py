"""Qwen3-30B-A3B beside its peers: the same steps as `steps.qwen`, each stack in a process of its own.

Peers read a checkpoint, of which full depth has 61 GB; they and ours are compared at `--peer-layers` layers of full
width, one after the other, each alone on the GPU. A peer is timed only where its loss without adapters is ours.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import report, step
from benchmarks.campaign import measure, shapes
from benchmarks.campaign.record import Item, Record
from benchmarks.campaign.steps import ROWS, Row, alpaca_rows
from benchmarks.peers.processes import Driver

_EOS = 2
_DRIVER_S = 150


def run(args: argparse.Namespace, out: Record) -> None:
    """Ours and the peers at the depth of the checkpoint."""
    device = out.device
    rows, collate = alpaca_rows(args, out)
    merged, padded = [collate(rows)], [_padded(rows[first : first + ROWS]) for first in range(0, len(rows), ROWS)]
    model = shapes.qwen3(args.small, args.peer_layers)
    cache = args.cache or Path(tempfile.mkdtemp(prefix="campaign-"))
    folder = cache / "qwen3"
    try:
        if out.item("checkpoint", lambda: _write_checkpoint(folder, model, device), 60, again=True) is None:
            return
        measure.reset_peak(device)
        files = {"ours": merged, "peers": padded}
        for name, batches in files.items():
            _save(cache / f"{name}.safetensors", batches)
        real = sum(len(tokens) for tokens in (row for batch in merged for row in batch["input_ids"]))
        found: dict[str, Item] = {}
        for name in ("ours", *args.peers):
            batch = cache / ("ours.safetensors" if name == "ours" else "peers.safetensors")
            result = out.item(
                f"{name}, {model.layer.layers} layers",
                lambda name=name, batch=batch: _drive(name, folder, batch, real, model, out, found.get("ours")),
                needs_s=60,
            )
            if result is not None:
                found[name] = result
        peers = {name: result["median_s"] for name, result in found.items() if name != "ours"}
        if "ours" in found and peers:
            ours = found["ours"]["median_s"]
            out.keep("ratios", {name: seconds / ours for name, seconds in peers.items()})
    finally:
        if args.cache is None:
            shutil.rmtree(cache, ignore_errors=True)


def _drive(name: str, folder: Path, batch: Path, real: int, model: Any, out: Record, ours: Item | None) -> Item:
    """One stack in its own process: its check, then its steps."""
    options = ["--model", folder, "--batch", batch, "--dropout", "0", "--device", out.device.type]
    options += ["--dtype", "bfloat16", "--rank", model.lora.r, "--alpha", model.lora.alpha]
    options += ["--optimizer", "paged_adamw_8bit" if out.device.type == "cuda" else "adamw"]
    driver = Driver(name, [str(option) for option in options], min(_DRIVER_S, max(out.remaining_s, 1)))
    try:
        check = driver.ask("check")
        check["base_loss"] = driver.ask("base")["loss"]
        if name != "ours":
            if ours is None:
                raise report.CorrectnessError("ours did not run, so that there is no loss to hold the peer to")
            step.require_same_base(ours["check"], name, check)
        for _ in range(2):
            driver.ask("step")
        seconds = [driver.ask("step")["seconds"] for _ in range(2 if out.small else 5)]
        median = statistics.median(seconds)
        return {
            "layers": model.layer.layers,
            "seconds": seconds,
            "median_s": median,
            "tokens": real,
            "tokens_per_second": real / median,
            "check": check,
            **driver.ask("memory"),
            **driver.ready,
        }
    finally:
        driver.close()


@torch.no_grad()
def _write_checkpoint(folder: Path, model: Any, device: torch.device) -> Item:
    """Random 16-bit weights in the published layout, a layer at a time, made on the device."""
    config, shape = model.config, model.layer
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    experts = 3 * shape.experts * shape.hidden * shape.intermediate
    need = int(2.1 * (shape.layers * experts + 2 * config["vocab_size"] * shape.hidden)) + 2**30
    if free < need:
        raise OSError(f"{need / 1e9:.0f} GB are needed and {free / 1e9:.0f} GB are free: take fewer --peer-layers")
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return (drawn * columns**-0.5).to("cpu", torch.bfloat16)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    where: dict[str, str] = {}

    def save(shard: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, shard))

    hidden, heads, head_size = shape.hidden, config["num_attention_heads"], config["head_dim"]
    queries, keys = heads * head_size, config["num_key_value_heads"] * head_size
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        attention["o_proj"] = (hidden, queries)
        tensors = {f"{name}.self_attn.{key}.weight": normal(*size) for key, size in attention.items()}
        tensors |= {f"{name}.self_attn.{key}.weight": ones(head_size) for key in ("q_norm", "k_norm")}
        tensors |= {f"{name}.{key}.weight": ones(hidden) for key in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{name}.mlp.gate.weight"] = normal(shape.experts, hidden)
        for expert in range(shape.experts):
            for key in ("gate_proj", "up_proj"):
                tensors[f"{name}.mlp.experts.{expert}.{key}.weight"] = normal(shape.intermediate, hidden)
            tensors[f"{name}.mlp.experts.{expert}.down_proj.weight"] = normal(hidden, shape.intermediate)
        save(f"model-{layer:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden), "model.norm.weight": ones(hidden)}
    save("model-ends.safetensors", ends | {"lm_head.weight": normal(config["vocab_size"], hidden)})
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {"layers": shape.layers, "bytes": size}


def _padded(rows: Sequence[Row]) -> Row:
    """Rows as the peers are fed: padded on the right to the longest of the micro-batch."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], value: int) -> list[int]:
        return [*values, *[value] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], _EOS) for row in rows]),
        "labels": torch.tensor([pad([-100, *row["labels"][1:]], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def _save(path: Path, batches: Sequence[Row]) -> None:
    """Micro-batches in one file, as `benchmarks.peers.driver` takes them."""
    tensors = {
        f"{number}.{key}": value.clone()
        for number, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path)
